"""Runs are drawn over each other, and their ends tabulated."""

import json

import evaluate


def steps(n, loss):
    return [{"step": k + 1, "loss": loss / (k + 1), "pairs": 4, "seconds": 2.0} for k in range(n)]


def write(directory, rows, tail=""):
    directory.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text + tail)
    return directory


def test_runs_are_drawn_over_each_other_and_their_ends_tabulated(tmp_path, call, capsys):
    best = {"step": 2, "eval_loss": 0.25, "eval_accuracy": 0.75, "eval_plain_margin": 0.5}
    a = write(tmp_path / "a", [{"step": 0, "eval_loss": 0.1}, *steps(4, 1.0), best])
    b = write(tmp_path / "b", steps(2, 3.0))
    figure = tmp_path / "figures" / "runs.png"
    call(evaluate, "runs", a, b, "--out", figure)
    table = capsys.readouterr().out
    assert f"| {a} | 4 | 0.2500 | - | 0.2500 | 2 | 0.7500 | - | 0.5000 | 2.0000 |" in table
    assert f"| {b} | 2 | 1.5000 | - | - | - | - | - | - | 2.0000 |" in table
    assert figure.read_bytes().startswith(b"\x89PNG")
