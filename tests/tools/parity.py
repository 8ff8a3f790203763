"""Parity with transformers: `python tests/tools/parity.py` prints the table of docs/guarantees.md.

Every family as a tiny random model in fp32, each check against what transformers computes with the
same files: the largest absolute error over all values of the check. A cell is what a function of
CHECKS returns; tests/test_parity.py holds each to its bound.

    logits    of 2 x 100 tokens: beyond every window, and beyond the original positions of Llama 3.2
    long      beyond the 8,192 positions of Llama 3.1 (the last 100 tokens of 8,300)
    gradients of a random linear function of the logits, over all parameters
    decoding  logits of cached decoding, token by token, against our own full forward
    rows      log-probabilities of packed rows against each sequence by itself in transformers
    reward    scores of *ForSequenceClassification
    export    logits of transformers with what `model.export` wrote
    bytes     tensors that differ after load -> save (0: byte-equal)
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # conftest.py
sys.path.insert(0, str(Path(__file__).parents[2]))  # model.py

import tiny
from smollm2 import smollm2_dir

import model as model_file
from conftest import write_model
from data import build_row, lay_out
from generate import KVCache
from kernels import chains
from model import family_of, hf_name, load

LLAMA3 = {  # as published, and so small that 100 tokens show it
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SMALL = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 64}


def base(family, architecture, **changes):
    """tiny.LLAMA as another family, without the fields that it does not know."""
    return tiny.LLAMA | {"model_type": family, "architectures": [architecture]} | changes


def neox(**changes):
    config = base("gpt_neox", "GPTNeoXForCausalLM", **changes)
    for name in ("num_key_value_heads", "rms_norm_eps", "rope_theta"):
        config.pop(name)
    rotary = {"rotary_pct": 0.5, "rotary_emb_base": 1000}
    return config | rotary | {"layer_norm_eps": 1e-5, "hidden_act": "gelu"} | changes


GEMMA2 = base(
    "gemma2",
    "Gemma2ForCausalLM",
    head_dim=16,
    num_hidden_layers=3,
    sliding_window=7,
    query_pre_attn_scalar=24,
    attn_logit_softcapping=0.5,  # so low that they bend every score of a tiny model
    final_logit_softcapping=2.0,
    hidden_activation="gelu_pytorch_tanh",
    tie_word_embeddings=True,
)
SLIDES = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
CONFIGS = {
    "Llama 2": tiny.LLAMA | {"num_key_value_heads": 4},
    "Llama 3": tiny.LLAMA | {"rope_theta": 500000.0},
    "Llama 3.1": tiny.LLAMA | {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "head_dim": 64},
    "Llama 3.2": tiny.LLAMA
    | {"rope_theta": 100.0, "rope_scaling": SMALL, "tie_word_embeddings": True},
    "Mistral 0.1": base("mistral", "MistralForCausalLM", sliding_window=7),
    "Mistral 0.2": base("mistral", "MistralForCausalLM", sliding_window=None),
    "Qwen2": base("qwen2", "Qwen2ForCausalLM", use_sliding_window=False, sliding_window=7),
    "Qwen2, sliding": base("qwen2", "Qwen2ForCausalLM", **SLIDES),
    "Qwen3": base("qwen3", "Qwen3ForCausalLM", head_dim=16),
    "Qwen3, sliding": base("qwen3", "Qwen3ForCausalLM", head_dim=16, **SLIDES),
    "Gemma 2": GEMMA2,
    "Pythia": neox(),
    "GPT-NeoX, sequential": neox(use_parallel_residual=False, hidden_act="gelu_fast"),
}
LONG = ("Llama 3.1",)  # one, since 8,300 tokens take ten seconds


def theirs(directory, kind="CausalLM", **options):
    """transformers' model of a directory, in fp32; attention spelt out, as Gemma 2 wants it."""
    import transformers

    auto = getattr(transformers, f"AutoModelFor{kind}")
    options = {"dtype": torch.float32, "attn_implementation": "eager"} | options
    return auto.from_pretrained(directory, **options).eval()


def ids(*shape, seed=0, high=256):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def furthest(a, b):
    assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
    return (a.double() - b.double()).abs().max().item()


# ----------------------------------------------------------------------------- the checks


@torch.no_grad()
def logits(directory):
    tokens = ids(2, 100)
    return furthest(load(directory).logits(tokens), theirs(directory)(tokens).logits)


@torch.no_grad()
def long(directory):
    tokens = ids(1, 8300)
    expected = theirs(directory, attn_implementation="sdpa")(tokens, logits_to_keep=100).logits
    model = load(directory)
    model.attend = chains.attend  # 8,300 x 8,300 scores of every head would take gigabytes
    return furthest(model.logits(tokens)[:, -100:], expected)


def gradients(directory):
    tokens, ours, other = ids(2, 100), load(directory).requires_grad_(True), theirs(directory)
    found, expected = ours.logits(tokens), other(tokens).logits
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)) / 100
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    wanted = {n.replace("lm_head", "embed_out"): p.grad for n, p in other.named_parameters()}
    wanted |= {n: p.grad for n, p in other.named_parameters()}
    named = {hf_name(ours.config.family, n): p.grad for n, p in ours.named_parameters()}
    assert len(named) == len(list(other.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in named.values())
    return max(furthest(gradient, wanted[name]) for name, gradient in named.items())


@torch.no_grad()
def decoding(directory):
    """Two sequences of unequal length: a prompt at once, then one token at a time."""
    model, tokens, start = load(directory), ids(2, 40), (11, 17)
    cache, worst = KVCache(model, 2), 0.0
    expected = model.logits(tokens)
    for row, n in enumerate(start):
        positions = torch.arange(n)[None]
        attend = cache.attend(slice(row, row + 1), positions, n)
        x = model.hidden(tokens[row, :n][None], positions, attend)
        worst = max(worst, furthest(model.to_logits(x)[0], expected[row, :n]))
    for step in range(40 - max(start)):
        at = torch.tensor(start)[:, None] + step  # (B, 1)
        attend = cache.attend(slice(0, 2), at, max(start) + step + 1)
        x = model.hidden(tokens.gather(1, at), at, attend)
        worst = max(worst, furthest(model.to_logits(x[:, 0]), expected[[0, 1], at[:, 0]]))
    return worst


def tries(seed=0):
    """Three tries of a prompt, two answers, and each answer behind the other."""
    rng, pairs = np.random.default_rng(seed), []
    for _ in range(3):
        sizes = rng.integers(3, 12, 5)
        x, w, l, turn, end = (rng.integers(0, 256, n).astype(np.int32) for n in sizes)
        paths = [[x, w], [x, l], [x, w, turn, l], [x, l, turn, w, end]]
        pairs.append([(path, len(path[-1])) for path in paths])
    return pairs


@torch.no_grad()
def packed(directory):
    model, other, pairs = load(directory), theirs(directory), tries()
    row = build_row([lay_out(paths) for paths in pairs], range(3), 4, pad_to=256)
    found, expected = row.sums(model(row)), torch.zeros(3, 4)
    for i, paths in enumerate(pairs):
        for j, (segments, n) in enumerate(paths):
            tokens = torch.tensor(np.concatenate(segments)).long()[None]
            logps = other(tokens).logits[0].log_softmax(-1)[:-1]
            scored = logps.gather(-1, tokens[0, 1:, None])[-n:]
            expected[i, j] = scored.sum()
    return furthest(found, expected)


def as_reward(config):
    stem = family_of(config["model_type"]).stem
    labels = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config | {"architectures": [stem + "ForSequenceClassification"]} | labels


def last_scores(directory, sequences):
    """Our scores of sequences (int arrays), all in one row."""
    model, n = load(directory), len(sequences)
    laid = [lay_out([([s[:2], s[2:]], 1)], score="last") for s in sequences]
    with torch.no_grad():
        return model(build_row(laid, range(n), 1, pad_to=256))


@torch.no_grad()
def reward(directory):
    """Sequences end with an id that is no padding, where transformers' pooling is the last one."""
    other = theirs(directory, "SequenceClassification")
    sequences = [ids(n, seed=n).numpy().astype(np.int32) for n in (9, 23, 40)]
    expected = [other(torch.tensor(s).long()[None]).logits[0, 0] for s in sequences]
    assert furthest(expected[0], expected[1]) > 1e-3
    return furthest(last_scores(directory, sequences), torch.stack(expected))


def exported(directory, out):
    model = load(directory)
    named = ((n, p.detach()) for n, p in model.named_parameters())
    options = {"template": tiny.CHATML, "shard_bytes": 30_000}
    model_file.export(out, model.config, named, directory, torch.float32, **options)
    return out


@torch.no_grad()
def export(directory):
    with tempfile.TemporaryDirectory() as out:
        return furthest(
            theirs(exported(directory, Path(out)))(ids(2, 100)).logits,
            theirs(directory)(ids(2, 100)).logits,
        )


def byte_equal(directory):
    with tempfile.TemporaryDirectory() as out:
        exported(directory, Path(out))
        before, after = tensors_of(directory), tensors_of(out)
        assert before.keys() == after.keys()
        return sum(before[k].numpy().tobytes() != after[k].numpy().tobytes() for k in before)


def tensors_of(directory):
    return {k: t for f in Path(directory).glob("*.safetensors") for k, t in load_file(f).items()}


CHECKS = {
    "logits": logits,
    "long": long,
    "gradients": gradients,
    "decoding": decoding,
    "rows": packed,
    "reward": reward,
    "export": export,
    "bytes": byte_equal,
}


def build(name, check, directory):
    """The model directory that a check of a family reads."""
    config = CONFIGS[name] | {"dtype": "float32"}
    return write_model(Path(directory), as_reward(config) if check == "reward" else config)


def applies(name, check):
    return check != "long" or name in LONG


# ----------------------------------------------------------------------------- the table


def cell(name, check):
    if not applies(name, check):
        return ""
    with tempfile.TemporaryDirectory() as directory:
        return f"{CHECKS[check](build(name, check, directory)):.0e}".replace("0e+00", "0")


def real(check):
    """The same check on SmolLM2-135M-Instruct; its bf16 files are compared in fp32."""
    directory = smollm2_dir()
    return f"{CHECKS[check](directory):.0e}" if directory else "not built"


def main():
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    print("| family | " + " | ".join(CHECKS) + " |")
    print("| --- " * (len(CHECKS) + 1) + "|")
    for name in CONFIGS:
        print(f"| {name} | " + " | ".join(cell(name, check) for check in CHECKS) + " |", flush=True)
    of_real = [real(check) if check in ("logits", "decoding", "rows") else "" for check in CHECKS]
    print("| SmolLM2-135M | " + " | ".join(of_real) + " |")


if __name__ == "__main__":
    main()
