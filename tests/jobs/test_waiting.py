"""OpenMP threads that wait give their core away: chosen before torch loads OpenMP."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.waiting import SPINS

ROOT = Path(__file__).parents[2]
CHOICES = {"OMP_WAIT_POLICY", *SPINS}


def openmp_says(script, **env):
    """{name: value} that the OpenMP of torch prints as it loads, in `import SCRIPT`."""
    env |= {k: v for k, v in os.environ.items() if k not in CHOICES} | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", f"import {script}"]
    done = subprocess.run(
        words, env=env | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"(\w+) = '(.*?)'", done.stderr))


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp prints what it has read")
def test_threads_spin_briefly_unless_the_user_has_chosen():
    assert openmp_says("train")["GOMP_SPINCOUNT"] == SPINS["GOMP_SPINCOUNT"]
    assert openmp_says("jobs.waiting, torch", GOMP_SPINCOUNT="7")["GOMP_SPINCOUNT"] == "7"
    chosen = openmp_says("jobs.waiting, torch", OMP_WAIT_POLICY="ACTIVE")
    assert int(chosen["GOMP_SPINCOUNT"]) > 10**6


@pytest.mark.parametrize("script", ["train", "generate", "evaluate"])
def test_every_command_chooses_before_anything_is_imported(script):
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    assert re.search(r"^(?:import|from) (\S+)", text, re.M).group(1) == "jobs.waiting"
