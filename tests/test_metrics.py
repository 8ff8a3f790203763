"""What a run reports is read back, also behind a kill, and drawn beside other runs."""

import json
import sys
from types import SimpleNamespace

import pytest

import evaluate
from cli import UserError, run
from metrics import Metrics, logger_names, read_metrics


def steps(n, loss):
    return [{"step": k + 1, "loss": loss / (k + 1), "pairs": 4, "seconds": 2.0} for k in range(n)]


def write(directory, rows, tail=""):
    directory.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text + tail)
    return directory


def test_a_torn_last_line_is_left_out_and_said(tmp_path):
    out = write(tmp_path / "out", steps(2, 1.0), tail='{"step": 3, "lo')
    said = []
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl", said.append)] == [1, 2]
    assert len(said) == 1 and "metrics.jsonl:3: the last line is torn" in said[0]


def test_a_broken_line_before_the_last_is_told(tmp_path):
    out = write(tmp_path / "out", [], tail='{"st\n{"step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match="metrics.jsonl:1: broken JSON"):
        read_metrics(out / "metrics.jsonl")


def test_a_resumed_run_goes_on_behind_its_step_also_after_a_torn_line(tmp_path):
    evals = [{"step": 2, "eval_loss": 0.5}, {"step": 4, "eval_loss": 0.4}]
    out = write(tmp_path / "out", steps(4, 1.0) + evals, tail='{"step')
    ranks = SimpleNamespace(first=True, say=lambda text: None)
    Metrics(SimpleNamespace(out=out, log=None), ranks, 3).write({"step": 4, "loss": 9.0})
    kept = [(row["step"], row.get("loss")) for row in read_metrics(out / "metrics.jsonl")]
    assert kept == [(1, 1.0), (2, 0.5), (3, 1 / 3), (2, None), (4, 9.0)]


def test_runs_are_drawn_over_each_other_and_their_ends_tabulated(tmp_path, monkeypatch, capsys):
    best = {"step": 2, "eval_loss": 0.25, "eval_accuracy": 0.75, "eval_plain_margin": 0.5}
    a = write(tmp_path / "a", [{"step": 0, "eval_loss": 0.1}, *steps(4, 1.0), best])
    b = write(tmp_path / "b", steps(2, 3.0))
    figure = tmp_path / "figures" / "runs.png"
    words = ["evaluate.py", "runs", str(a), str(b), "--out", str(figure)]
    monkeypatch.setattr(sys, "argv", words)
    run(evaluate.main)
    table = capsys.readouterr().out
    assert f"| {a} | 4 | 0.2500 | - | 0.2500 | 2 | 0.7500 | - | 0.5000 | 2.0000 |" in table
    assert f"| {b} | 2 | 1.5000 | - | - | - | - | - | - | 2.0000 |" in table
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_cannot_be_drawn_is_said_and_ends_nothing(tmp_path):
    out = write(tmp_path / "out", steps(2, 1.0))
    (out / "curves.png").mkdir()
    said = []
    ranks = SimpleNamespace(first=True, say=said.append)
    Metrics(SimpleNamespace(out=out, log=None), ranks, 3).plot()
    assert len(said) == 1 and "curves.png could not be drawn: " in said[0]


def test_an_unknown_logger_is_told():
    assert (
        logger_names("tensorboard, wandb") == ["tensorboard", "wandb"] and logger_names(None) == []
    )
    with pytest.raises(UserError, match="--log nothing: unknown; choose from tensorboard, wandb"):
        logger_names("nothing")
