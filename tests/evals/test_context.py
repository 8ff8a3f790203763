"""IFSR's analyses equal transformers' on dialogues that its own template renders, path by path."""

import json
from functools import partial

import numpy as np
import pytest
import tiny
import torch

import evaluate
from conftest import PAIRS, write_model
from evals import context as analysis
from evals.attention import MEASURES, PROMPT_PARTS, Watched, attention_statistics
from evals.context import INSTRUCTED, SHOWN, Views, separated, token_statistics
from generate import load_model
from hub.template import INSTRUCTIONS, Template
from model import masked_attention, visible
from pairs.read import Drops, read_pairs

INSTRUCTION = {"↑": "better", "⁰": "another", "↓": "worse"}
EVERY = INSTRUCTED | SHOWN


def user(text):
    return {"role": "user", "content": text}


def asked(row, context):
    """The dialogue of a pair under one context, up to the chosen answer."""
    instruction = INSTRUCTIONS.get(INSTRUCTION.get(context[-1]))
    if "ỹ" in context:
        draft = {"role": "assistant", "content": row["rejected"]}
        return [user(row["prompt"]), draft, user(instruction)]
    return [user(row["prompt"] + ("\n" + instruction if instruction else ""))]


class Peer:
    """transformers' model and tokenizer of a directory: ids of a context, and what follows it."""

    def __init__(self, directory):
        transformers = pytest.importorskip("transformers")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def ids(self, row, context):
        """(ids up to the answer, ids of the answer and its end)."""
        text = self.tokenizer.apply_chat_template(
            asked(row, context), tokenize=False, add_generation_prompt=True
        )
        answer = row["chosen"] + "<|im_end|>"
        both = [self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, answer)]
        return both

    @torch.no_grad()
    def run(self, ids, **options):
        return self.model(torch.tensor([ids]), **options)

    def losses(self, context, answer):
        """(T,) loss of each token of the answer."""
        logps = self.run(context + answer).logits[0].log_softmax(-1)
        steps = zip(range(len(context) - 1, len(context + answer) - 1), answer, strict=True)
        return np.array([-logps[p, token].item() for p, token in steps])


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
    for name, (segments, n) in zip(contexts, views.paths(0), strict=True):
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
    loss, variance = token_statistics(model, views, row_tokens=1500)
    for n, row in enumerate(PAIRS[:5]):
        for p, context in enumerate(EVERY):
            losses = peer.losses(*peer.ids(row, context))
            assert loss[n, p] == pytest.approx(losses.mean(), abs=1e-4)
            assert variance[n, p] == pytest.approx(np.exp(-losses).var(), rel=1e-3)
    assert np.ptp(loss[0]) > 1e-3  # the contexts do differ


def test_long_pairs_are_left_out_and_counted(tiny_model_dir, pairs):
    """The longest path decides, not the plain one."""
    template = Template(tiny_model_dir)
    everything = Views(pairs, template, EVERY, max_len=2048)
    longest = [max(sum(map(len, s)) for s, _ in everything.paths(n)) for n in range(5)]
    limit = sorted(longest)[2]
    views = Views(pairs, template, EVERY, max_len=limit)
    assert views.where() == [
        p.where for p, size in zip(pairs, longest, strict=True) if size <= limit
    ]
    assert len(views) == 3 and f"2 over --max_len {limit}" in views.report()
    assert str(views.paths(1)) == str(everything.paths(everything.where().index(views.where()[1])))


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


def test_entropy_and_distance_by_hand():
    """Uniform over four: ln 4; a certain token: 0, and 3/4 away from uniform."""
    logps = torch.log(torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]))
    entropy, distance = analysis.spread(logps)
    assert entropy == pytest.approx([np.log(4), 0])
    assert distance == pytest.approx([0, 0.75])


# ----------------------------------------------------------------------------- attention


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
    found = attention_statistics(model, views, "")
    for n, row in enumerate(PAIRS[:2]):
        for p, context in enumerate(CONTEXTS):
            expected = attention_by_hand(peer, row, context, template)
            np.testing.assert_allclose(found[n, p], expected, rtol=2e-3, atol=1e-6)
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
    for name, (segments, _), spans in zip(EVERY, views.paths(2), views.spans(2), strict=True):
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
    assert len(results["layers"]["after"]["x,i"]["skewness"]["i"]) == 2  # layers
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "change" in printed
    printed, _, status = command("attention", *words, "--instruction", "shorter!")
    assert status == 0 and "change" not in printed and "before" not in printed


@pytest.mark.parametrize(
    "words, message",
    [
        (["context"], "--model is missing"),
        (["next_token", "--model", "LM"], "--data is missing"),
        (["attention", "--model", "LM", "--data", "PAIRS", "--ref", "no-dir"], "no-dir"),
        (["attention", "--model", "LM", "--data", "PAIRS", "--out", "a.png"], "name the json file"),
        (["context", "--model", "LM", "--data", "PAIRS", "--max_len", "9"], "24 over --max_len 9"),
        (["context", "--model", "LM", "--data", "PAIRS", "--sep", "<|im_end|>"], "choose another"),
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
    found = attention_statistics(model, views, "")[0, 1, :, :, 0]  # (L, parts)
    segments, _ = views.paths(0)[1]
    ids, spans, peer = np.concatenate(segments).tolist(), views.spans(0)[1], Peer(smollm2)
    queries = slice(spans["y+"][0] - 1, spans["y+"][1] - 1)
    for layer, weights in enumerate(peer.run(ids, output_attentions=True).attentions):
        for part, (a, b) in spans.items():
            mass = weights[0, :, queries, a:b].sum(-1).mean().item()
            assert found[layer, PROMPT_PARTS.index(part)] == pytest.approx(mass, abs=1e-4)
