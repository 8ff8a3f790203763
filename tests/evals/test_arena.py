"""Arena-Hard and MT-Bench: verdicts and scores by hand, the fit against what made the games."""

import json

import numpy as np
import pytest

from evals import arena, mtbench
from evals.arena import bradley_terry, read_games, style_difference
from evals.results import read_verdict
from evals.stats import sigmoid
from jobs.cli import UserError, parse

FLAGS = {arena: arena.ArenaFlags, mtbench: mtbench.MtbenchFlags}


def call(module, command, *words, out=None):
    words = [*words, *([f"--out={out}"] if out else [])]
    command(parse(FLAGS[module], "", list(map(str, words))))
    return json.loads(out.read_text())["models"] if out else None


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def judged(question, first, second, model="ours", **more):
    games = [g if g is None or isinstance(g, dict) else {"score": g} for g in (first, second)]
    return {"uid": question, "model": model, "judge": "j", "games": games} | more


# ----------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("text, label", [
    ("… [[A>>B]]", "A>>B"), ("[[A>B]] and again [[A>B]]", "A>B"), ("[[ B>A ]]", "B>A"),
    ("[[A<<B]]", "B>>A"), ("[[A=B]]", "A=B"), ("[[A>B]] or [[B>A]]", "B>A"), ("A>B", None),
    ("[[A>>>B]]", None), ("[[B]]", "B>A"), ("", None),
])  # fmt: skip
def test_verdicts(text, label):
    assert read_verdict(text) == label


def test_the_model_is_b_first_and_a_second():
    """B>>A is a strong win in the first game and a strong loss in the second."""
    assert read_games(judged(1, "B>>A", "B>>A"))[0] == [(1, 3), (0, 3)]
    assert read_games(judged(1, "A>B", "A=B"))[0] == [(0, 1), (0.5, 1)]
    assert read_games(judged(1, "A<<B", "B<A"))[0] == [(1, 3), (1, 1)]
    both = {"score": None, "judgment": {"answer": "so [[B>A]]"}}
    assert read_games(judged(1, both, {"judgment": "[[A=B]]"}))[0] == [(1, 1), (0.5, 1)]


@pytest.mark.parametrize("games, fault", [
    ([{"score": "A>B"}], "incomplete"), (None, "incomplete"),
    ([None, {"score": "A>B"}], "incomplete"), ([{"score": "A>B"}, {"score": None}], "null"),
    ([{"score": "A>B"}, {"score": "A"}], "unparsable"),
    ([{"score": "A>B"}, {"judgment": "no verdict"}], "unparsable"),
    ([{"score": ["A>B"]}, {"score": "A>B"}], "unparsable"),
])  # fmt: skip
def test_faulty_games(games, fault):
    assert read_games({"games": games}) == (None, fault)


def test_a_strong_verdict_counts_thrice(tmp_path, capsys):
    """Games won with weight 3 and 1, tied with 1, lost with 3: (3 + 1 + 1/2) / 8."""
    rows = [judged("a", "B>>A", "A>B"), judged("b", "A=B", "B>>A")]
    file = write_rows(tmp_path / "ours.jsonl", rows)
    found = call(arena, arena.arena, f"--judgments={file}", out=tmp_path / "out.json")["ours"]
    assert found["score"][0] == pytest.approx(4.5 / 8) and found["n"] == 2
    assert found["values"] == {"a": 1.0, "b": pytest.approx(0.5 / 4)}
    low, high = found["score"][1:]  # question a alone, question b alone
    assert (low, high) == (pytest.approx(0.125), 1.0)


def test_missing_is_counted_and_refused(tmp_path, capsys):
    rows = [judged(i, "A>B", "B>A", "full") for i in range(4)]
    rows += [judged(0, "A>B", "B>A"), judged(1, "A>B", None), judged(1, "A>B", "A=B")]
    rows += [judged(2, "A>B", {"score": "who knows"})]
    file = write_rows(tmp_path / "all.jsonl", rows)
    words = [f"--judgments={file}"]
    found = call(arena, arena.arena, *words, "--max_missing=1", out=tmp_path / "out.json")
    assert found["full"]["n"] == 4 and found["ours"]["n"] == 1
    assert found["ours"]["values"] == {"0": 0.0, "1": None, "2": None, "3": None}
    said = capsys.readouterr().out
    assert "ours: 4 of 4 missing or faulty: 1 incomplete" in said
    assert all(x in said for x in ("1 doubled", "1 unparsable", "1 without a row (question 3)"))
    with pytest.raises(UserError, match="ours: 100.0% missing or faulty .*raise --max_missing"):
        call(arena, arena.arena, *words)


# ----------------------------------------------------------------------------- Bradley-Terry


def world(seed, n=250, skills=(0.8, -0.5), pull=1.0):
    """Answers and judgments of two models; the judge adds pull * (relative length) to the skill."""
    rng, answers, judgments = np.random.default_rng(seed), [], []
    for model, skill in [("base", None), *zip(("good", "bad"), skills, strict=True)]:
        tokens = rng.integers(50, 400, n) * (2 if model == "bad" else 1)
        for q in range(n):
            density = rng.random(3)  # of markdown, whatever the length
            headers, lists, bold = map(int, density * tokens[q])
            meta = {"token_len": int(tokens[q]), "header_count": {"h1": headers}}
            meta |= {"list_count": {"ordered": lists, "unordered": 0}, "bold_count": {"**": bold}}
            answers.append({"uid": f"q{q}", "model": model, "metadata": meta})
            if skill is not None:
                a, b = tokens[q], answers[q]["metadata"]["token_len"]
                p = sigmoid(skill + pull * (a - b) / (a + b))
                verdicts = [
                    "B>A" if rng.random() < p else "A>B",
                    "A>B" if rng.random() < p else "B>A",
                ]
                judgments.append(judged(f"q{q}", *verdicts, model))
    return answers, judgments


def test_without_style_the_fit_is_the_score():
    games = {
        "m": {str(q): [(1.0, 3), (0.0, 1)] if q % 3 else [(0.5, 1), (0.0, 3)] for q in range(9)}
    }
    battles = arena.game_columns(games)
    views, pull = bradley_terry(battles, ["m"], np.zeros((18, 0)), np.zeros(0))
    every = [game for pair in games["m"].values() for game in pair]
    raw = sum(score * weight for score, weight in every) / sum(weight for _, weight in every)
    assert views["controlled"]["m"].mean == pytest.approx(raw) and not len(pull)
    assert views["equal_style"]["m"].mean == pytest.approx(raw)


@pytest.mark.parametrize("control", ["length", "markdown", "both"])
def test_control_selects_the_style_columns(tmp_path, control):
    """The judge rewards length: only with the length column is the long model's gain taken out."""
    answers, judgments = world(0, pull=4.0)
    files = [write_rows(tmp_path / "answers.jsonl", answers),
             write_rows(tmp_path / "judged.jsonl", judgments)]  # fmt: skip
    words = [f"--answers={files[0]}", f"--judgments={files[1]}", "--baseline=base"]
    found = call(arena, arena.arena, *words, f"--control={control}", "--resamples=20",
                 out=tmp_path / "out.json")  # fmt: skip
    truth = {"good": sigmoid(0.8), "bad": sigmoid(-0.5)}
    for model, expected in truth.items():
        mean, low, high = found[model]["equal_style"]
        assert low < mean < high
        if control == "markdown":  # the judge does not look at it
            assert mean == pytest.approx(found[model]["score"][0], abs=0.05)
        else:
            assert mean == pytest.approx(expected, abs=0.07)
    assert found["bad"]["score"][0] > truth["bad"] + 0.2


def test_published_control_is_centred(tmp_path):
    """With one model, standardised style has mean 0 over its games, so little changes."""
    answers, judgments = world(1, pull=2.0)
    judgments = [row for row in judgments if row["model"] == "bad"]
    words = [f"--answers={write_rows(tmp_path / 'a.jsonl', answers)}", "--baseline=base",
             f"--judgments={write_rows(tmp_path / 'j.jsonl', judgments)}"]  # fmt: skip
    found = call(arena, arena.arena, *words, "--control=length", "--resamples=5",
                 out=tmp_path / "out.json")["bad"]  # fmt: skip
    assert found["controlled"][0] == pytest.approx(found["score"][0], abs=0.02)
    assert found["equal_style"][0] < found["controlled"][0] - 0.05


def test_style_by_hand():
    """300 tokens to 100: 1/2. Headers 3 in 300 to 3 in 100: (0.01 - 0.03) / 1.04."""
    difference = style_difference(np.array([300.0, 3, 0, 6]), np.array([100.0, 3, 0, 2]))
    np.testing.assert_allclose(difference, [0.5, -0.02 / 1.04, 0, 0])


@pytest.mark.parametrize("change, message", [
    ({"baseline": "gpt"}, "--baseline gpt: --answers has base, good, bad"),
    ({"answers": "short"}, "no answer of good to q1"),
    ({"answers": "bare"}, ":1: metadata without token_len; --control needs it"),
    ({"answers": "nowhere/*"}, "--answers nowhere/\\*: no such file"),
    ({"answers": None}, "--answers is missing"),
])  # fmt: skip
def test_control_errors(tmp_path, change, message):
    answers, judgments = world(0, n=2)
    bare = [{"uid": 1, "model": "base"}]
    places = {"short": write_rows(tmp_path / "short.jsonl", answers[:3])}
    places["bare"] = write_rows(tmp_path / "bare.jsonl", bare)
    flags = {"answers": write_rows(tmp_path / "a.jsonl", answers), "baseline": "base"} | change
    flags["judgments"] = write_rows(tmp_path / "j.jsonl", judgments)
    words = [f"--{k}={places.get(v, v)}" for k, v in flags.items() if v is not None]
    with pytest.raises(UserError, match=message):
        call(arena, arena.arena, *words, "--control=length")


# ----------------------------------------------------------------------------- MT-Bench


def rated(question, turn, score, model="ours", **more):
    return {"question_id": question, "turn": turn, "score": score, "model": model} | more


def test_mtbench_by_hand(tmp_path, capsys):
    """Question 81 (writing): 8 and 6. Question 111 (math): 3, and its second turn from the text."""
    rows = [rated(81, 1, 8), rated(81, 2, 6), rated(111, 1, 3)]
    rows += [rated(111, 2, None, judgment="Wrong. [[2.5]]")]
    file = write_rows(tmp_path / "judged.jsonl", rows)
    found = call(mtbench, mtbench.mtbench, f"--judgments={file}", out=tmp_path / "o.json")["ours"]
    assert found["score"] == [19.5 / 4, 2.75, 7.0]
    assert found["turns"]["1"][0] == 5.5 and found["turns"]["2"][0] == 4.25
    assert {c: v[0] for c, v in found["categories"].items()} == {"writing": 7.0, "math": 2.75}
    assert found["values"] == {"81": 7.0, "111": 2.75}


def test_mtbench_faults(tmp_path, capsys):
    rows = [rated(q, t, 5, "full") for q in (81, 82) for t in (1, 2)]
    rows += [rated(81, 1, -1), rated(81, 2, None), rated(81, 2, 7), rated(82, 1, "ten")]
    file = write_rows(tmp_path / "judged.jsonl", rows)
    with pytest.raises(UserError, match="ours: .* missing or faulty"):
        call(mtbench, mtbench.mtbench, f"--judgments={file}")
    said = capsys.readouterr().out
    assert all(x in said for x in ("2 unparsable", "1 null", "1 doubled", "1 without a row"))
    write_rows(file, [row for row in rows if row["score"] != 7])  # a doubled one is one too many
    with pytest.raises(UserError, match="ours: not one score"):
        call(mtbench, mtbench.mtbench, f"--judgments={file}", "--max_missing=1")


def test_mtbench_pairs_by_hand(tmp_path, capsys):
    """Won twice, won and lost (a tie), tied and won (a tie), and no verdict."""
    games = [("model_1", "model_1"), ("model_1", "model_2"), ("tie", "model_2"), ("error", "tie")]
    rows = [{"question_id": 81 + n // 2, "turn": 1 + n % 2, "model_1": "a", "model_2": "b",
             "g1_winner": first, "g2_winner": second}
            for n, (first, second) in enumerate(games)]  # fmt: skip
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    words = [f"--judgments={file}", "--max_missing=0.25"]
    found = call(mtbench, mtbench.mtbench, *words, out=tmp_path / "o.json")
    assert found["a against b"]["values"] == {"81": 0.75, "82": None}
    assert found["b against a"]["score"][0] == pytest.approx(1 / 3)
    assert "1 of 4 missing or faulty: 1 unparsable" in capsys.readouterr().out


def test_categories_of_a_question_file(tmp_path):
    questions = write_rows(tmp_path / "q.jsonl", [{"question_id": "x", "category": "poems"}])
    assert mtbench.category_of(str(questions)) == {"x": "poems"}
    own = mtbench.category_of(None)
    assert len(own) == 80 and own["160"] == "humanities" and own["91"] == "roleplay"
