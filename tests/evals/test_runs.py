"""Runs are drawn over each other, and their ends tabulated."""

import json
import re

import numpy as np
import pytest

import evaluate
from evals.stats import t_interval


def steps(n, loss):
    return [{"step": k + 1, "loss": loss / (k + 1), "pairs": 4, "seconds": 2.0} for k in range(n)]


def write(directory, rows, tail=""):
    directory.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text + tail)
    return directory


def sweep(folder, losses, **settings):
    """Run directories, one per seed, that end at these validation losses; plain margin 1 - loss."""
    for seed, loss in losses.items():
        best = {"step": 2, "eval_loss": loss, "eval_accuracy": 0.5, "eval_plain_margin": 1 - loss}
        out = write(folder / f"{settings['loss']}-{seed}", [*steps(2, 1.0), best])
        about = {"seed": seed, "out": str(out), "lr": 1e-5, "row_tokens": 2048 + seed} | settings
        (out / "config.json").write_text(json.dumps({"settings": about}))
        yield out


def rows_of(told):
    """The printed tables with a bar between their columns, which stand two spaces apart."""
    return re.sub("(?m)^| {2,}|$", " | ", told).replace("\n ", "\n").replace(" \n", "\n")


def test_seeds_end_in_a_table_with_paired_differences(tmp_path, call, capsys):
    """By hand: 0.5, 0.6, 0.7 has mean 0.6 and deviation 0.1; with 0.1 less on each of two shared
    seeds but for 0.02, the difference is -0.09 ± 12.706 * 0.0141421 / sqrt 2."""
    a = list(sweep(tmp_path, {0: 0.5, 1: 0.6, 2: 0.7}, loss="dpo"))
    b = list(sweep(tmp_path, {2: 0.6, 1: 0.52, 7: 0.3}, loss="ins_dpo"))
    one = list(sweep(tmp_path, {0: 0.25}, loss="ipo"))
    call(evaluate, "runs", *a, *b, *one, "--out", tmp_path / "runs.png")
    told = rows_of(capsys.readouterr().out)
    names = "best eval loss | its accuracy | its plain margin |"
    assert f"| group | seeds | {names}" in told
    assert "| loss dpo | 3 | 0.6000 ± 0.1000 | 0.5000 ± 0.0000 | 0.4000 ± 0.1000 |" in told
    assert "| loss ipo | 1 | 0.2500 | 0.5000 | 0.7500 |" in told
    assert f"| loss ins_dpo less loss dpo | {names}" in told
    assert "| seed 2 | -0.1000 | +0.0000 | +0.1000 |\n| seed 1 | -0.0800 |" in told
    assert "| mean [95%] | -0.0900 [-0.2171, +0.0371] | +0.0000 [+0.0000, +0.0000] |" in told
    assert "seed 7" not in told and told.count("mean [95%]") == 1


def test_a_group_is_named_by_what_sets_it_apart(tmp_path, call, capsys):
    runs = [*sweep(tmp_path, {0: 0.5, 1: 0.6}, loss="dpo")]
    for lr in (1e-5, 2e-5):
        runs += sweep(tmp_path / f"{lr}", {0: 0.5}, loss="dpo", lr=lr)
    call(evaluate, "runs", *runs, "--out", tmp_path / "runs.png")
    told = rows_of(capsys.readouterr().out)
    assert "| lr 1e-05 | 2 | 0.5500 ±" in told and "| lr 2e-05 | 1 | 0.5000 |" in told
    assert f"{runs[2]}: lr 1e-05, seed 0 is there already; left out of the groups" in told


@pytest.mark.parametrize("n, quantile", [(2, 12.7062), (3, 4.30265), (5, 2.77645), (31, 2.04227)])
def test_t_intervals_by_the_tables(n, quantile):
    values = np.arange(n, dtype=float)
    mean, low, high = t_interval(values)
    half = quantile * values.std(ddof=1) / n**0.5
    assert (mean, high - mean) == pytest.approx(((n - 1) / 2, half), rel=1e-3)
    assert mean - low == pytest.approx(high - mean)


def test_runs_are_drawn_over_each_other_and_their_ends_tabulated(tmp_path, call, capsys):
    best = {"step": 2, "eval_loss": 0.25, "eval_accuracy": 0.75, "eval_plain_margin": 0.5}
    a = write(tmp_path / "a", [{"step": 0, "eval_loss": 0.1}, *steps(4, 1.0), best])
    b = write(tmp_path / "b", steps(2, 3.0))
    figure = tmp_path / "figures" / "runs.png"
    call(evaluate, "runs", a, b, "--out", figure)
    table = rows_of(capsys.readouterr().out)
    assert f"| {a} | 4 | 0.2500 | - | 0.2500 | 2 | 0.7500 | - | 0.5000 | 2.0000 |" in table
    assert f"| {b} | 2 | 1.5000 | - | - | - | - | - | - | 2.0000 |" in table
    assert figure.read_bytes().startswith(b"\x89PNG")
