"""IFSR's tables end to end in miniature, from raw pairs to the table, by a judge on loopback.

What every one of them would run at full size: tests/recipes/test_inspo.py.
"""

import json
import sys

import numpy as np
import pytest
from chat_server import ChatServer
from test_inspo import rows_of, rule, start

from assets import world
from evals.stats import estimate
from evals.world import world_probabilities
from generate import load_model
from hub.template import open_template
from hub.weights import resolve
from jobs.cli import UserError
from jobs.rundir import Metrics
from losses import recipe
from pairs.layouts import Pair
from recipes import ifsr, prepare, steps

TINY = ["--samples", 1, "--prompts", 3, "--train", "steps=1 batch=4 limit=24"]
ONE = ["--models", "start", "--datasets", "separable"]
WORDS = {  # further words of a recipe, whose tables share what they train
    "table1": [],
    "table2": [],
    "table3": ONE,
    "table4": [*ONE, "--losses", "kto"],
    "table5": ONE,
    "table6": ONE,
    "table7": ONE,
    "table9": [*ONE[2:], "--losses", "simpo"],
    "figure3": ONE,
    "figure4": ONE,
    "figure5": ONE[:2],
    "figure6": ONE,
}
JUDGED = ("table1", "table3", "figure3")
COMBINATIONS = ["- - -", "- - III", "- II -", "- II III", "I - -", "I - III", "I II -", "I II III"]


def go(name, *words):
    start(name, "--size", "miniature", *map(str, words), module=ifsr, paper="ifsr")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Every table and figure in one OUT, as a user would start them."""
    folder = tmp_path_factory.mktemp("ifsr")
    with pytest.MonkeyPatch.context() as patch, ChatServer(rule) as server:
        patch.setattr(Metrics, "plot", lambda self: None)
        for name, words in WORDS.items():
            judge = ["--endpoint", server.url] if name in JUDGED else []
            go(name, *TINY, *words, *judge, "--out", folder)
    return folder


def test_every_recipe_has_run(out):
    assert {*WORDS, "table10"} == {*ifsr.RECIPES}
    assert all((out / f"{name}.json").exists() for name in WORDS)


def test_table3_has_the_eight_combinations(out):
    rows = rows_of(out, "table3")
    assert [*rows] == [f"start dpo: {stages}" for stages in COMBINATIONS]
    measures = ["reward", "RM win rate", "win rate", "exact win rate"]
    for row in rows.values():
        assert [*row] == ["stages", *(f"separable {m}" for m in measures)]
        assert all(0 <= row[f"separable {m}"]["mean"] <= 100 for m in measures[1:])


def test_each_stage_starts_from_the_one_before(out):
    def settings(name):
        file = out / "start/separable" / f"{name}-seed0" / "config.json"
        return json.loads(file.read_text())["settings"]

    before = "assets/start"
    for name in ("sft", "sft-irft", "sft-irft-dpo", "sft-irft-dpo-ifsr_dpo"):
        s = settings(name)
        assert s["model"] == before and s["ref_model"] is None  # it is its own reference
        assert s["loss"] == name.rpartition("-")[2]
        assert (s["schedule"], s["warmup"], s["weight_decay"]) == ("linear", 0, 0)
        assert s["lr"] == (1e-3 if s["loss"] in ("sft", "irft") else 3e-4)
        # twice the data: as many sequences in a step, of half as many pairs
        assert (s["batch"], s["steps"]) == ((2, 2) if s["loss"] == "irft" else (4, 1))
        before = str(out / "start/separable" / f"{name}-seed0" / "final")
    assert settings("sft-dpo")["model"] == str(out / "start/separable/sft-seed0/final")


def test_stage_three_refines_the_policys_own_plain_answers(out):
    run = out / "start/separable/sft-irft-dpo-ifsr_dpo-seed0"
    read = {
        mode: [json.loads(line) for line in (run / f"{file}.jsonl").read_text().splitlines()]
        for mode, file in (("plain", "separable-plain-better-0"),
                           ("refine", "separable-refine-better-0"))
    }  # fmt: skip
    assert [row["draft"] for row in read["refine"]] == [row["answer"] for row in read["plain"]]
    assert len({str(row["prompt"]) for row in read["plain"]}) == 3  # each prompt once


def test_the_exact_win_rate_of_refined_answers(out):
    """The probability of each answer, summed over the first answers, in plain loops."""
    final = out / "start/separable/sft-irft-dpo-ifsr_dpo-seed0/final"
    model = load_model(str(final), "fp32", "cpu")
    plain, shown = world_probabilities(*model), world_probabilities(*model, "turn")
    refined = sum(plain[:, b, None] * shown[:, b] for b in range(plain.shape[1]))
    start = world_probabilities(*load_model("assets/start", "fp32", "cpu"))
    rows = rows_of(out, "table3")
    for stages, policy in (("I II III", refined), ("I II -", plain)):
        found = rows[f"start dpo: {stages}"]["separable exact win rate"]["mean"]
        assert found == pytest.approx(100 * world.expected_win_rate(policy, start), abs=1e-6)


def test_tables_4_and_9_have_other_objectives_and_models(out):
    assert [*rows_of(out, "table4")] == [f"start kto: {stages}" for stages in COMBINATIONS]
    names = [f"start simpo: {stages}" for stages in COMBINATIONS]
    assert [*rows_of(out, "table9")] == names  # of Pythia, of which the start is the second one
    assert "separable win rate" not in rows_of(out, "table4")[f"start kto: {COMBINATIONS[0]}"]


def test_table1_asks_in_three_ways(out):
    rows = rows_of(out, "table1")
    assert [*rows] == ["start: x", "start: x,i", "start: x,ŷ,i"]
    assert [*rows["start: x"]][1:] == ["separable reward", "intransitive reward"]
    assert "separable win rate" in rows["start: x,i"]


def test_table2_names_both_variances(out):
    rows = rows_of(out, "table2")
    assert [name.split(": ")[1] for name in rows] == ["x", "x,i", "x,ỹ,i", "x,i⁰", "x,i↓"]
    over, labels = (rows["start: x"][f"separable variance {of}"]["mean"]
                    for of in ("over the vocabulary", "of labels"))  # fmt: skip
    assert 0 < over < labels


def test_tables_5_and_6_train_and_ask_otherwise(out):
    assert [*rows_of(out, "table5")] == [
        f"start: {name}" for name in ("all", "I without ỹ", "II without ỹ", "III without ŷ")
    ]
    rule = recipe("irft", "averaged_instruct")
    assert [str(path) for path in rule.paths] == ["chosen|prompt", "chosen|instruct"]
    rows = rows_of(out, "table6")
    assert [*rows] == ["start: better", "start: another", "start: worse"]
    assert "separable worse reward" in rows["start: better"]
    runs = (out / "start/separable").glob("*ifsr_dpo-instructionworse-seed0/config.json")
    (settings,) = [json.loads(run.read_text())["settings"] for run in runs]
    assert settings["instruction"] == "worse" and "irft-instructionworse" in settings["model"]


def test_table7_has_the_likeliest_tokens_of_two_models(out):
    rows = json.loads((out / "table7.json").read_text())["rows"]
    assert [row["next"] for row in rows] == [*map(str, range(1, 11)), "entropy", "distance"]
    columns = [f"{who} {c}" for who in ("dpo", "ifsr") for c in ("x", "x,ỹ", "x,i", "x,ỹ,i")]
    assert [*rows[0]] == ["next", *columns]
    first, second = (float(row["ifsr x"].split()[-1]) for row in rows[:2])
    assert 1 >= first >= second and rows[-1]["dpo x"] == "0.000"


def test_figure3_has_both_win_rates(out):
    rows = rows_of(out, "figure3")
    assert [*rows] == [f"start: {stages}" for stages in COMBINATIONS]
    assert [*rows["start: I II III"]] == ["stages", "LC", "WR"]
    run = out / "start/separable/sft-irft-dpo-ifsr_dpo-seed0"
    kept = (run / "refine/alpaca_eval.json.rows.jsonl").read_text().splitlines()
    assert all("draft" in json.loads(row) for row in kept)


def test_figures_4_and_6_draw_every_token(out):
    run = out / "start/separable/sft-irft-dpo-ifsr_dpo-seed0"
    found = json.loads((run / "attention.json").read_text())
    page = (out / "figure4.html").read_text()
    tokens = sum(len(texts[0]) for texts in found["prompts"].values())
    assert page.count("<span") == tokens and "&lt;" in page  # special tokens, escaped
    a, b = (found["last_query"][when]["x,i"][0][0] for when in ("before", "after"))
    assert f'title="{np.log(b / a):+.2f}"' in page[: page.index("</span>")]
    assert (out / "figure6.html").read_text().count("<h3>") == 2 * 2  # of three prompts
    rows = rows_of(out, "figure4")
    assert [*rows] == ["x,i", "x,ỹ,i"] and "skewness change" in rows["x,i"]


def test_figure5_is_a_square_of_increases(out):
    rows = rows_of(out, "figure5")
    assert [*rows] == ["separable", "intransitive"] and (out / "figure5.png").exists()
    run = out / "start/separable/sft-irft-dpo-ifsr_dpo-seed0"
    scores = json.loads((run / "intransitive-refine-better-0-over-sft-reward.json").read_text())
    gaps = np.subtract(scores["answers"]["scores"], scores["against"]["scores"])
    mean, low, high = estimate(gaps)
    cell = rows["separable"]["intransitive"]
    assert (cell["mean"], cell["low"], cell["high"]) == pytest.approx((mean, low, high))


def test_a_prompt_is_asked_once_and_not_if_it_is_too_long(capsys):
    def pair(text, chosen):
        return Pair([{"role": "user", "content": text}], chosen, "No.", f"file:{chosen}")

    said = [("Who wrote Hamlet?", "a"), ("Who wrote Hamlet?", "b"), ("What do cows eat? " * 9, "c"),
            ("What do bees make?", "d"), ("Which animal barks?", "e")]  # fmt: skip
    pairs, template = [pair(*row) for row in said], open_template(resolve("assets/start"))
    found = prepare.first_pairs(pairs, template, 2, max_prompt=40)
    assert [p.chosen for p in found] == ["a", "d"]
    assert "1 prompt over 40 tokens (file:c)" in capsys.readouterr().out
    assert [p.chosen for p in prepare.first_pairs(pairs, template, 9)] == ["a", "c", "d", "e"]


def test_figures_are_the_mean_over_sampling_seeds():
    """One training seed: its seeds are those of sampling; with two, the samples' mean is one."""
    one = [[{"reward": [1.0, 0.0, 2.0]}, {"reward": [3.0, 2.0, 4.0]}]]
    assert ifsr.cells("hh", one)["hh reward"] == steps.cell([[1, 0, 2], [3, 2, 4]])
    two = [*one, [{"reward": [5.0, 4.0, 6.0]}]]
    assert ifsr.cells("hh", two)["hh reward"] == steps.cell([[2, 1, 3], [5, 4, 6]])


# ----------------------------------------------------------------------------- the harness

HARNESS = """
import json, sys
from pathlib import Path
words = dict(zip(sys.argv, sys.argv[1:]))
folder = Path(words["--output_path"]) / "model"
folder.mkdir(parents=True)
scores = {"sample_len": 9, "alias": "facts", "acc,none": 0.45, "acc_stderr,none": 0.04}
(folder / "results_2026.json").write_text(json.dumps({"results": {words["--tasks"]: scores}}))
"""


def test_table10_asks_the_harness_where_it_is_installed(out, tmp_path, monkeypatch):
    """By a program that writes the files which lm_eval writes."""
    program = tmp_path / "lm_eval"
    program.write_text(f"#!{sys.executable}\n{HARNESS}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(ifsr, "find_spec", lambda name: name)
    go("table10", *TINY, *ONE, "--out", out)
    rows = rows_of(out, "table10")
    assert [*rows] == ["start: sft", "start: dpo", "start: ifsr"]
    assert rows["start: ifsr"]["small_world_facts"]["mean"] == 45


def test_table10_says_what_is_missing_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(ifsr, "find_spec", lambda name: None)
    s = ifsr.Flags(size="miniature", out=str(tmp_path))
    with pytest.raises(UserError, match="pip install lm_eval"):
        ifsr.table10(steps.Lab("ifsr", s), s)


# ----------------------------------------------------------------------------- full size


def lines_of(capsys, tmp_path, name, *words):
    start(name, "--dry_run", "--out", tmp_path, *words, module=ifsr, paper="ifsr")
    return capsys.readouterr().out.splitlines()


def test_the_protocol_at_full_size(capsys, tmp_path):
    runs = [line for line in lines_of(capsys, tmp_path, "table3") if " train.py " in line]
    assert len(runs) == 2 * 4 * 6  # two models, four data sets; sft, irft and twice dpo, ifsr_dpo
    for line in runs:
        supervised = "--loss sft" in line or "--loss irft" in line
        rate = "5e-07" if not supervised or "hh-rlhf" in line else "5e-06"
        batch = 16 if "--loss irft" in line else 32  # 4 per GPU; two sequences of a pair
        assert f"--lr {rate} --epochs 1 --batch {batch} " in line
        assert "--schedule linear --warmup 0 --weight_decay 0" in line
    assert not [line for line in runs if "--ref_model" in line]


def test_a_model_and_pairs_of_your_own(capsys, tmp_path):
    own = ["--start", "my/model", "--pairs", "a.jsonl", "--test", "b.jsonl"]
    lines = lines_of(capsys, tmp_path, "table3", *own, "--train", "batch=8 dtype=bf16")
    (sft,) = [line for line in lines if "--loss sft" in line]
    assert "--model my/model --data a.jsonl" in sft and "--batch 8" in sft and "bf16" in sft
    assert "--prompts 2000 --max_prompt 960" in next(x for x in lines if "recipes.prepare" in x)
    with pytest.raises(SystemExit):
        lines_of(capsys, tmp_path, "table3", *own[:4])
    assert "--pairs and --test come together" in capsys.readouterr().err
