"""The runner of recipes: what is done is passed over, what fails is told, the plan is run."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest

from jobs.cli import UserError
from recipes import steps
from recipes.steps import Cell, Lab, RecipeFlags, cell, essence, words_of


@pytest.fixture
def lab_of(tmp_path):
    """lab_of(recipe) goes through a recipe as main does -> (plan, Lab), in tmp_path."""

    def go(recipe, **flags):
        s = RecipeFlags(out=str(tmp_path), **flags)
        plan = Lab("none", s)
        recipe(plan)
        lab = Lab("none", s, plan)
        recipe(lab)
        return plan, lab

    return go


def echo(text, file):
    return ["sh", "-c", f"echo {text} >> {file}"]


def test_a_step_runs_once_and_its_file_stays(lab_of, tmp_path, capsys):
    def recipe(lab):
        for _ in range(2):  # two parts of a recipe may share it
            lab.step("a/one", echo("x", tmp_path / "a/one"), 1.5)

    plan, _ = lab_of(recipe)
    assert plan.steps == {"a/one": (echo("x", tmp_path / "a/one"), 1.5)}
    lab_of(recipe)
    assert (tmp_path / "a/one").read_text() == "x\n"
    assert capsys.readouterr().out.count("1/1 a/one") == 1


def test_a_file_of_another_command_is_refused(lab_of, tmp_path):
    lab_of(lambda lab: lab.step("one", echo("x", tmp_path / "one")))
    with pytest.raises(UserError, match="one was made by another command, sh -c 'echo x"):
        lab_of(lambda lab: lab.step("one", echo("y", tmp_path / "one")))


def test_two_commands_of_a_recipe_never_leave_the_same_file(lab_of, tmp_path):
    def recipe(lab):
        for text in ("x", "y"):
            lab.step("one", echo(text, tmp_path / "one"))

    with pytest.raises(UserError, match="one: of two commands, sh -c 'echo x .* and sh"):
        lab_of(recipe)
    assert not (tmp_path / "one").exists()  # told by the plan


def test_where_and_how_fast_may_change(lab_of, tmp_path):
    def recipe(lab, url):
        lab.step("one", [*echo("x", tmp_path / "one"), "--endpoint", url])

    lab_of(lambda lab: recipe(lab, "http://a"))
    lab_of(lambda lab: recipe(lab, "http://b"))
    assert (tmp_path / "one").read_text() == "x\n"
    words = ["train.py", "--loss", "dpo"]
    assert essence(["python", *words]) == essence(["torchrun", "--nproc-per-node", "8", *words])
    assert essence(["python", "-m", "recipes.prepare"]) == ["-m", "recipes.prepare"]


def test_a_failing_step_tells_its_command_and_the_end_of_its_log(lab_of, tmp_path):
    words = ["sh", "-c", "echo the disk is full; exit 3"]
    with pytest.raises(UserError, match="(?s)one failed with exit status 3: sh -c .*disk is full"):
        lab_of(lambda lab: lab.step("one", words))
    assert "the disk is full" in (tmp_path / "logs" / "one.log").read_text()
    with pytest.raises(UserError, match="status 0"):  # well ended, but nothing left
        lab_of(lambda lab: lab.step("two", ["true"]))


@pytest.mark.parametrize("one_process", [True, False])
def test_our_commands_run_in_this_process_or_their_own(lab_of, tmp_path, one_process):
    """A user's mistake comes as its one line, whichever it was."""
    flags = {"size": "miniature", "one_process": one_process}
    with pytest.raises(UserError, match="status 2: python evaluate.py compare(?s:.*)missing"):
        lab_of(lambda lab: lab.evaluate("x.json", "compare"), **flags)


def test_the_plan_reads_nothing_and_knows_the_steps(lab_of, tmp_path, capsys):
    def recipe(lab):
        file = lab.step("n.json", ["sh", "-c", f"echo '{{\"a\": [1, 2]}}' > {tmp_path}/n.json"])
        seen.append(lab.read(file, "a", 1))
        seen.append(lab.best({"low": lab.read(file, "a", 0), "high": lab.read(file, "a", 1)}))
        lab.tell("t", [{"row": "r", "x": cell([lab.read(file, "a", 1)])}])

    seen = []
    lab_of(recipe)
    assert math.isnan(seen[0]) and seen[1:] == ["low", 2, "high"]
    assert "row  x\nr    2\n" in capsys.readouterr().out
    written = json.loads((tmp_path / "t.json").read_text())
    assert written["rows"] == [{"row": "r", "x": dataclasses.asdict(cell([2]))}]


def test_the_papers_figures_stand_beside_ours(lab_of, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(steps, "PAPERS", {"none": {"t": {"dpo": {"LC": 21.5}}}})
    rows = [{"method": "dpo", "LC": cell([20.0])}, {"method": "ipo", "LC": cell([3.0])}]
    lab_of(lambda lab: lab.tell("t", rows))
    assert "dpo      20 | 21.5\nipo          3 | -\n" in capsys.readouterr().out


def test_cells_by_hand():
    assert cell([0.5], 100) == Cell(50.0, None, None, None, [50.0])
    assert cell([[1, 0, 2], [3, 2, 6]]) == Cell(2.0, pytest.approx(2**0.5), 1.0, 4.0, [1.0, 3.0])
    # Student's t with one degree of freedom: 2 ± 12.706 · sqrt(2) / sqrt(2)
    assert cell([1, 3]) == Cell(
        2.0,
        pytest.approx(2**0.5),
        pytest.approx(-10.706, rel=1e-3),
        pytest.approx(14.706, rel=1e-3),
        [1.0, 3.0],
    )
    assert str(cell([[1, 0, 2], [3, 2, 6]])) == "2 ± 1.41 [1, 4]"


def test_words_of_flags():
    flags = {"lr": 1e-3, "resume": True, "limit": None, "compile": False}
    assert words_of(flags) == ["--lr", "0.001", "--resume", "--no-compile"]


def test_torchrun_is_that_of_this_python(lab_of, monkeypatch):
    """train.py on all GPUs, judges and servers' clients in one process."""
    seen = []

    def start(words, **options):
        seen.append(words)
        return subprocess.CompletedProcess(words, 7)

    monkeypatch.setattr(subprocess, "run", start)
    with pytest.raises(UserError, match="status 7: torchrun --standalone --nproc-per-node 4 train"):
        lab_of(lambda lab: lab.train("a", loss="dpo"), gpus=4)
    with pytest.raises(UserError, match="status 7: python generate.py"):
        lab_of(lambda lab: lab.generate("b", endpoint="http://x"), gpus=4)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert seen[0][:6] == [*launcher, "--nproc-per-node", "4"] and seen[0][-1] == "--resume"
    assert seen[1][:2] == [sys.executable, "generate.py"]


def test_it_is_a_command():
    """By a process of its own: the list of recipes, and a name that is none."""
    start = [sys.executable, "-m", "recipes.inspo"]
    run = {"capture_output": True, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    told = subprocess.run([*start, "--help"], **run)
    assert "table2      Nine objectives" in told.stdout and not told.returncode
    wrong = subprocess.run([*start, "table9"], **run)
    assert wrong.returncode == 2 and "error: unknown recipe table9" in wrong.stderr
