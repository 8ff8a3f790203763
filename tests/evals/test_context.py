"""IFSR's analyses equal transformers' on dialogues that its own template renders, path by path."""

import json
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from contexts import EVERY, INSTRUCTION, Peer

import evaluate
from conftest import PAIRS, write_model
from evals import context as analysis
from evals.context import Views, separated, token_statistics
from generate import load_model
from hub.template import INSTRUCTIONS, Template
from pairs.read import Drops, read_pairs


@pytest.fixture(scope="module")
def pairs(pairs_file):
    return read_pairs(str(pairs_file), Drops(), limit=5)


@pytest.fixture(scope="module")
def peer(tiny_model_dir):
    return Peer(tiny_model_dir)


@pytest.fixture
def command(ended):
    """command(*words) runs evaluate.py in this process -> (stdout, stderr, exit status)."""
    return partial(ended, evaluate)


# ----------------------------------------------------------------------------- contexts


def test_what_each_context_says(tiny_model_dir, pairs):
    """Decoded, the paths are the dialogues of the papers."""
    template = Template(tiny_model_dir)
    contexts = EVERY | separated(template, sep="§")
    views = Views(pairs, template, contexts, max_len=2048)
    row, texts = PAIRS[0], {}
    for name, (segments, n) in zip(contexts, views[0].paths, strict=True):
        texts[name] = template.decode(np.concatenate(segments[:-1]), skip_special=False)
        assert template.decode(segments[-1], skip_special=False) == row["chosen"] + "<|im_end|>"
        assert n == len(segments[-1])
    question, opening = f"<|im_start|>user\n{row['prompt']}", "<|im_end|>\n<|im_start|>assistant\n"
    assert texts["x"] == question + opening
    for sign, key in INSTRUCTION.items():
        instruction = INSTRUCTIONS[key]
        assert texts[f"x,i{sign}"] == f"{question}\n{instruction}{opening}"
        turn = f"<|im_end|>\n<|im_start|>user\n{instruction}{opening}"
        assert texts[f"x,ỹ,i{sign}"] == question + opening + row["rejected"] + turn
    for sep in ("\n\n", "§"):
        between = sep + row["rejected"] + sep
        assert texts[f"x,sep,ỹ,sep; sep {sep!r}"] == question + opening + between
    assert texts["x,ỹ"] == question + opening + row["rejected"]


def test_loss_and_variance_equal_transformers_path_by_path(tiny_model_dir, pairs, peer):
    model, template = load_model(str(tiny_model_dir))
    views = Views(pairs, template, EVERY, max_len=2048)
    found = token_statistics(model, views, row_tokens=1500)
    loss, variance, over_vocabulary = found.values()
    assert list(found) == ["loss", "variance", "over vocabulary"]
    for n, row in enumerate(PAIRS[:5]):
        for p, context in enumerate(EVERY):
            losses = peer.losses(*peer.ids(row, context))
            assert loss[n, p] == pytest.approx(losses.mean(), abs=1e-4)
            assert variance[n, p] == pytest.approx(np.exp(-losses).var(), rel=1e-3)
            spread = peer.probabilities(*peer.ids(row, context)).var(1).mean()
            assert over_vocabulary[n, p] == pytest.approx(spread, rel=1e-3)
    assert np.ptp(loss[0]) > 1e-3  # the contexts do differ


def test_long_pairs_are_left_out_and_counted(tiny_model_dir, pairs):
    """The longest path decides, not the plain one."""
    template = Template(tiny_model_dir)
    everything = Views(pairs, template, EVERY, max_len=2048)
    longest = [max(sum(map(len, s)) for s, _ in view.paths) for view in everything]
    limit = sorted(longest)[2]
    views = Views(pairs, template, EVERY, max_len=limit)
    assert [view.where for view in views] == [
        p.where for p, size in zip(pairs, longest, strict=True) if size <= limit
    ]
    assert len(views) == 3 and f"2 over --max_len {limit}" in str(views.drops)
    same = next(view for view in everything if view.where == views[1].where)
    assert str(views[1].paths) == str(same.paths)


def test_context_command(tiny_model_dir, pairs_file, command, tmp_path):
    out = tmp_path / "deep" / "context.json"
    words = ["--model", tiny_model_dir, "--data", pairs_file, "--limit", 4, "--sep", "§"]
    printed, _, status = command("context", *words, "--out", out)
    results = json.loads(out.read_text())
    assert status == 0 and results["n"] == len(results["pairs"]) == 4
    assert results["tokens"] == [len(row["chosen"]) + 1 for row in PAIRS[:4]]
    x, refined = results["contexts"]["x"], results["contexts"]["x,ỹ,i↑"]
    assert x["loss - x"] == [0, 0, 0]
    assert x["loss"][0] == pytest.approx(np.mean(x["losses"]))
    paired = np.subtract(refined["losses"], x["losses"])
    assert refined["loss - x"][0] == pytest.approx(paired.mean())
    assert "x,ỹ,i↑  " in printed and f"{x['loss'][0]:.3f} [" in printed
    assert list(results["contexts"]) == [*EVERY, *separated(Template(tiny_model_dir), "§")]


# ----------------------------------------------------------------------------- next token


@pytest.mark.parametrize("draft", [False, True])
def test_next_token_equals_transformers(tiny_model_dir, pairs_file, peer, command, tmp_path, draft):
    out = tmp_path / "next.json"
    words = ["--model", tiny_model_dir, "--data", pairs_file, "--limit", 3, "--top", 4]
    words += ["--prefix", "Well", "--out", out, *(["--draft"] if draft else [])]
    printed, _, status = command("next_token", *words)
    results = json.loads(out.read_text())
    names = ["x", "x,ỹ,i↑", "x,ỹ,i⁰", "x,ỹ,i↓"] if draft else ["x", "x,i↑", "x,i⁰", "x,i↓"]
    assert status == 0 and set(results["contexts"]) == set(names)
    prefix, measured = peer.tokenizer("Well")["input_ids"], []
    for row, found in zip(PAIRS[:3], results["pairs"], strict=True):
        p = {c: peer.run(peer.ids(row, c)[0] + prefix).logits[0, -1].softmax(-1) for c in names}
        for name in names:
            values, ids = p[name].topk(4)
            texts = [peer.tokenizer.decode([i]) for i in ids]
            assert [text for text, _ in found["top"][name]] == texts
            assert [v for _, v in found["top"][name]] == pytest.approx(values.tolist(), abs=1e-5)
        measured.append([(p[c] - p["x"]).abs().sum().item() / 2 for c in names])
        entropy = -(p["x"] * p["x"].log()).sum().item()
    for name, distance in zip(names, np.mean(measured, 0), strict=True):
        assert results["contexts"][name]["distance"][0] == pytest.approx(distance, abs=1e-5)
    low, high = results["contexts"]["x"]["entropy"][1:]
    assert low - 1e-4 <= entropy <= high + 1e-4
    assert printed.count(f"\n{pairs_file}:") == 1  # --show 1
    assert results["pairs"][0]["pair"] == f"{pairs_file}:1"


def test_the_parts_of_a_prompt_for_two_models(tiny_model_dir, pairs_file, peer, command, tmp_path):
    """IFSR's Table 7: behind x, x,i, x,ỹ,i and x,ỹ, each model by its own tokenizer."""
    other = write_model(tmp_path / "other", tiny.LLAMA, seed=1)
    out, data = tmp_path / "next.json", ["--data", pairs_file, "--limit", 2, "--prefix", "A fence"]
    words = ["--model", tiny_model_dir, "--ref", other, "--parts", *data, "--out", out]
    printed, error, status = command("next_token", *words)
    assert status == 0, error
    results, names = json.loads(out.read_text()), ["x", "x,i↑", "x,ỹ,i↑", "x,ỹ"]
    assert (results["model"], results["ref"]["model"]) == (str(tiny_model_dir), str(other))
    assert list(results["contexts"]) == list(results["ref"]["contexts"]) == names
    assert printed.count(": entropy in nats") == 2
    row, prefix = PAIRS[0], peer.tokenizer("A fence")["input_ids"]
    before = peer.ids(row, "x")[0] + peer.tokenizer(row["rejected"])["input_ids"]
    for found, judge in ((results, peer), (results["ref"], Peer(other))):
        p = judge.run(before + prefix).logits[0, -1].softmax(-1)
        top = [value for _, value in found["pairs"][0]["top"]["x,ỹ"]]
        assert top == pytest.approx(p.topk(10).values.tolist(), abs=1e-5)


def test_entropy_and_distance_by_hand():
    """Uniform over four: ln 4; a certain token: 0, and 3/4 away from uniform."""
    logps = torch.log(torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]))
    entropy, distance = analysis.spread(logps)
    assert entropy == pytest.approx([np.log(4), 0])
    assert distance == pytest.approx([0, 0.75])


@pytest.mark.parametrize(
    "words, message",
    [
        (["context"], "--model, --data are missing"),
        (["next_token", "--model", "LM"], "--data is missing"),
        (["context", "--model", "LM", "--data", "PAIRS", "--max_len", "9"], "24 over --max_len 9"),
        (["context", "--model", "LM", "--data", "PAIRS", "--sep", "<|im_end|>"], "choose another"),
    ],
)
def test_errors_are_one_line(command, tiny_model_dir, pairs_file, words, message):
    places = {"LM": tiny_model_dir, "PAIRS": pairs_file}
    _, error, status = command(*[places.get(word, word) for word in words])
    last = error.strip().splitlines()[-1]
    assert status == 2 and message in last and last.startswith("error: ")
