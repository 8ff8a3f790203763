"""A few faults of the harness, once each; `python tests/faults.py` injects them all, many times."""

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = ["SIGKILL of one rank of two", "one rank raises", "full disk at a checkpoint"]
FAULTS += ["full disk at the metrics", "Inf in one gradient", "SIGTERM to both ranks"]


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
    assert table[fault][:2] == ["1", "1"]
