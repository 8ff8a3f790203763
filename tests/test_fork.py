"""Adding to a table takes what the README says: a fork that follows it trains and stays green."""

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
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy of the project with the README's pages on adding to its tables carried out."""
    directory = tmp_path_factory.mktemp("fork") / "project"
    ignored = shutil.ignore_patterns(".*", "runs", "assets", "__pycache__")
    shutil.copytree(ROOT, directory, ignore=ignored)
    (directory / "assets").symlink_to(ROOT / "assets")
    page = README.split("### Add an objective")[1]
    blocks = re.findall(r"```(?:python|markdown)\n(.*?)```", page, re.S)
    function, row, test, told = blocks
    insert(directory / "losses.py", f"{function}\n\n", before="def sft(")
    insert(directory / "losses.py", row, before='    "sft": Objective(')
    insert(directory / "README.md", told, before="| `sft` |")
    with open(directory / "tests" / "test_losses.py", "a", encoding="utf-8") as f:
        f.write(f"\n\n{test}")
    add_condition_and_bridge(directory)
    return directory


def insert(file, text, before):
    whole = file.read_text(encoding="utf-8")
    assert before in whole
    file.write_text(whole.replace(before, text + before, 1), encoding="utf-8")


def add_condition_and_bridge(directory):
    """The README's page on these two: a row at the head of each table."""
    page = README.split("### Add a condition")[1]
    rows = re.findall(r"```python\n(.*\n)(.*\n)```", page)[0]
    for row, name in zip(rows, ("losses.py: CONDITIONS", "data.py: BRIDGES"), strict=True):
        file, table = name.split(": ")
        text = (directory / file).read_text(encoding="utf-8")
        head = re.search(rf"^{table} = {{.*\n", text, re.M).end()
        (directory / file).write_text(text[:head] + row + text[head:], encoding="utf-8")


def python(fork, *words, status=0, **env):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | env
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, cwd=fork, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
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


TESTS = [f"tests/test_{name}.py" for name in ("losses", "golden", "readme", "structure", "tour")]


def test_its_test_passes_and_so_do_the_ones_it_got_for_nothing(fork):
    """Signs, finite extremes, swapped pairs, every condition and bridge: over the whole table.

    One test fails until the README's command has written its page again, and names that command.
    """
    pytest_ = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", "not hypothesis"]
    golden = ["tests/test_golden.py", "-k", "page"]
    env, script = re.search(r"`(PYTHONPATH=\S+) python (\S+)`", README).groups()
    assert f"{env} python {script}" in python(fork, *pytest_, *golden, status=1)
    python(fork, script, PYTHONPATH=env.partition("=")[2])
    page = (fork / "tests" / "golden_paths.md").read_text(encoding="utf-8")
    assert "**averaged_one_sided, quoted**" in page and "Another answer:" in page
    told = python(fork, *pytest_, *TESTS)
    assert len(re.findall(r"hinge.* PASSED", told)) > 20


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

    words = ["--model", tiny_model_dir, "--prompt", "a?", "--draft", "b", "--mode", "refine"]
    words += ["--bridge", "quoted", "--max_new_tokens", "3", "--out", fork / "refined.jsonl"]
    python(fork, "generate.py", *words)
    assert json.loads((fork / "refined.jsonl").read_text())["bridge"] == "quoted"
