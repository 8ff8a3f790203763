"""Attention over the parts of a prompt equals transformers' attention matrices, in plain loops."""

import json
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from contexts import EVERY, Peer
from matplotlib.figure import Figure

import evaluate
from conftest import PAIRS, write_model
from evals.attention import (
    MEASURES,
    PROMPT_PARTS,
    Watched,
    attention_statistics,
    draw_layers,
)
from evals.context import Views
from generate import load_model
from hub.template import Template
from model import masked_attention, visible
from pairs.read import Drops, read_pairs


@pytest.fixture(scope="module")
def pairs(pairs_file):
    return read_pairs(str(pairs_file), Drops(), limit=5)


@pytest.fixture
def command(ended):
    """command(*words) runs evaluate.py in this process -> (stdout, stderr, exit status)."""
    return partial(ended, evaluate)


def attention_by_hand(peer, row, context, template):
    """(L, parts, measures) of one path from transformers' attention matrices, in plain loops."""
    before, answer = peer.ids(row, context)
    x = len(peer.ids(row, "x")[0])
    if "ỹ" in context:
        starts = {"x": 1, "ỹ": x, "i": x + len(row["rejected"]) + 1, "y+": len(before)}
    else:
        starts = {"x": 1, "i": len(f"<|>user\n{row['prompt']}") - 2, "y+": len(before)}
    starts = {"first": 0} | starts
    ends = dict(zip(starts, [*list(starts.values())[1:], len(before + answer)], strict=True))
    found = []
    for layer in peer.run(before + answer, output_attentions=True).attentions:
        heads = layer[0].double().numpy()
        parts = np.full((len(PROMPT_PARTS), len(MEASURES)), np.nan)
        for part, start in starts.items():
            values = []
            for head in heads:
                for query in range(len(before) - 1, len(before + answer) - 1):
                    a = head[query, start : ends[part]]
                    d = a - a.mean()
                    moment = (d**3).mean() / a.std() ** 3 if a.std() > 0 else np.nan
                    values.append((a.sum(), a.var(), moment))
            parts[PROMPT_PARTS.index(part)] = np.nanmean(values, 0)
            if part in ("first", "y+"):
                parts[PROMPT_PARTS.index(part), 1:] = np.nan
        found.append(parts)
    return np.array(found)


CONTEXTS = {"x,i↑": EVERY["x,i↑"], "x,ỹ,i↑": EVERY["x,ỹ,i↑"]}


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.MISTRAL], ids=["full", "window"])
def test_attention_equals_transformers(config, pairs, tmp_path):
    directory = write_model(tmp_path, config)
    model, template = load_model(str(directory))
    peer, views = Peer(directory), Views(pairs[:2], template, CONTEXTS, max_len=2048)
    columns, last = attention_statistics(model, views, "")
    found = [[[columns[c, m, part] for m in MEASURES] for part in PROMPT_PARTS] for c in CONTEXTS]
    found = np.array(found).transpose(3, 0, 4, 1, 2)  # (N, P, L, parts, measures)
    for n, row in enumerate(PAIRS[:2]):
        for p, context in enumerate(CONTEXTS):
            expected = attention_by_hand(peer, row, context, template)
            np.testing.assert_allclose(found[n, p], expected, rtol=2e-3, atol=1e-6)
            before, answer = peer.ids(row, context)  # the last layer, from the last query
            attentions = peer.run(before + answer, output_attentions=True).attentions
            weights = attentions[-1][0, :, len(before) - 1, : len(before)].double().mean(0).numpy()
            np.testing.assert_allclose(last[context][n], weights, rtol=2e-3, atol=1e-6)
            away = weights - weights.mean()
            moments = weights.var(), (away**3).mean() / weights.std() ** 3
            own = [columns[context, m, "prompt"][n, 0] for m in ("variance", "skewness")]
            np.testing.assert_allclose(own, moments, rtol=1e-2)
    np.testing.assert_allclose(np.nansum(found[..., 0], -1), 1, atol=1e-6)  # the parts are all


def test_a_watched_rule_gives_its_weights():
    """More keys than a head is wide, grouped heads, a mask; and the rule's own output."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 11, 4, generator=generator) for h in (4, 2, 2))
    mask = visible(torch.tensor([11] * 5 + [8] * 3 + [11] * 3), torch.arange(11))
    rule = Watched(partial(masked_attention, mask=mask), torch.tensor([7, 10]))
    torch.testing.assert_close(rule(q, k, v), masked_attention(q, k, v, mask))
    scores = q @ k.repeat_interleave(2, 1).mT / 2
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    torch.testing.assert_close(rule.weights, weights[0][:, [7, 10]])


def test_parts_of_a_prompt(tiny_model_dir, pairs):
    template = Template(tiny_model_dir)
    views, row, texts = Views(pairs, template, EVERY, 2048), PAIRS[2], {}
    for name, (segments, _), spans in zip(EVERY, views[2].paths, views[2].spans, strict=True):
        ids = np.concatenate(segments)
        texts[name] = {
            k: template.decode(ids[a:b], skip_special=False) for k, (a, b) in spans.items()
        }
        assert "".join(texts[name].values()) == template.decode(ids, skip_special=False)
    answer, opening = row["chosen"] + "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n"
    asked, instruction = f"user\n{row['prompt']}", "please generate a better response"
    first = {"first": "<|im_start|>"}
    assert texts["x"] == first | {"x": asked + opening, "y+": answer}
    assert texts["x,i↑"] == first | {"x": asked, "i": f"\n{instruction}{opening}", "y+": answer}
    draft, turn = row["rejected"] + "<|im_end|>", f"\n<|im_start|>user\n{instruction}{opening}"
    assert texts["x,ỹ,i↑"] == first | {"x": asked + opening, "ỹ": draft, "i": turn, "y+": answer}


def test_attention_command(tiny_model_dir, pairs_file, command, tmp_path):
    """A model against itself: every change is nothing; the figure is drawn."""
    out = tmp_path / "attention.json"
    words = ["--model", tiny_model_dir, "--data", pairs_file, "--limit", 3, "--out", out]
    printed, _, status = command("attention", *words, "--ref", tiny_model_dir)
    results = json.loads(out.read_text())
    assert status == 0 and all(mean["change"] == [0, 0, 0] for mean in results["means"])
    masses = [m["after"][0] for m in results["means"]
              if (m["context"], m["measure"]) == ("x,ỹ,i", "mass")]  # fmt: skip
    assert len(masses) == 5 and sum(masses) == pytest.approx(1)
    assert results["layers"]["before"] == results["layers"]["after"]
    layers = results["layers"]["after"]
    assert len(layers["x,i skewness i"]) == 2
    assert len({*layers["x,i skewness prompt"]}) == 1  # of the last layer alone
    for context, weights in results["last_query"]["after"].items():
        texts = results["prompts"][context]
        assert [*map(len, texts)] == [*map(len, weights)] and len(texts) == 3
        assert all(sum(row) == pytest.approx(1) for row in weights)
        assert texts[0][0] == "<|im_start|>" and "".join(texts[0]).endswith("assistant\n")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "change" in printed
    printed, _, status = command("attention", *words, "--instruction", "shorter!")
    assert status == 0 and "change" not in printed and "before" not in printed


def test_layers_are_whole_numbers_and_one_legend_names_every_line(tmp_path, monkeypatch):
    drawn, values = [], np.full((2, 4), 0.5)
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **look: drawn.append(figure))
    of = {("x,i", "mass", part): values for part in ("x", "i")}
    draw_layers({"before": of, "after": of}, ["x,i"], tmp_path / "a.png")
    ticks = drawn[0].axes[0].get_xticks()
    assert len(ticks) >= 4 and all(tick == int(tick) for tick in ticks)
    assert not any(axis.get_legend() for axis in drawn[0].axes)
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert texts == ["x before", "x after", "i before", "i after"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["attention", "--model", "LM", "--data", "PAIRS", "--ref", "no-dir"], "no-dir"),
        (["attention", "--model", "LM", "--data", "PAIRS", "--out", "a.png"], "name the json file"),
    ],
)
def test_errors_are_one_line(command, tiny_model_dir, pairs_file, words, message):
    places = {"LM": tiny_model_dir, "PAIRS": pairs_file}
    _, error, status = command(*[places.get(word, word) for word in words])
    last = error.strip().splitlines()[-1]
    assert status == 2 and message in last and last.startswith("error: ")


@pytest.mark.slow
def test_attention_of_a_real_model_equals_transformers(smollm2, hh_file):
    """SmolLM2 on one pair: the mass of ỹ and of the first token, layer by layer."""
    model, template = load_model(str(smollm2))
    views = Views(read_pairs(str(hh_file), Drops(), 1), template, CONTEXTS, max_len=2048)
    found, _ = attention_statistics(model, views, "")
    segments, _ = views[0].paths[1]
    ids, spans, peer = np.concatenate(segments).tolist(), views[0].spans[1], Peer(smollm2)
    queries = slice(spans["y+"][0] - 1, spans["y+"][1] - 1)
    for layer, weights in enumerate(peer.run(ids, output_attentions=True).attentions):
        for part, (a, b) in spans.items():
            mass = weights[0, :, queries, a:b].sum(-1).mean().item()
            assert found["x,ỹ,i↑", "mass", part][0, layer] == pytest.approx(mass, abs=1e-4)
