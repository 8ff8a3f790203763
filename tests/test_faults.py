"""A few faults of the harness, once each; `python tests/faults.py` injects them all, many times."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PAIRS
from pairs import Drops, read_pairs

FAULTS = ["SIGKILL of one rank of two", "one rank raises", "full disk at a checkpoint"]
FAULTS += ["full disk at the metrics", "Inf in one gradient", "SIGTERM to both ranks"]
FAULTS += ["full disk (tmpfs) from some step on", "NaN and -Infinity in the data's scores"]


@pytest.fixture(scope="module")
def table():
    """{fault: cells} as the command prints it; it fails where a check of a fault does."""
    words = [sys.executable, str(Path(__file__).with_name("faults.py")), "--times", "1", "--only"]
    done = subprocess.run([*words, *FAULTS], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    return {name: cells for name, *cells in rows}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_recovers_exactly(fault, table):
    times, exact, *_ = table[fault]
    if times.startswith("0: "):
        pytest.skip(times.removeprefix("0: "))
    assert (times, exact) == ("1", "1")


SCORES = [
    {"score_chosen": math.nan},
    {"chosen-rating": math.inf},
    {"all_rm_scores": [1.0, math.nan]},
]
FINE = [
    {"score_chosen": 4.5},
    {"all_rm_scores": [1.0, 2.0]},
    {"weight": math.nan},
    {"score": "NaN?"},
]


def test_pairs_whose_scores_are_no_numbers_are_left_out_and_named(tmp_path):
    rows = [PAIRS[0] | columns for columns in (*FINE, *SCORES)]
    file = tmp_path / "scores.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_pairs(str(file), drops := Drops())) == len(FINE)
    assert str(drops) == "; ".join(
        f"1 {name} is no finite number ({file}:{len(FINE) + n})"
        for n, name in enumerate(("score_chosen", "chosen-rating", "all_rm_scores"), 1)
    )
