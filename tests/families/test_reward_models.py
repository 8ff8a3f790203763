"""Reward models: ArmoRM's formula by a naive loop, OASST's head and input, exports of our own."""

import json

import numpy as np
import parity
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import evaluate
import model as model_file
from conftest import write_model
from data import build_row, lay_out
from evals.answers import Answer
from families import armo as armo_file
from hub.template import Template
from jobs.cli import UserError
from jobs.files import write_json
from model import Transformer, config_of, hf_name, load, load_weights, read_config

END = list(armo_file.PROMPT_END)
ARMO = tiny.LLAMA | {
    "architectures": ["LlamaForRewardModelWithGating"],
    "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForReward"},
    "vocab_size": max(END) + 1,
    "hidden_size": 16,
    "num_objectives": 5,
    "gating_hidden_dim": 12,
    "gating_temperature": 2.0,
    "dtype": "float32",
}
OASST = parity.neox() | {
    "model_type": "gpt_neox_reward_model",
    "architectures": ["GPTNeoXRewardModel"],
    "pooling": "last",
    "dtype": "float32",
}


def row_of(prompts, answers):
    """Each prompt is one trie, in which its answers are branches; scores in their order."""
    paths = [[([x, y], 1) for y in ys] for x, ys in zip(prompts, answers, strict=True)]
    return build_row([lay_out(p, score="last") for p in paths], range(len(paths)), len(answers[0]))


def tokens(*ids):
    return np.array(ids, dtype=np.int32)


# ----------------------------------------------------------------------------- ArmoRM


def naive_armo(states, ids, tensors, config):
    """The published formula in plain loops over objectives. states: (T, D) after the norm."""
    begin = max(i for i in range(len(ids)) if list(ids[i : i + 5]) == END)
    x = states[begin]
    for i in range(4):  # three hidden layers
        w, b = (tensors[f"gating.layers.{i}.{kind}"] for kind in ("weight", "bias"))
        x = w @ x + b
        x = x.clamp(min=0) if i < 3 else x
    x = (x / config["gating_temperature"]).exp()
    gate = x / x.sum() * tensors["gating.logit_scale"][0]
    rewards = [row @ states[-1] for row in tensors["regression_layer.weight"]]
    matrix, score = tensors["reward_transform_matrix"], 0.0
    for o in range(len(rewards)):
        adjusted = sum(rewards[i] * matrix[i, o] for i in range(len(rewards)))
        score += gate[o] * adjusted
    return score


@pytest.fixture(scope="module")
def armo(tmp_path_factory):
    """With a reward transform matrix that is no identity, and a gate that takes sides."""
    directory = write_model(tmp_path_factory.mktemp("armo"), ARMO)
    tensors = load_file(directory / "model.safetensors")
    torch.manual_seed(0)
    tensors["reward_transform_matrix"] += 0.5 * torch.randn(5, 5)
    tensors["gating.layers.3.weight"] *= 20
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_armorm_equals_its_formula(armo):
    """Two prompts of which one is a dialogue: the last header counts, also where an answer holds
    most of one; two answers in one trie read the same gate."""
    model, tensors = load(armo), load_file(armo / "model.safetensors")
    prompts = [tokens(1, 2, 3, *END), tokens(7, *END, 9, 9, *END)]
    answers = [[tokens(4, 5), tokens(6, 128009)], [tokens(*END[:4], 3), tokens(8, 1, 1)]]
    with torch.no_grad():
        found = model(row_of(prompts, answers)).view(2, 2)
        for i, prompt in enumerate(prompts):
            for j, answer in enumerate(answers[i]):
                ids = np.concatenate([prompt, answer])
                states = model_states(model, ids)
                expected = naive_armo(states, ids.tolist(), tensors, ARMO)
                assert abs(found[i, j] - expected) < 1e-5 * max(1, abs(expected))
    assert found.unique().numel() == 4


def model_states(model, ids):
    """(T, D) after the final norm, of a plain causal forward in transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{k: v for k, v in ARMO.items() if k != "auto_map"})
    body = transformers.LlamaModel(config).eval()
    ours = {hf_name(model.config.family, n): p for n, p in model.named_parameters()}
    body.load_state_dict({n.removeprefix("model."): p for n, p in ours.items() if "model." in n})
    return body(torch.tensor(ids).long()[None]).last_hidden_state[0]


def test_armorm_without_its_header_says_what_it_needs(armo):
    with pytest.raises(UserError, match="Llama 3 tokenizer and chat template"):
        load(armo)(row_of([tokens(1, 2)], [[tokens(3, 4, 5, 6, 7), tokens(3)]]))


def test_armorm_goes_out_as_it_came_in(armo, tmp_path):
    out = parity.exported(armo, tmp_path / "out")
    raw, _ = read_config(out)
    assert raw["architectures"] == ARMO["architectures"] and raw["auto_map"] == ARMO["auto_map"]
    assert parity.byte_equal(armo) == 0


# ----------------------------------------------------------------------------- OASST's Pythia


@pytest.fixture(scope="module")
def oasst(tmp_path_factory):
    """A tiny one, as published without a chat template."""
    return write_model(tmp_path_factory.mktemp("oasst"), OASST)


def test_oasst_head_equals_a_linear_layer_on_transformers_states(oasst):
    transformers = pytest.importorskip("transformers")
    tensors = load_file(oasst / "model.safetensors")
    body = transformers.GPTNeoXModel(transformers.GPTNeoXConfig(**OASST)).eval()
    body.load_state_dict(
        {n.removeprefix("gpt_neox."): t for n, t in tensors.items() if n.startswith("gpt_neox.")}
    )
    assert tensors["out_proj.bias"].abs() > 1e-3
    sequences = [parity.ids(n, seed=n).numpy().astype(np.int32) for n in (9, 30)]
    found = parity.last_scores(oasst, sequences)
    with torch.no_grad():
        for score, ids in zip(found, sequences, strict=True):
            state = body(torch.tensor(ids).long()[None]).last_hidden_state[0, -1]
            expected = tensors["out_proj.weight"][0] @ state + tensors["out_proj.bias"][0]
            assert abs(score - expected) < 1e-5


def test_oasst_input_is_the_published_one(tmp_path):
    directory = tiny.build(tmp_path, OASST, template=None)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|endoftext|>"
    write_json(directory / "tokenizer_config.json", settings)
    template = Template(directory)
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    text = "<|prompter|>Q<|endoftext|><|assistant|>"
    assert template.render(turns[:1], generation=True) == text
    assert template.answer(turns[:1], "A", closed=False) == "A<|endoftext|>"
    assert template.render(turns) == text + "A<|endoftext|>" and not template.fallback
    answers = [Answer(turns[:1], text) for text in ("A", "something else")]
    scores = evaluate.reward_scores(load(directory), template, answers)
    ids = [template.encode([text + a.text + "<|endoftext|>"])[0] for a in answers]
    assert np.allclose(scores, parity.last_scores(directory, ids).numpy(), atol=1e-5)


def test_mean_pooling_is_refused(tmp_path):
    with pytest.raises(UserError, match="pooling 'mean' is not supported"):
        load(write_model(tmp_path, OASST | {"pooling": "mean"}))


# ----------------------------------------------------------------------------- our own


@pytest.mark.parametrize("name", ["Llama 3", "Mistral 0.1", "Qwen2", "Qwen3", "Gemma 2", "Pythia"])
def test_an_exported_reward_model_loads_in_transformers(name, tmp_path):
    """As --loss reward makes it: a language model's body under a new head, trained here."""
    pytest.importorskip("transformers")
    source = write_model(tmp_path / "lm", parity.CONFIGS[name] | {"dtype": "float32"})
    model = Transformer(config_of(parity.as_reward(parity.CONFIGS[name])))
    load_weights(model, source)
    assert not model.score.weight.any()
    torch.nn.init.normal_(model.score.weight)
    named = ((n, p.detach()) for n, p in model.named_parameters())
    model_file.export(tmp_path / "rm", model.config, named, source, torch.float32)
    assert parity.reward(tmp_path / "rm") <= 1e-4
