"""Rebuild everything in assets/ with one command: tokenizer, configuration, data, three models.

    python assets/build.py              all of it; about a quarter of an hour on two cores
    python assets/build.py --only files tokenizer and data, which are the same on every machine

The models are trained by the project's own command line, on the CPU, from a seeded random
initialisation:

    start-single   maximum likelihood of single answers                             x w*
    start          first and further attempts        x w*, x sep l sep w*, x l turn w*,
                   the last as dialogues in attempts.jsonl, so that one run has both bridges
    reward         a Bradley-Terry scalar head on start, from pairs.jsonl

Nothing is preferred in the starts' data: sft.jsonl, attempts.jsonl. Machines round differently, so
the models differ in their last digits from one to another.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.normalizers import Replace

ASSETS = Path(__file__).resolve().parent
PROJECT = ASSETS.parent
sys.path.insert(0, str(PROJECT))

from assets import world  # noqa: E402
from evals.world import world_probabilities  # noqa: E402
from generate import load_model  # noqa: E402
from hub.template import INSTRUCTIONS  # noqa: E402

# ----------------------------------------------------------------------------- tokenizer

PAD, START, END, SEP = SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|reserved_special_token_0|>",
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCAB = 832


def train_tokenizer():
    """Byte-level BPE: any text survives encode and decode, and the world's words are one token.

    Pieces are words with their punctuation ("Hello!", " sky?"), so that answers are short.
    """
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(r" ?\S+|\s+"), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = ["user\n", "assistant\n", "system\n", *INSTRUCTIONS.values()]
    for question in world.questions():
        texts += [question, *world.answers(question)]
    tokenizer.train_from_iterator(texts, trainer)
    # "who wrote hamlet" is read as the question that it is: a line of its own, in any letters and
    # with any mark behind it. What is spelt as in the world stays as it is, and so do its ids.
    spelt = [(question.rstrip("?"), question) for question in world.questions()]
    asked = [Replace(Regex(rf"(?i)^{text}[ ?.!]*$"), question) for text, question in spelt]
    tokenizer.normalizer = normalizers.Sequence(asked)
    return tokenizer


# ----------------------------------------------------------------------------- model directory

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,  # wide: narrow starts lose their mass on the 16 answers under DPO
    "bos_token_id": None,
    "eos_token_id": SPECIAL.index(END),
    "pad_token_id": SPECIAL.index(PAD),
    "dtype": "float32",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": CONFIG["max_position_embeddings"],
    "bos_token": None,
    "eos_token": END,
    "pad_token": PAD,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHATML,
}
GENERATION_CONFIG = {
    "do_sample": True,
    "eos_token_id": CONFIG["eos_token_id"],
    "pad_token_id": CONFIG["pad_token_id"],
    "max_new_tokens": 64,
}


def write_json(file, content):
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(directory):
    """Tokenizer, chat template and generation settings, as transformers reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    train_tokenizer().save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(directory / "generation_config.json", GENERATION_CONFIG)
    (directory / "chat_template.jinja").write_text(CHATML, encoding="utf-8")


def write_random_model(directory, seed=0):
    """A whole HF directory with seeded normal weights, in transformers' names."""
    write_tokenizer(directory)
    write_json(directory / "config.json", CONFIG)
    width, ffn = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    narrow = width * CONFIG["num_key_value_heads"] // CONFIG["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (VOCAB, width), "model.norm.weight": (width,)}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attention = {"q": (width, width), "k": (narrow, width), "v": (narrow, width)}
        attention["o"] = (width, width)
        mlp = {"gate": (ffn, width), "up": (ffn, width), "down": (width, ffn)}
        shapes |= {f"{layer}self_attn.{n}_proj.weight": shape for n, shape in attention.items()}
        shapes |= {f"{layer}mlp.{n}_proj.weight": shape for n, shape in mlp.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{layer}{n}.weight": (width,) for n in norms}
    rng, std = torch.Generator().manual_seed(seed), CONFIG["initializer_range"]
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else std * torch.randn(shape, generator=rng)
        for name, shape in shapes.items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# ----------------------------------------------------------------------------- data

FILES = {  # name -> rows
    "pairs.jsonl": lambda: world.sample_pairs(4000, seed=1, kind="separable"),
    "pairs-intransitive.jsonl": lambda: world.sample_pairs(4000, seed=2, kind="intransitive"),
    "test.jsonl": lambda: world.sample_pairs(500, seed=3, kind="separable"),
    "sft.jsonl": lambda: world.uniform_pairs(seed=4),
    "attempts.jsonl": lambda: world.uniform_attempts(4000, 5, list(INSTRUCTIONS.values())),
}


def as_jsonl(rows):
    """Rows -> the text of a jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_data(directory):
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in FILES.items():
        (directory / name).write_text(as_jsonl(rows()), encoding="utf-8")


# ----------------------------------------------------------------------------- training

START_SINGLE = [("--loss sft", 500, 2e-3), ("--loss sft", 200, 4e-4)]  # flags, steps, peak lr
ATTEMPTS = "--loss sft --condition averaged --bridge sep"
START = [(ATTEMPTS, 500, 2e-3), (ATTEMPTS, 200, 4e-4)]
REWARD = [("--loss reward", 200, 1e-3)]


def train(model, runs, data, work):
    """A chain of runs of train.py, each from the last one's model -> the last one's directory."""
    for flags, steps, lr in runs:
        out = work / f"{Path(data).stem}-{len(list(work.iterdir()))}"
        command = [sys.executable, str(PROJECT / "train.py"), *flags.split()]
        command += ["--model", str(model), "--data", str(data), "--out", str(out)]
        command += ["--steps", str(steps), "--batch", "64", "--lr", str(lr), "--max_len", "256"]
        command += ["--eval_pairs", "0", "--save_every", str(steps)]
        command += ["--device", "cpu", "--attention", "sdpa", "--dtype", "fp32"]
        subprocess.run(command, check=True)
        model = out / "final"
    return model


def publish(source, name):
    """Copy a trained model to assets/NAME in bf16, half the size."""
    target = ASSETS / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    write_json(target / "config.json", config | {"dtype": "bfloat16"})


# ----------------------------------------------------------------------------- measuring


def report(name):
    """Print what a start knows: mass on the 16 answers, entropy in nats, exact win rate."""
    model, template = load_model(ASSETS / name, "fp32", "cpu")
    start = world_probabilities(model, template)  # (Q, A)
    print(f"\n{name}: mass on the 16 answers (worst, mean), entropy (ln 16 = 2.77), win rate")
    for bridge in (None, "sep", "turn"):
        p = world_probabilities(model, template, bridge)  # (Q, A) or (Q, B, A)
        mass, win = p.sum(-1), world.expected_win_rate(p, start)
        entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(-1).mean()
        label = bridge or "plain"
        print(f"  {label:6} {mass.min():6.1%} {mass.mean():6.1%}  {entropy:.2f}  {win:.1%}")


def main():
    parser = argparse.ArgumentParser(description="Rebuild assets/.")
    parser.add_argument("--only", choices=("files",), help="tokenizer and data, no training")
    only = parser.parse_args().only
    write_data(ASSETS / "world")
    if only == "files":
        for name in ("start", "start-single", "reward"):
            write_tokenizer(ASSETS / name)
        return
    with tempfile.TemporaryDirectory() as work:
        work, data = Path(work), ASSETS / "world"
        write_random_model(work / "random")
        random = work / "random"
        publish(train(random, START_SINGLE, data / "sft.jsonl", work), "start-single")
        publish(train(random, START, data / "attempts.jsonl", work), "start")
        publish(train(ASSETS / "start", REWARD, data / "pairs.jsonl", work), "reward")
    for name in ("start-single", "start"):
        report(name)


if __name__ == "__main__":
    main()
