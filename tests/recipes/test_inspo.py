"""InSPO's tables end to end in miniature, by a judge on loopback; and what full size would run."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from chat_server import ChatServer

import evaluate
import generate
from jobs.cli import HYPER, UserError, parser_of
from jobs.rundir import Metrics
from losses import recipe
from recipes import cost, ifsr, inspo, online, prepare, steps
from train import TrainFlags

SHOWN = re.compile(r"=== Answer of A ===\n(.*?)\n\n=== Answer of B ===\n(.*?)\n\n=== End", re.S)


def rule(messages, body):
    """A judge that likes reasons, hence length; a grader with a grade for each model."""
    if found := SHOWN.search(messages[-1]["content"]):
        a, b = map(len, found.groups())
        return f"[[{'A>B' if a > b else 'B>A' if b > a else 'A=B'}]]"
    return f"[[{ {'judge': 6, 'grader': 8}[body['model']] }]]"


def start(name, *words, module=inspo, paper="inspo"):
    """python -m recipes.PAPER RECIPE WORDS…"""
    before, sys.argv = sys.argv, [paper, name, *map(str, words)]
    try:
        steps.main(paper, module.RECIPES, module.Flags, module.__doc__)
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Every table and figure of one model, in one OUT, as a user would start them."""
    folder = tmp_path_factory.mktemp("inspo")
    with pytest.MonkeyPatch.context() as patch, ChatServer(rule) as server:
        patch.setattr(Metrics, "plot", lambda self: None)
        words = ["--size", "miniature", "--endpoint", server.url, "--out", folder]
        for name in inspo.RECIPES:
            start(name, *words, "--models", "start")
        before = len(server.bodies)
        start("table2", *words, "--models", "start")  # again: everything is there
        assert len(server.bodies) == before
    return folder


def rows_of(out, name):
    rows = json.loads((out / f"{name}.json").read_text())["rows"]
    return {next(iter(row.values())): row for row in rows}


def test_table2_has_every_objective_on_every_benchmark(out):
    rows = rows_of(out, "table2")
    both = {form + base for base in inspo.BASES for form in ("", "ins_")}
    assert rows.keys() == both | {"rrhf", "slic", "cpo", "kto"}
    for row in rows.values():
        cells = {k.removeprefix("start "): v for k, v in row.items() if k != "method"}
        assert [*cells] == ["LC", "WR", "MT judge", "MT grader", "AH WR", "AH SC"]
        assert all(0 <= cells[k]["mean"] <= 100 for k in ("LC", "WR", "AH WR", "AH SC"))
        assert (cells["MT judge"]["mean"], cells["MT grader"]["mean"]) == (6, 8)


def test_a_grid_is_searched_by_validation_win_rate(out):
    """What was chosen has the best length-controlled win rate of its grid's points."""
    chosen = json.loads((out / "table2.json").read_text())["chosen"]
    assert chosen["start kto"] == {} and chosen["start rrhf"] == {"lam": 0.01}
    scores = {}
    for beta in (0.1, 0.2):  # the first two of the grid
        run = f"ins_dpo-beta{beta}-seed0"
        found = json.loads((out / "start" / run / "validation-score.json").read_text())
        scores[beta] = found["models"][run]["length_controlled_winrate"]
    assert scores[chosen["start ins_dpo"]["beta"]] == max(scores.values())


def test_both_orders_and_both_turns_are_judged(out):
    run = out / "start" / "kto-seed0"
    games = [json.loads(line) for line in (run / "arena-verdicts.jsonl").read_text().splitlines()]
    assert len(games) == 4 and all(len(game["games"]) == 2 for game in games)
    grades = [json.loads(line) for line in (run / "mtbench-grader.jsonl").read_text().splitlines()]
    assert [(g["question_id"], g["turn"]) for g in grades] == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_tables_3_and_4_vary_limits_and_conditions(out):
    assert [*rows_of(out, "table3")] == ["48, 0.3", "48, none", "256, 0.3", "256, none"]
    rows = rows_of(out, "table4")
    assert [*rows] == ["dpo", "one-sided", "symmetric", "averaged"]
    assert "start AH SC" in rows["averaged"] and "start MT judge" not in rows["averaged"]
    settings = json.loads((out / "start/ins_dpo-beta0.1-conditionone_sided-seed0/config.json")
                          .read_text())["settings"]  # fmt: skip
    assert (settings["loss"], settings["condition"]) == ("ins_dpo", "one_sided")


def test_tables_5_and_7_measure_the_same_runs(out):
    rows, ratios = rows_of(out, "table5"), rows_of(out, "table7")["start"]
    for column, ratio in (("s/step", "time"), ("GiB", "memory"), ("ms/token", "inference")):
        plain, ins = (rows[loss][f"start {column}"]["mean"] for loss in ("dpo", "ins_dpo"))
        assert plain > 0 and ratios[ratio]["mean"] == pytest.approx(ins / plain)


def test_figure2_has_every_step_of_every_run(out):
    curves = json.loads((out / "figure2.json").read_text())["curves"]
    assert [*curves] == [form + base for base in inspo.BASES for form in ("", "ins_")]
    assert curves["dpo"][0]["step"] == [1, 2]
    assert curves["dpo"][0]["loss"][0] == pytest.approx(np.log(2))
    assert (out / "figure2.png").stat().st_size > 10_000


def test_several_seeds_have_a_spread(out):
    """In the same OUT, so that the first seed is there already."""
    with pytest.MonkeyPatch.context() as patch, ChatServer(rule) as server:
        patch.setattr(Metrics, "plot", lambda self: None)
        words = ["--size", "miniature", "--endpoint", server.url, "--out", out]
        start("table7", *words, "--models", "start", "--seeds", "0,1")
        start("table4", *words, "--models", "start", "--seeds", "0,1")
    control = rows_of(out, "table4")["averaged"]["start AH SC"]
    assert len(control["seeds"]) == 2 and control["low"] <= control["mean"] <= control["high"]
    time = rows_of(out, "table7")["start"]["time"]
    assert len(time["seeds"]) == 2 and time["spread"] is not None and time["low"] < time["high"]


# ----------------------------------------------------------------------------- full size

PLANS = [(inspo, "inspo", name) for name in inspo.RECIPES]
PLANS += [(online, "online", name) for name in online.RECIPES]
PLANS += [(ifsr, "ifsr", name) for name in ifsr.RECIPES]


@pytest.fixture(params=PLANS, ids=lambda plan: f"{plan[1]} {plan[2]}")
def plan(request, capsys, tmp_path):
    """The lines that --dry_run prints, which touches neither network nor disk."""
    module, paper, name = request.param
    start(name, "--dry_run", "--out", tmp_path / "new", module=module, paper=paper)
    assert not (tmp_path / "new").exists()
    return paper, name, capsys.readouterr().out.splitlines()


def test_every_command_at_full_size_is_one_of_ours(plan):
    """Each line parses with the parser of its command, and train.py can resolve its objective."""
    *lines, last = plan[2]
    seen = set()
    for line in lines:
        words = shlex.split(line, comments=True)
        words = words[words.index("8") + 1 :] if words[0] == "torchrun" else words[1:]
        script, *rest = words[1:] if words[0] == "-m" else words
        seen.add(script)
        if script == "train.py":
            s = parser_of(TrainFlags, "").parse_args(rest)
            hyper = {name: getattr(s, name) for name in HYPER}
            recipe(s.loss, s.condition, **hyper)  # ValueError for a flag that it does not have
        elif script == "generate.py":
            parser_of(generate.GenerateFlags, "").parse_args(rest)
        elif script == "evaluate.py":
            parser_of(evaluate.find_command(rest[0])[0], "").parse_args(rest[1:])
        elif script == "recipes.prepare":
            parser_of(prepare.PrepareFlags, "").parse_args(rest)
        elif words[0] == "HF_ALLOW_CODE_EVAL=1":  # a program of others
            assert words[1:3] == ["lm_eval", "run"]
        else:
            assert line.startswith("hf download "), line
    assert "train.py" in seen or plan[:2] in (("ifsr", "table1"), ("ifsr", "table2"))
    assert last.startswith(f"{len(lines)} steps, about ")


def test_the_papers_grids_are_all_tried(capsys, tmp_path):
    start("table2", "--dry_run", "--out", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    runs = [line for line in lines if " train.py " in line]
    assert len(runs) == 2 * (2 * (4 + 9 + 3 + 6 + 3) + 4)
    assert sum("--beta 0.5 --gamma 1.5" in line for line in runs) == 4
    (rrhf, *_) = [line for line in runs if "--loss rrhf" in line]
    assert "--lam 0.01" in rrhf


def test_mistakes_are_told_before_anything_is_run(tmp_path):
    with pytest.raises(SystemExit):
        start("table2", "--out", tmp_path)  # no judge
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="--models opt: choose from mistral, llama3, gemma2"):
        s = inspo.Flags(models="opt", endpoint="http://x", out=str(tmp_path))
        inspo.table2(steps.Lab("inspo", s), s)


def test_tokens_of_a_pair_by_hand():
    """x w l; x [l w] [w l]; behind a turn the context copies are the plain answers."""
    assert cost.tokens_per_pair("dpo") == cost.PROMPT + 2 * cost.ANSWER
    assert cost.tokens_per_pair("ins_dpo") == cost.PROMPT + 4 * cost.ANSWER
    assert cost.tokens_per_pair("ins_dpo", "averaged") == cost.PROMPT + 6 * cost.ANSWER
    assert cost.tokens_per_pair("irft") == cost.PROMPT + 3 * cost.ANSWER


def test_the_readme_states_the_cost_that_the_plan_gives(plan):
    """Steps and GPU hours of `recipes/README.md`."""
    paper, name, (*_, last) = plan
    text = Path(steps.__file__).with_name("README.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if f"`python -m recipes.{paper} {name}`" in line]
    count, hours = re.search(r"(\d+) steps, about ([\d.]+) GPU hours", last).groups()
    assert f"| {count} steps, {float(hours):,.0f} GPU hours |" in row
