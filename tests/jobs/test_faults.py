"""A few faults of the harness, once each; tests/tools/faults.py injects them all, many times."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PAIRS
from jobs.cli import UserError
from pairs.read import Drops, read_pairs

FAULTS = ["SIGKILL of one rank of two", "one rank raises", "full disk at a checkpoint"]
FAULTS += ["full disk at the metrics", "Inf in one gradient", "SIGTERM to both ranks"]
FAULTS += ["full disk (tmpfs) from some step on", "NaN in the data's scores"]


@pytest.fixture(scope="module")
def table():
    """{fault: cells} as the command prints it; it fails where a check of a fault does."""
    words = [
        sys.executable,
        str(Path(__file__).parents[1] / "tools" / "faults.py"),
        "--times",
        "1",
        "--only",
    ]
    done = subprocess.run([*words, *FAULTS], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    return {name: cells for name, *cells in rows}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_recovers_exactly(fault, table):
    times, exact, *_ = table[fault]
    if times.startswith("0: "):
        pytest.skip(times.removeprefix("0: "))
    assert (times, exact) == ("1", "1")


SCORES = {"score_chosen": math.nan, "chosen-rating": math.inf, "all_rm_scores": [1.0, math.nan]}
FINE = [{"score_chosen": 4.5}, {"all_rm_scores": [1.0, 2.0]}, {"weight": math.nan}]


@pytest.mark.parametrize("column", SCORES)
def test_a_score_that_is_no_number_is_told_with_its_row(column, tmp_path):
    file = tmp_path / "scores.jsonl"
    rows = [json.dumps(PAIRS[0] | columns) + "\n" for columns in FINE]
    file.write_text("".join(rows))
    assert len(read_pairs(str(file), Drops())) == len(FINE)
    file.write_text("".join(rows) + json.dumps(PAIRS[0] | {column: SCORES[column]}) + "\n")
    with pytest.raises(UserError, match=f"{file}:4: {column} is (nan|inf); expected a finite"):
        read_pairs(str(file), Drops())
