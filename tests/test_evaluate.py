"""Scores equal transformers', intervals the textbook's, margins and win rates those by hand."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from dialogues import say

import evaluate
from assets import world
from conftest import PAIRS, write_model
from evals.answers import Answer
from evals.world import world_probabilities
from evaluate import open_scores, reward_scores
from evaluate import path_sums as real
from generate import load_model
from hub.template import Template
from jobs.cli import UserError
from model import load
from pairs.read import Drops, read_pairs

ROOT = Path(__file__).parent.parent


ANSWERS = [Answer(say("q" * (i + 1)), "an answer of some length"[: 3 * i + 1]) for i in range(7)]


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("reward"), tiny.REWARD)


@pytest.fixture(scope="module")
def start_dir(tmp_path_factory):
    """Another language model of the same vocabulary."""
    return write_model(tmp_path_factory.mktemp("start"), tiny.LLAMA, seed=1)


# ----------------------------------------------------------------------------- reward


def peer_scores(directory, template, pad_token_id):
    """transformers' scores, one answer at a time, of what we would render."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, num_labels=1
    )
    peer.config.pad_token_id = pad_token_id
    scores = []
    for prompt, text, *_ in ANSWERS:
        whole = template.render([*prompt, {"role": "assistant", "content": text}])
        ids = torch.tensor(template.encode([whole])[0].tolist())[None]
        scores.append(peer(ids).logits[0, 0].item())
    return scores


def test_reward_scores_equal_transformers(reward_dir):
    template = Template(reward_dir)
    scores = reward_scores(load(reward_dir), template, ANSWERS)
    expected = peer_scores(reward_dir, template, pad_token_id=258)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(scores) > 0.01


def test_both_readings_where_the_template_ends_with_the_padding_id(tmp_path):
    """ "last" is the end token, as trained; transformers' reading is the token before it."""
    no_newline = tiny.CHATML.replace("<|im_end|>\\n", "<|im_end|>")
    directory = write_model(tmp_path, tiny.REWARD)
    (directory / "chat_template.jinja").write_text(no_newline)
    model, template = load(directory), Template(directory)
    last = reward_scores(model, template, ANSWERS)
    not_pad = reward_scores(model, template, ANSWERS, "not_pad")
    expected = {pad: peer_scores(directory, template, pad) for pad in (None, 258)}
    np.testing.assert_allclose(last, expected[None], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(not_pad, expected[258], rtol=1e-4, atol=1e-5)
    assert np.abs(last - not_pad).max() > 0.01


def test_scores_do_not_depend_on_the_rows(reward_dir):
    model, template = load(reward_dir), Template(reward_dir)
    scores = [reward_scores(model, template, ANSWERS, row_tokens=n) for n in (1, 100, 10_000)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    np.testing.assert_allclose(scores[0], scores[2], atol=1e-5)


# ----------------------------------------------------------------------------- pairs


def sum_of_logps(model, context, target):
    """log pi(target | context) and its tokens, from the logits of the plain causal model."""
    logps = model.logits(torch.tensor([[*context, *target]]))[0].log_softmax(-1)
    place = range(len(context) - 1, len(context) + len(target) - 1)
    return sum(logps[p, t].item() for p, t in zip(place, target, strict=True)), len(target)


def margins_by_hand(policy, reference, template, row, beta, bridge, unscored=0):
    """{reading: margin} of one pair: texts joined here, by the formulas of the papers.

    unscored: how many tokens at the end of an answer are left out.
    """
    x = template.encode([template.render(say(row["prompt"]), generation=True)])[0].tolist()
    texts = [row["chosen"] + "<|im_end|>", row["rejected"] + "<|im_end|>"]
    w, l = (ids.tolist() for ids in template.encode(texts))
    turn = "\n<|im_start|>user\nplease generate a better response<|im_end|>\n"
    turn, sep = template.encode([turn + "<|im_start|>assistant\n", "\n\n"])
    if bridge == "turn":
        x_l, x_w = [*x, *l, *turn], [*x, *w, *turn]
    else:
        x_l, x_w = [*x, *sep, *l[:-1], *sep], [*x, *sep, *w[:-1], *sep]

    def ratio(target, context, ref_context):
        target = target[: len(target) - unscored]
        total, n = sum_of_logps(policy, context, target)
        if reference is None:
            return total / n
        return total - sum_of_logps(reference, ref_context, target)[0]

    readings = {
        "plain": ratio(w, x, x) - ratio(l, x, x),
        "cross, plain reference": ratio(w, x_l, x) - ratio(l, x_w, x),
        "cross, same paths": ratio(w, x_l, x_l) - ratio(l, x_w, x_w),
    }
    return {name: beta * value for name, value in readings.items()}


@pytest.fixture
def pairs_of(tiny_model_dir, start_dir, pairs_file, tmp_path):
    """pairs_of(**flags) runs `evaluate.py pairs` on six pairs -> its JSON output."""

    def go(**flags):
        flags = {"model": tiny_model_dir, "ref": start_dir, "data": pairs_file, "limit": 6} | flags
        out = tmp_path / "out.json"
        words = [f"--{k}={v}" for k, v in flags.items() if v is not None]
        settings = evaluate.parse(evaluate.PairsFlags, "", [*words, f"--out={out}"])
        evaluate.evaluate_pairs(settings)
        return json.loads(out.read_text())

    return go


@pytest.mark.parametrize("loss, bridge", [("ins_dpo", "sep"), ("ifsr_dpo", "turn")])
def test_margins_by_hand(pairs_of, tiny_model_dir, start_dir, loss, bridge):
    results = pairs_of(loss=loss, beta=0.2)
    policy, reference = load(tiny_model_dir), load(start_dir)
    template = Template(tiny_model_dir)
    rows = [margins_by_hand(policy, reference, template, r, 0.2, bridge) for r in PAIRS[:6]]
    for name in rows[0]:
        expected = np.array([row[name] for row in rows])
        found = results[name]
        np.testing.assert_allclose(found["margins"], expected, atol=1e-4)
        assert found["accuracy"][0] == pytest.approx((expected > 0).mean())
        assert found["margin"][0] == pytest.approx(expected.mean(), abs=1e-4)


def test_margins_without_a_reference(pairs_of, tiny_model_dir):
    """SimPO's implicit reward: beta times the mean log-probability."""
    results = pairs_of(loss="simpo", ref=None, bridge="turn")
    policy, template = load(tiny_model_dir), Template(tiny_model_dir)
    rows = [margins_by_hand(policy, None, template, r, 2.0, "turn") for r in PAIRS[:6]]
    for name, ours in (("plain", "plain"), ("cross, same paths", "cross")):
        expected = [row[name] for row in rows]
        np.testing.assert_allclose(results[ours]["margins"], expected, atol=1e-4)


@pytest.mark.parametrize("loss, ref", [("ins_dpo", "start"), ("simpo", None)])
def test_without_score_eos_the_end_token_is_neither_scored_nor_counted(
    pairs_of, tiny_model_dir, start_dir, loss, ref
):
    """As a model is to be read that was trained with --no-score_eos; simpo divides by the count."""
    results = pairs_of(loss=loss, bridge="turn", ref=ref and start_dir, score_eos=False)
    policy, template = load(tiny_model_dir), Template(tiny_model_dir)
    beta, reference = (0.1, load(start_dir)) if ref else (2.0, None)
    rest = (template, PAIRS[0], beta, "turn")
    for name, unscored, same in (("plain", 1, True), ("plain", 0, False)):
        expected = margins_by_hand(policy, reference, *rest, unscored)[name]
        assert (abs(results[name]["margins"][0] - expected) < 1e-4) == same


def test_a_model_against_itself_has_no_margin(pairs_of, tiny_model_dir):
    results = pairs_of(ref=tiny_model_dir, loss="ipo")
    assert results["plain"]["margin"] == results["cross, same paths"]["margin"] == [0, 0, 0]
    assert results["plain"]["accuracy"][0] == 0  # a tie is no win
    assert results["cross, plain reference"]["margin"][0] != 0


# ----------------------------------------------------------------------------- world


def test_world_probabilities_are_those_of_the_whole_sequences(start_dir, monkeypatch):
    """One number of (Q, A), and one of (Q, A, A) behind each bridge, from the plain logits."""
    two = world.questions()[:2]
    monkeypatch.setattr(world, "questions", lambda: two)
    model, template = load_model(str(start_dir))
    question = world.questions()[1]
    texts = [text + "<|im_end|>" for text in world.answers(question)]
    y = [ids.tolist() for ids in template.encode(texts)]
    x = template.encode([template.render(say(question), generation=True)])[0].tolist()
    turn, sep = template.encode([template.turn("please generate a better response"), "\n\n"])
    contexts = {None: x, "turn": [*x, *y[9], *turn], "sep": [*x, *sep, *y[9][:-1], *sep]}
    for bridge, context in contexts.items():
        policy = world_probabilities(model, template, bridge)
        found = policy[1, 9, 5] if bridge else policy[1, 5]
        assert policy.shape == ((2, 16, 16) if bridge else (2, 16))
        assert np.log(found) == pytest.approx(sum_of_logps(model, context, y[5])[0], abs=1e-3)


# ----------------------------------------------------------------------------- the command


@pytest.fixture
def command(ended):
    """command(*words) runs evaluate.py in this process -> (stdout, stderr, exit status)."""
    return partial(ended, evaluate)


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def files(tmp_path):
    """Answers as generate.py writes them, and AlpacaEval's to the same prompts, in reverse."""
    ours = [{"prompt": say(f"q{i}?"), "answer": f"a{i}", "mode": "plain"} for i in range(5)]
    theirs = [{"instruction": f"q{i}?", "output": f"b{i}"} for i in reversed(range(5))]
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    return write_rows(tmp_path / "ours.jsonl", ours), tmp_path / "theirs.json"


def test_reward_command(reward_dir, files, tmp_path):
    """As a script. Scores, win rate and difference agree with reward_scores on joined prompts."""
    out = tmp_path / "deep" / "out.json"
    words = ["reward", "--model", reward_dir, "--answers", files[0], "--against", files[1]]
    script = [sys.executable, ROOT / "evaluate.py", *words, "--out", out]
    done = subprocess.run(list(map(str, script)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    model, template = load(reward_dir), Template(reward_dir)
    ours, theirs = (
        reward_scores(model, template, [Answer(say(f"q{i}?"), f"{a}{i}") for i in range(5)])
        for a in "ab"
    )
    results = json.loads(out.read_text())
    np.testing.assert_allclose(results["answers"]["scores"], ours, atol=1e-5)
    np.testing.assert_allclose(results["against"]["scores"], theirs, atol=1e-5)
    assert results["win_rate"][0] == (ours > theirs).mean() and results["ties"] == 0
    assert results["difference"][0] == pytest.approx((ours - theirs).mean(), abs=1e-5)
    assert f"{files[0]}: 5 answers, reward {ours.mean():.4f} [" in done.stdout
    assert f"win rate {(ours > theirs).mean():.1%} [" in done.stdout


def test_the_same_answers_tie(reward_dir, files, command):
    out, _, status = command("reward", "--model", reward_dir, "--answers", files[0],
                             "--against", files[0], "--limit", 3)  # fmt: skip
    assert status == 0 and "win rate 0.0% [0.0%, 0.0%], 3 ties" in out


def test_accuracy_on_pairs_by_subset(reward_dir, command, tmp_path):
    """The chosen answer is the rejected one (a tie), or other text; two subsets and their mean."""
    rows = [
        {"prompt": f"q{i}?", "chosen": f"c{i}", "rejected": f"c{i}" if i % 3 == 0 else f"r{i}x",
         "subset": "easy" if i < 4 else "hard"} for i in range(9)
    ]  # fmt: skip
    rows.append({"prompt": "q?", "chosen": "c", "rejected": "  "})
    file, out = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out.json"
    said, _, status = command("reward", "--model", reward_dir, "--pairs", file, "--out", out)
    assert status == 0 and "9 pairs read, dropped: 1 empty answer" in said
    results = json.loads(out.read_text())
    model, template = load(reward_dir), Template(reward_dir)
    sides = [Answer(say(r["prompt"]), r[k]) for k in ("chosen", "rejected") for r in rows[:9]]
    chosen, rejected = np.split(reward_scores(model, template, sides), 2)
    wins = chosen > rejected
    assert results["ties"] == 3 and results["win_rate"][0] == pytest.approx(wins.mean())
    assert results["subsets"]["easy"]["win_rate"][0] == pytest.approx(wins[:4].mean())
    assert (results["subsets"]["hard"]["n"], results["subsets"]["hard"]["ties"]) == (5, 1)
    mean = (wins[:4].mean() + wins[4:].mean()) / 2
    assert f"mean of the subsets {mean:.1%}" in " ".join(said.split())


def test_win_rate_against_the_chosen_answers(reward_dir, command, tmp_path):
    """A pair file serves as --against; the model that gives the chosen answers ties with them."""
    answers = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in PAIRS[:5]]
    files = write_rows(tmp_path / "a.jsonl", answers), write_rows(tmp_path / "p.jsonl", PAIRS[:5])
    words = ["--answers", files[0], "--against", files[1]]
    out, _, status = command("reward", "--model", reward_dir, *words)
    assert status == 0 and "win rate 0.0% [0.0%, 0.0%], 5 ties" in out


def test_cached_scores(reward_dir, tmp_path, monkeypatch):
    """Only new answers are scored again, also after a line was cut; other weights have others."""
    model, template = load(reward_dir), Template(reward_dir)
    expected, asked = reward_scores(model, template, ANSWERS), []
    monkeypatch.setattr(evaluate, "path_sums", lambda *a: asked.append(len(a[2])) or real(*a))

    def scores(answers):
        cache = open_scores(tmp_path, model, reward_dir)
        return reward_scores(model, template, answers, cache=cache)

    np.testing.assert_allclose(scores(ANSWERS[:4]), expected[:4], atol=1e-5)
    np.testing.assert_allclose(scores(ANSWERS), expected, atol=1e-5)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-5])
    np.testing.assert_allclose(scores(ANSWERS), expected, atol=1e-5)
    assert scores(ANSWERS).tolist() == scores(ANSWERS).tolist() and asked == [4, 3, 1]
    other = write_model(tmp_path / "other", tiny.REWARD, seed=3)
    assert open_scores(tmp_path, model, other) == {}


def test_best_and_worst_become_pairs(reward_dir, command, tmp_path):
    """By reward_scores. A single answer, answers that tie, and one without text: counted."""
    asked = {"a?": ["one", "two", "three", " "], "b?": ["x", "yy"], "c?": ["same", "same"],
             "d?": ["alone"], "e?": ["alone", ""]}  # fmt: skip
    rows = [{"prompt": q, "answer": text, "sample": k} for q, texts in asked.items()
            for k, text in enumerate(texts)]  # fmt: skip
    files = [write_rows(tmp_path / f"{n}.jsonl", rows[n::2]) for n in range(2)]  # of two runs
    out = tmp_path / "deep" / "pairs.jsonl"
    words = ["--answers", f"{files[0]},{files[1]}", "--model", reward_dir, "--out", out]
    said, error, status = command("best_of", *words)
    assert status == 0, error
    assert "11 answers to 5 questions: 2 pairs, dropped: 1 all answers score the same (" in said
    assert "2 fewer than two answers with text and score (" in said
    model, template = load(reward_dir), Template(reward_dir)
    pairs = read_pairs(str(out), Drops())
    assert {pair.prompt[0]["content"] for pair in pairs} == {"a?", "b?"}
    for pair in pairs:
        texts = [text for text in asked[pair.prompt[0]["content"]] if text.strip()]
        scores = reward_scores(model, template, [Answer(pair.prompt, t) for t in texts])
        best = [texts[scores.argmax()], texts[scores.argmin()]]
        assert [pair.chosen, pair.rejected] == best and len(texts) > 1
        assert pair.margin == pytest.approx(np.ptp(scores), abs=1e-5)
    write_rows(files[0], rows[-3:-2])
    _, error, status = command("best_of", *words[:1], files[0], *words[2:])
    assert status == 2 and "no pair; generate.py --n K gives K answers per question" in error


def test_dialogues_beyond_the_reward_models_positions_are_scored_whole_and_counted(
    command, reward_dir, files, tmp_path
):
    """As transformers scores them: the rotary angles go on."""
    short = write_model(tmp_path / "rm", tiny.REWARD | {"max_position_embeddings": 60})
    longer = write_rows(tmp_path / "long.jsonl", [{"prompt": "a", "answer": "b" * 60}])
    found = {}
    for model in (reward_dir, short):
        words = ["--model", model, "--answers", longer, "--out", tmp_path / "out.json"]
        _, error, status = command("reward", *words)
        found[model] = json.loads((tmp_path / "out.json").read_text())["answers"]["scores"]
        told = "1 of 1 dialogues are longer than the reward model's 60 positions: scored whole"
        assert status == 0 and (told in error) == (model == short)
    assert found[short] == found[reward_dir]


def test_a_reference_of_other_tokens_is_told_before_anything_is_scored(
    command, tiny_model_dir, pairs_file, tmp_path
):
    other = write_model(tmp_path / "other", tiny.LLAMA | {"max_position_embeddings": 100})
    words = ["pairs", "--model", tiny_model_dir, "--ref", other, "--data", pairs_file]
    _, error, status = command(*words, "--max_len", 101)
    assert status == 2 and f"--max_len 101: {other} was made for 100 positions" in error
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "<|pad|>"))
    _, error, status = command(*words)
    assert status == 2 and error.count("\n") == 1
    assert f"--ref {other}: '<|endoftext|>' has id None, not 256" in error


def test_scores_that_are_no_number_are_counted(reward_dir, files, command, monkeypatch, tmp_path):
    monkeypatch.setattr(
        evaluate, "reward_scores", lambda *a: np.array([1, np.nan, 3, np.inf, 5] * 2)
    )
    words = ["reward", "--model", reward_dir, "--answers", files[0], "--against", files[1]]
    _, error, status = command(*words)
    assert status == 2 and "40.0% missing or faulty (2 without a finite score" in error
    words += ["--max_missing", 0.4, "--out", tmp_path / "out.json"]
    out, _, status = command(*words)
    assert status == 0 and "reward 3.0000" in out and "3 ties" in out
    assert json.loads((tmp_path / "out.json").read_text())["answers"]["scores"][1] is None


def test_pairs_command(tiny_model_dir, start_dir, pairs_file, command):
    words = ["--model", tiny_model_dir, "--ref", start_dir, "--data", pairs_file, "--limit", 4]
    out, _, status = command("pairs", *words, "--loss", "ins_kto", "--bridge", "turn")
    assert status == 0 and "4 pairs read, dropped: none; scored: 4 pairs" in out
    names = [line.split("  ")[0] for line in out.splitlines()[1:]]
    assert names == ["plain", "cross, plain reference", "cross, same paths"]


def test_world_command(tiny_model_dir, start_dir, command, tmp_path):
    """Two random models say nothing of the world, so they tie."""
    words = ["--model", tiny_model_dir, "--start", start_dir, "--out", tmp_path / "world.json"]
    out, _, status = command("world", *words)
    assert status == 0 and out.count("win rate 50.0%") == 2
    results = json.loads((tmp_path / "world.json").read_text())
    assert results["plain"]["separable"]["win_rate"] == pytest.approx(0.5)
    assert np.shape(results["plain"]["probabilities"]) == (20, 16)


def test_answers_are_joined_by_prompt(files, tmp_path):
    settings = evaluate.RewardFlags("rm", answers=str(files[0]), against=str(files[1]))
    answers = evaluate.read_answers(settings.answers, "--answers")
    others = evaluate.read_answers(settings.against, "--against")
    assert [a.text for a in evaluate.align(answers, others, "")] == [f"b{i}" for i in range(5)]
    rows = [{"prompt": f"q{i}?", "answer": "x"} for i in (0, 1, 3, 4, 4)]
    for wanted, message in ((answers, "no answer to the prompt of .*ours.jsonl:3"),
                            (answers[4:], "has 2 answers to the prompt of .*:5")):  # fmt: skip
        others = evaluate.read_answers(str(write_rows(tmp_path / "other.jsonl", rows)), "")
        with pytest.raises(UserError, match=message):
            evaluate.align(wanted, others, "--against")


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the commands are reward, pairs, best_of, world, alpaca, arena, mtbench, compare, "),
        (["score"], "unknown command score; the commands are reward, pairs, best_of"),
        (["reward"], "--model, --answers are missing"),
        (["reward", "--model", "RM"], "--answers is missing"),
        (["reward", "--model", "RM", "--answers", "no.jsonl"], "--answers no.jsonl: no such file"),
        (["reward", "--model", "RM", "--answers", "BAD"], "bad.jsonl:2: columns ['prompt'] are"),
        (["reward", "--model", "LM", "--answers", "OURS"], "a reward model is needed"),
        (["reward", "--model", "RM", "--answers", "OURS", "--against", "PAIRS"],
         "PAIRS has no answer to the prompt of"),
        (["reward", "--model", "RM", "--answers", "OURS", "--pairs", "PAIRS"], "give either"),
        (["reward", "--model", "RM", "--pairs", "BAD"], "bad.jsonl:1: columns ['answer', 'pro"),
        (["reward", "--model", "RM", "--answers", "OURS", "--cache", "OURS"], "--cache "),
        (["pairs", "--model", "LM", "--data", "PAIRS"], "--loss ins_dpo needs --ref"),
        (["pairs", "--model", "RM", "--data", "PAIRS", "--ref", "LM"], "a language model"),
        (["pairs", "--model", "LM", "--data", "PAIRS", "--loss", "sft"], "gives a pair no margin"),
        (["pairs", "--model", "LM", "--data", "no.jsonl", "--ref", "LM"], "no such file"),
        (["world", "--model", "no-such-dir"], "no-such-dir: no such directory"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    command, reward_dir, tiny_model_dir, pairs_file, files, tmp_path, words, message
):
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "a"}])
    places = {"RM": reward_dir, "LM": tiny_model_dir, "BAD": bad, "OURS": files[0]}
    places |= {"PAIRS": pairs_file}
    message = message.replace("PAIRS", str(pairs_file))
    words = [*words, "--start", tiny_model_dir] if words[:1] == ["world"] else words
    _, error, status = command(*[places.get(word, word) for word in words])
    assert status == 2 and message in error and error.count("\n") == 1
