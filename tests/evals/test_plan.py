"""`evaluate.py plan` counts parameters as published, and bytes as autograd keeps them."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import train_here

import train
from evals import plan
from jobs.cli import UserError, parse
from kernels import memory
from model import Transformer, read_config

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "bench" / "shapes"
PUBLISHED = {  # parameters as the model cards' safetensors count them
    "llama-3-8b": 8_030_261_248,
    "mistral-7b-v0.2": 7_241_732_096,
    "gemma-2-9b": 9_241_705_984,
    "pythia-2.8b": 2_775_208_960,
    "qwen2-7b": 7_615_616_512,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
}


def test_every_shape_has_its_published_number_of_parameters():
    assert {file.name for file in SHAPES.iterdir()} == set(PUBLISHED)
    for name, expected in PUBLISHED.items():
        _, config = read_config(SHAPES / name)
        with torch.device("meta"):
            assert sum(p.numel() for p in Transformer(config).parameters()) == expected, name


def test_the_report_says_what_is_too_much():
    _, config = read_config(SHAPES / "llama-3-8b")
    first, lines, last = plan.memory_table(config, 8192)
    assert first.startswith("8,030,261,248 parameters")
    heads, one, _, eight = lines.splitlines()
    assert heads.split()[:2] == ["GPUs", "weights"] and one.count("(too much)") == 2
    assert eight.split()[0] == "8" and "too much" not in eight
    assert "80 GB" in last
    assert sum("too much" in line for line in plan.memory_table(config, 64, 10**12)) == 1  # legend


def test_plan_is_a_command(tmp_path):
    with pytest.raises(UserError, match="--model is missing"):
        plan.plan(plan.PlanFlags())
    words = [
        sys.executable,
        str(ROOT / "evaluate.py"),
        "plan",
        "--model",
        str(SHAPES / "llama-3-8b"),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0 and "\n8 " in done.stdout and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------- before it starts


def told(monkeypatch, config, gb, words="", world=8):
    """What training says of a run with these flags, on GPUs of so many gigabytes."""
    s, _ = train.resolve_flags(parse(train.TrainFlags, "", words.split()), "cpu")
    s = dataclasses.replace(s, dtype="bf16", row_tokens=s.row_tokens or 8192)
    monkeypatch.setattr(memory, "gpu_bytes", lambda device: gb * 10**9)
    ranks = SimpleNamespace(world=world, kind="cuda", device=0)
    s = dataclasses.replace(s, compile=True, **memory.fit_to_memory(s, config, ranks))
    return memory.shortage(s, config, ranks)


def test_training_says_what_does_not_fit_and_which_flag_helps(monkeypatch):
    _, config = read_config(SHAPES / "llama-3-8b")
    assert told(monkeypatch, config, 80, "--checkpoint_activations") == ""
    assert told(monkeypatch, config, 80) == "" and told(monkeypatch, config, 40) == ""
    said = told(monkeypatch, config, 80, "--keep_activations 1", world=4)
    assert "78.0 GB of each GPU, which has 72.0 to give" in said
    assert said.endswith("; add --checkpoint_activations")
    assert told(monkeypatch, config, 80, world=1).endswith("add --offload")
    assert told(monkeypatch, config, 141, "--shard_group 1").endswith("add --offload")
    assert told(monkeypatch, config, 10).endswith("take more GPUs, or a smaller --row_tokens")
    rows = "--checkpoint_activations false --row_tokens 2048 --shard_group 8"
    assert told(monkeypatch, config, 80, rows) == "" and told(monkeypatch, config, 30, rows) != ""


def test_the_readmes_node_command_fits_by_its_own_plan(monkeypatch):
    text = re.sub(r"\\\n", " ", (ROOT / "README.md").read_text(encoding="utf-8"))
    (words,) = re.findall(r"--nproc-per-node 8 train.py (.*Llama-3-8B.*)", text)
    _, config = read_config(SHAPES / "llama-3-8b")
    assert told(monkeypatch, config, 80, shlex.join(shlex.split(words))) == ""


def test_a_run_says_it_before_it_starts_and_on_a_cpu_says_nothing(
    flags, no_plots, monkeypatch, capsys
):
    flags |= {"loss": "simpo", "steps": 1}
    train_here(flags)
    assert "memory:" not in capsys.readouterr().out
    monkeypatch.setattr(memory, "gpu_bytes", lambda device: 10**5)
    check = memory.shortage
    gpu = SimpleNamespace(world=1, kind="cuda", device=0)
    monkeypatch.setattr(memory, "shortage", lambda s, config, ranks: check(s, config, gpu))
    train_here(flags | {"out": flags["out"] / "small"})
    out = capsys.readouterr().out
    assert 0 < out.index("memory: this run needs about") < out.index("step 0:")


def test_what_checkpoints_take_on_disk_is_said():
    """12 bytes a parameter; the best, the newest two and the one being written."""
    line = plan.disk_line(8_030_261_248, keep=2)
    assert "a checkpoint 96.4 GB" in line and "at most 418 GB" in line
