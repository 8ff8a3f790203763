"""The run directory: chosen under a lock, freed by starts that fail, changed by resumed runs."""

import dataclasses
import json
import threading
from types import SimpleNamespace

import pytest
from runs import argv, lines, losses, train_here

import train
from data import Plan
from jobs import rundir
from jobs.cli import UserError, parse
from train import TrainFlags


@pytest.fixture
def ranks():
    said = []
    return SimpleNamespace(share=lambda make: make(), say=said.append, said=said, first=True)


def flags_of(**given):
    return parse(TrainFlags, "", argv(given))


# ----------------------------------------------------------------------------- which directory


def test_a_start_that_fails_leaves_no_name_behind(tmp_path, monkeypatch, ranks):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        with pytest.raises(UserError, match="later"), rundir.open_out(flags_of(), ranks) as out:
            assert out == "runs/ins_dpo"
            raise UserError("later")
    assert not any((tmp_path / "runs").iterdir())


def test_what_a_killed_start_left_is_taken_again_and_a_live_one_is_not(
    tmp_path, monkeypatch, ranks
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "ins_dpo").mkdir(parents=True)
    (tmp_path / "runs" / "ins_dpo" / ".lock").touch()
    (tmp_path / "runs" / "ins_dpo" / "reference.safetensors").touch()
    s = flags_of()
    with rundir.open_out(s, ranks) as first, rundir.open_out(s, ranks) as second:
        assert (first, second) == ("runs/ins_dpo", "runs/ins_dpo-2")
    assert (tmp_path / "runs" / "ins_dpo").is_dir(), "its reference may be of use"
    assert not (tmp_path / "runs" / "ins_dpo-2").exists()


def test_two_starts_on_one_out_are_decided_at_once(tmp_path, ranks):
    s = flags_of(out=tmp_path / "out")
    taken = pytest.raises(UserError, match="another run is writing to it")
    with rundir.open_out(s, ranks), taken, rundir.open_out(s, ranks):
        pass


def test_a_resumed_run_waits_and_looks_again_at_what_is_there(tmp_path, ranks, monkeypatch):
    """A launcher that was killed may still be saving."""
    s, entered = flags_of(out=tmp_path / "out", resume=True), threading.Event()
    monkeypatch.setattr(
        rundir.time, "sleep", lambda _: entered.set() or threading.Event().wait(0.01)
    )
    with rundir.open_out(s, ranks):
        second = threading.Thread(target=lambda: rundir.open_out(s, ranks).__enter__())
        second.start()
        assert entered.wait(10)
    second.join(10)
    assert not second.is_alive() and "another run is writing to it; waiting" in ranks.said[0]


def test_an_out_that_cannot_be_made_is_one_line(ended, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("")  # also what an unwritable working directory gives
    _, told, status = ended(train, "--loss", "dpo")
    assert status == 2 and told.startswith("error: ") and told.count("\n") == 1 and "runs" in told


def test_a_logger_that_cannot_start_is_one_line(flags, tmp_path, monkeypatch, ranks):
    def no_key(s, step):
        raise RuntimeError("api_key not configured (no-tty).\n  call wandb.login")

    monkeypatch.setitem(rundir.LOGGERS, "json", no_key)  # a package that is there
    with pytest.raises(UserError, match=r"^--log json: api_key not configured .*login$"):
        rundir.Metrics(flags_of(out=tmp_path, log="json"), ranks, 0)
    monkeypatch.setitem(rundir.LOGGERS, "no_such_package", no_key)
    with pytest.raises(UserError, match="--log no_such_package: pip install"):
        rundir.logger_names("no_such_package")


# ----------------------------------------------------------------------------- going on


def test_a_resumed_run_may_change_its_learning_rate_and_says_so(flags, no_plots, capsys):
    """As the advice at a non-finite step says: lower --lr, then --resume."""
    flags |= {"loss": "simpo", "clip": 0.5, "schedule": "constant", "warmup": 0}
    train_here(flags)
    del flags["clip"]  # not given: as before
    train_here(flags | {"resume": True, "lr": 1e-4, "steps": 6})
    told = capsys.readouterr().out
    assert "from here on steps 6 (was 4), lr 0.0001 (was 0.001); lr follows" in told
    assert [line["lr"] for line in lines(flags["out"])] == [1e-3] * 4 + [1e-4] * 2
    settings = json.loads((flags["out"] / "config.json").read_text())["settings"]
    assert (settings["lr"], settings["steps"], settings["clip"]) == (1e-4, 6, 0.5)


def test_a_resumed_run_keeps_what_it_is_not_told(flags, no_plots):
    flags |= {"loss": "simpo"}
    train_here(flags)
    first = losses(flags["out"])
    for name in ("lr", "steps"):
        flags.pop(name)
    train_here(flags | {"resume": True})
    assert len(lines(flags["out"])) == len(first) == 4


def test_a_flag_that_is_younger_than_the_run_was_as_by_default(tmp_path):
    s = flags_of(out=tmp_path)
    then = dataclasses.asdict(s) | {"out": str(tmp_path)}
    del then["fold_system"], then["ignore_columns"]
    (tmp_path / "config.json").write_text(json.dumps({"settings": then}))
    rundir.check_config(s, pytest.fail)
    with pytest.raises(UserError, match="--fold_system is True, but .* has False"):
        rundir.check_config(dataclasses.replace(s, fold_system=True), pytest.fail)


def test_out_and_resume_alone_go_on_with_the_flags_of_the_first_start(flags, no_plots):
    """Also with those that have a default, which a later flag may not override in silence."""
    train_here(flags | {"loss": "simpo", "seed": 3, "dedup": True})
    train_here({"out": flags["out"], "resume": True, "epochs": 2})
    assert len(lines(flags["out"])) == 10, "20 pairs by 4, twice: --epochs replaces --steps"
    train_here({"out": flags["out"], "resume": True, "steps": 11})
    content = json.loads((flags["out"] / "config.json").read_text())
    assert content["settings"]["dedup"] and content["settings"]["seed"] == 3
    assert content["flags"]["loss"] == "simpo" and "keep" not in content["flags"]
    with pytest.raises(UserError, match="--resume: --seed is 0, but .* has 3"):
        train_here({"out": flags["out"], "resume": True, "seed": 0})


def test_fewer_steps_than_are_done_are_refused(flags, no_plots):
    train_here(flags | {"loss": "simpo"})
    with pytest.raises(UserError, match="--steps 3: 4 are done already"):
        train_here(flags | {"loss": "simpo", "steps": 3, "resume": True})


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch": 2}, {"loss": "dpo"}])
def test_what_decides_data_and_objective_stays(flags, no_plots, change):
    train_here(flags | {"loss": "simpo"})
    with pytest.raises(UserError, match=f"--resume: --{min(change)} is .*, but .* has"):
        train_here(flags | {"loss": "simpo"} | change | {"resume": True})


# ----------------------------------------------------------------------------- never in silence


def test_the_closing_line_says_what_moved(flags, no_plots, capsys):
    train_here(flags | {"loss": "ins_dpo"})
    told = capsys.readouterr().out
    assert "\nmoved: eval_plain_margin 0.0000 -> " in told and "accuracy 0.0000" not in told
    train_here(flags | {"loss": "ins_dpo", "lr": 1e-9, "out": flags["out"] / "still"})
    told = capsys.readouterr().out
    assert "\nnothing moved: eval_plain_margin 0.0000 -> " in told and "raise --lr" in told


def test_what_moved_has_three_answers():
    start = {"step": 0, "eval_loss": 2.0, "eval_plain_margin": 0.0, "eval_plain_accuracy": 0.0}
    end = start | {"step": 4, "eval_plain_margin": 0.5, "eval_plain_accuracy": 0.75}
    assert rundir.what_moved([start, {"loss": 1.0}, end]) == (
        "moved: eval_plain_margin 0.0000 -> 0.5000, eval_plain_accuracy 0.7500"
    ), "a tie at the start is no accuracy of 0"
    assert rundir.what_moved([{"eval_loss": 2.0}, {"eval_loss": 1.999}]).startswith("nothing moved")
    assert "not measured" in rundir.what_moved([{"loss": 1.0}])


@pytest.mark.parametrize("n, batch, epochs", [(36, 128, 3.0), (8, 128, 3.0), (500, 128, 1.0)])
def test_the_flags_that_are_advised_make_twenty_steps(n, batch, epochs):
    s = SimpleNamespace(batch=batch, steps=None, lr=1e-3)
    (told,) = rundir.advise(s, Plan(n, batch, 0, epochs), 10**9)
    words = told.partition("--batch ")[2].split()
    assert Plan(n, int(words[0]), 0, float(words[2])).steps >= 20
    assert not list(rundir.advise(s, Plan(n, 1, 0, 20.0), 10**9))


def test_a_small_model_at_the_papers_rate_is_told():
    s, plan = SimpleNamespace(batch=1, steps=None, lr=5e-7), Plan(100, 1, 0, 1.0)
    assert "135M parameters try --lr 2e-5" in next(rundir.advise(s, plan, 135 * 10**6))
    assert not list(rundir.advise(s, plan, 8 * 10**9))


def test_no_warm_up_eats_a_run_and_no_clip_means_none(flags, no_plots):
    s = SimpleNamespace(lr=1.0, warmup=0.9, final_lr=0.1, schedule="cosine")
    for steps in (1, 2, 5):
        rates = [
            train.Run.learning_rate(SimpleNamespace(s=s, plan=SimpleNamespace(steps=steps)), k)
            for k in range(steps)
        ]
        assert rates[-1] == 1.0
    for clip in (0, 1e9):
        train_here(flags | {"loss": "simpo", "clip": clip, "out": flags["out"] / str(clip)})
    assert losses(flags["out"] / "0").tolist() == losses(flags["out"] / str(1e9)).tolist()
