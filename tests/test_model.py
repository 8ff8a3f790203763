"""The transformer equals transformers' own, and a row equals its sequences run one by one."""

import weakref

import numpy as np
import pytest
import tiny
import torch
from tiny import MODELS
from tries import random_paths, segment

import model as model_file
from conftest import write_model
from data import build_row, lay_out
from jobs.cli import UserError
from model import ScoredLogps, config_of, hf_name, load, path_limit


def new_spelling(config):
    """rope_theta and rope_scaling -> rope_parameters, as transformers 5 writes them."""
    scaling = config.get("rope_scaling", {"rope_type": "default"})
    rest = {k: v for k, v in config.items() if not k.startswith("rope_")}
    return rest | {"rope_parameters": scaling | {"rope_theta": config["rope_theta"]}}


def trainable(directory):
    return load(directory).requires_grad_(True)


def ids(n, seed=0, high=260):
    return torch.randint(0, high, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    directory = write_model(tmp_path, MODELS[name])
    ours = trainable(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = ids(200).view(2, 100)
    expected, found = theirs(tokens).logits, ours.logits(tokens)
    assert (found - expected).abs().max() <= 1e-4
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)) / 100
    (expected * direction).sum().backward()
    (found * direction).sum().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    named = {hf_name(ours.config.family, n): p.grad for n, p in ours.named_parameters()}
    assert named.keys() == gradients.keys()
    for key, gradient in named.items():
        assert gradient.abs().max() > 1e-3, f"{key}: a test that could not fail"
        assert (gradient - gradients[key]).abs().max() <= 1e-4, key


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("llama ")])
def test_both_spellings_of_rope_give_the_same_logits(name, tmp_path):
    old = write_model(tmp_path / "old", MODELS[name])
    new = write_model(tmp_path / "new", new_spelling(MODELS[name]))
    tokens = ids(100)[None]
    assert torch.equal(load(old).logits(tokens), load(new).logits(tokens))


def test_new_spelling_of_rope_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    directory = write_model(tmp_path, new_spelling(MODELS["llama 3.1, small theta"]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = ids(100)[None]
    with torch.no_grad():
        assert (load(directory).logits(tokens) - theirs(tokens).logits).abs().max() <= 1e-4


UNSUPPORTED = [
    ({"model_type": "gpt2"}, "gpt2"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "linear"}}, "without factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [2]}}, "mrope_secti"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_fac"),
    ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
    ({"num_local_experts": 8}, "num_local_experts 8"),
    ({"attention_multiplier": 0.1}, "attention_multiplier 0.1"),
    ({"model_type": "qwen2", "attention_bias": "yes"}, "attention_bias"),
    ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
    ({"model_type": "gemma2", "hidden_activation": "relu"}, "hidden_activation 'relu'"),
    ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"model_type": "gpt_neox", "hidden_act": "relu"}, "hidden_act 'relu'"),
]


@pytest.mark.parametrize("changes, named", UNSUPPORTED)
def test_what_is_not_supported_is_named_in_one_line(changes, named, tmp_path):
    with pytest.raises(UserError, match=named) as caught:
        config_of(tiny.LLAMA | changes, str(tmp_path / "config.json"))
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["gpt2", "../train", "__init__", None])
def test_an_unknown_model_type_is_told_with_the_known_ones(kind):
    """A name that is a path is never imported."""
    with pytest.raises(UserError, match="is not supported") as caught:
        config_of(tiny.LLAMA | {"model_type": kind})
    known = "gemma2, gpt_neox, gpt_neox_reward_model, llama, mistral, qwen2, qwen3"
    assert str(caught.value).endswith(f"model_type {kind!r} is not supported (known: {known})")


def test_load_gives_a_model_that_is_ready_and_knows_where_it_lies(tiny_model_dir):
    model = load(str(tiny_model_dir), dtype=None, device="auto", head="logps")
    assert model.directory == tiny_model_dir and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    assert model.embed.weight.device.type == kind
    assert model.embed.weight.dtype == {"cuda": torch.bfloat16, "cpu": torch.float32}[kind]
    assert load(tiny_model_dir, "bf16").embed.weight.dtype == torch.bfloat16


def test_load_refuses_another_head_and_an_absent_device(tiny_model_dir, monkeypatch):
    needed = f"--ref {tiny_model_dir} is a language model; a reward model is needed"
    with pytest.raises(UserError, match=needed):
        load(tiny_model_dir, head="reward", flag="--ref")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: no CUDA device is available"):
        load(tiny_model_dir, device="cuda")


# ----------------------------------------------------------------------------- the scored head


@pytest.mark.parametrize("per_chunk", [1, 3, 100])
def test_scored_logps_equal_log_softmax_in_value_and_gradient(per_chunk, monkeypatch):
    monkeypatch.setattr(ScoredLogps, "LOGITS", per_chunk * 50)
    torch.manual_seed(0)
    x, weight = torch.randn(10, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    label, grad = ids(10, high=50), torch.randn(10)
    expected = (x @ weight.T).log_softmax(-1).gather(-1, label[:, None]).squeeze(-1)
    wanted = torch.autograd.grad(expected, (x, weight), grad)
    logps = ScoredLogps.apply(x, weight, label)
    assert torch.allclose(logps, expected, atol=1e-5)
    for _ in range(2):  # what forward kept of the last chunk is used up by the first backward
        found = torch.autograd.grad(logps, (x, weight), grad, retain_graph=True)
        for a, b in zip(found, wanted, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_chunk_of_logits_is_gone_before_the_next_is_there(monkeypatch):
    """In forward and in backward, which begins with the chunk that forward kept."""
    made = []

    def watched(logits, cap):
        assert all(other() is None for other in made)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(model_file, "soft_cap", watched)
    monkeypatch.setattr(ScoredLogps, "LOGITS", 40)  # two tokens a chunk
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    ScoredLogps.apply(x, weight, torch.arange(5)).sum().backward()
    assert len(made) == 3 + 2


def test_scored_logps_of_bf16_states_are_fp32_and_finite_for_large_logits():
    x = torch.full((2, 4), 60.0, dtype=torch.bfloat16)
    weight = torch.tensor([[1.0] * 4, [-1.0] * 4], dtype=torch.bfloat16)
    logps = ScoredLogps.apply(x, weight, torch.tensor([0, 1]))
    assert logps.dtype == torch.float32 and logps.tolist() == [0.0, -480.0]


# ----------------------------------------------------------------------------- rows


def alone(model, segments, n):
    """Log-probabilities of the first n tokens of the last segment: the sequence run by itself."""
    tokens = torch.tensor(np.concatenate(segments), dtype=torch.long)
    logps = model.logits(tokens[None])[0].log_softmax(-1)
    start = len(tokens) - len(segments[-1])
    return logps[torch.arange(start - 1, start + n - 1), tokens[start : start + n]]


@pytest.mark.parametrize("family", ["llama 3.1, small theta", "mistral sliding"])
@pytest.mark.parametrize("pad_to", [0, 128])
@pytest.mark.parametrize("seed", range(3))
def test_a_row_equals_its_sequences_run_alone(seed, pad_to, family, tmp_path):
    """Values and parameter gradients, with several tries of random shape in the row."""
    model = trainable(write_model(tmp_path, MODELS[family], seed))
    rng = np.random.default_rng(seed)
    pairs = [random_paths(rng) for _ in range(3)]
    row = build_row([lay_out(paths) for paths in pairs], range(3), 5, pad_to)
    assert pad_to == 0 or len(row.tokens) == pad_to > row.spans[-1][1]
    sums = row.sums(model(row))  # (B, P)
    apart = [torch.stack([alone(model, *path).sum() for path in paths]) for paths in pairs]
    apart = torch.stack(apart)
    assert torch.allclose(sums, apart, atol=1e-4)
    assert row.counts().tolist() == [[n for _, n in paths] for paths in pairs]
    weights = torch.tensor(rng.normal(size=sums.shape), dtype=torch.float32)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad((sums * weights).sum(), parameters)
    wanted = torch.autograd.grad((apart * weights).sum(), parameters)
    for name, a, b in zip(names, found, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-4, name


def test_an_empty_row_has_no_values_and_gives_zero_gradients(tiny_model_dir):
    """Ranks without pairs run one, since FSDP's collectives must line up."""
    model = trainable(tiny_model_dir)
    row = build_row([], [], n_paths=2)
    values = model(row)
    assert values.shape == (0,) and row.sums(values).shape == (0, 2)
    row.sums(values).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_recomputed_blocks_give_the_same_gradient(tiny_model_dir, monkeypatch):
    row = build_row([lay_out(random_paths(np.random.default_rng(0)))], [0], 5)
    gradients, calls = [], []
    body = model_file.Block.body
    monkeypatch.setattr(model_file.Block, "body", lambda *a: calls.append(0) or body(*a))
    for recompute in (False, True):
        model = trainable(tiny_model_dir)
        for block in model.blocks:
            block.recompute = recompute
        model(row).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert len(calls) == 2 + 2 * 2, "each block runs again in backward"
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", ["llama", "llama tied", "qwen2"])
def test_a_reward_head_scores_each_answer_as_transformers_does(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    (architecture,) = MODELS[family]["architectures"]
    kind = architecture.replace("CausalLM", "SequenceClassification")
    config = MODELS[family] | {"architectures": [kind], "num_labels": 1}
    directory = write_model(tmp_path, config | {"id2label": {"0": "LABEL_0"}})
    model, rng = load(directory), np.random.default_rng(0)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32
    ).eval()
    prompt, answers = segment(rng), [segment(rng), segment(rng)]
    trie = lay_out([([prompt, answer], 1) for answer in answers], score="last")
    with torch.no_grad():
        found = model(build_row([trie], [0], 2))
        sequences = [torch.tensor(np.concatenate([prompt, a])).long() for a in answers]
        expected = torch.stack([theirs(tokens[None]).logits[0, 0] for tokens in sequences])
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5)
    assert (expected[0] - expected[1]).abs() > 1e-3


# ----------------------------------------------------------------------------- positions

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 1024}  # fmt: skip


@pytest.mark.parametrize(
    "changes, positions",
    [
        ({}, 2048),
        ({"max_position_embeddings": None}, None),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),  # LongChat, Vicuna 16k
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0,
                           "original_max_position_embeddings": 512}}, 2048),
        ({"rope_scaling": LLAMA3}, 2048),  # Llama 3.1: what it says is what came of the scaling
        ({"rope_scaling": {"rope_type": "default"}}, 2048),
    ],
)  # fmt: skip
def test_positions_are_those_of_config_json_stretched_by_its_scaling(changes, positions):
    assert config_of(tiny.LLAMA | changes).positions == positions


def test_max_len_is_at_most_the_positions(tmp_path):
    """By itself; more by hand is refused, whichever of the models has too few."""
    long, short = tmp_path / "long", tmp_path / "short"
    tiny.build(long, tiny.LLAMA | {"max_position_embeddings": 10**6})
    tiny.build(short, tiny.LLAMA | {"max_position_embeddings": 64})
    assert path_limit(None, long) == 4096 and path_limit(None, long, short) == 64
    assert path_limit(None, long, most=100) == 100 and path_limit(5000, long) == 5000
    assert path_limit(64, short) == 64
    with pytest.raises(UserError, match=f"--max_len 65: {short} was made for 64 positions"):
        path_limit(65, long, short)
