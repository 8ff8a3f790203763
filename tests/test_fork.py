"""Adding to a table takes what the README says: a fork that follows its page trains with it."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy of the project with the README's page on adding an objective carried out."""
    directory = tmp_path_factory.mktemp("fork") / "project"
    ignored = shutil.ignore_patterns(".*", "runs", "assets", "docs", "__pycache__")
    shutil.copytree(ROOT, directory, ignore=ignored)
    (directory / "assets").symlink_to(ROOT / "assets")
    page = (ROOT / "README.md").read_text(encoding="utf-8").split("### Add an objective")[1]
    function, row, test = re.findall(r"```python\n(.*?)```", page, re.S)
    losses = (directory / "losses.py").read_text(encoding="utf-8")
    losses = losses.replace("\n\ndef sft(", f"\n\n{function}\n\ndef sft(", 1)
    losses = losses.replace('    "sft": Objective(', f'{row}    "sft": Objective(', 1)
    (directory / "losses.py").write_text(losses, encoding="utf-8")
    with open(directory / "tests" / "test_losses.py", "a", encoding="utf-8") as f:
        f.write(f"\n\n{test}")
    add_condition_and_bridge(directory)
    return directory


def add_condition_and_bridge(directory):
    """The README's page on these two: a row at the head of each table."""
    page = (ROOT / "README.md").read_text(encoding="utf-8").split("### Add a condition")[1]
    rows = re.findall(r"```python\n(.*\n)(.*\n)```", page)[0]
    for row, name in zip(rows, ("losses.py: CONDITIONS", "data.py: BRIDGES"), strict=True):
        file, table = name.split(": ")
        text = (directory / file).read_text(encoding="utf-8")
        head = re.search(rf"^{table} = {{.*\n", text, re.M).end()
        (directory / file).write_text(text[:head] + row + text[head:], encoding="utf-8")


def python(fork, *words):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=fork, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("loss", ["hinge", "ins_hinge", "ifsr_hinge"])
def test_it_trains_in_all_three_forms(loss, fork, tiny_model_dir, pairs_file):
    """A hinge at margin 0 loses 1; the first step of the other forms sees conditioned answers."""
    words = ["--loss", loss, "--beta", "0.2", "--steps", "2", "--batch", "8", "--out", fork / loss]
    words += ["--model", tiny_model_dir, "--data", pairs_file, "--eval_pairs", "4"]
    out = python(fork, "train.py", *words, "--max_len", "256")
    assert f"{loss}: condition" in out and "beta 0.2" in out
    lines = (fork / loss / "metrics.jsonl").read_text().splitlines()
    first, second = (line for line in map(json.loads, lines) if "loss" in line)
    assert (first["loss"] == pytest.approx(1, abs=1e-5)) == (loss != "ins_hinge")
    assert first["grad_norm"] > 0 and second["step"] == 2
    assert (fork / loss / "final" / "model.safetensors").exists()


def test_its_test_passes_and_so_do_the_ones_it_got_for_nothing(fork):
    """Signs, finite extremes, swapped pairs, every condition and bridge: over the whole table."""
    words = ["tests/test_losses.py", "-k", "hinge", "-q", "-p", "no:cacheprovider"]
    passed = re.search(r"(\d+) passed", python(fork, "-m", "pytest", *words))
    assert int(passed.group(1)) > 20


def test_a_condition_and_a_bridge_train(fork, tiny_model_dir, pairs_file):
    """Policy and reference agree on every path at first; the bridge stands on both sides."""
    words = ["--loss", "dpo", "--condition", "averaged_one_sided", "--bridge", "quoted"]
    words += ["--steps", "1", "--batch", "8", "--out", fork / "quoted", "--eval_pairs", "4"]
    words += ["--model", tiny_model_dir, "--data", pairs_file, "--max_len", "256"]
    assert "dpo: condition averaged_one_sided, bridge quoted" in python(fork, "train.py", *words)
    lines = (fork / "quoted" / "metrics.jsonl").read_text().splitlines()
    first = next(line for line in map(json.loads, lines) if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["grad_norm"] > 0

    words = ["--model", tiny_model_dir, "--data", pairs_file, "--limit", "4", "--bridge", "quoted"]
    told = python(fork, "evaluate.py", "describe", *words, "--out", fork / "quoted.json")
    assert "averaged_one_sided" in told and "Another answer:" in told and "A better one:" in told
