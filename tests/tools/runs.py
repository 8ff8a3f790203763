"""Runs of train.py with tiny arguments: in this process, as a command, and under torchrun.

A run is a dict of flags, {"loss": "ins_dpo", "resume": True, ...}.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train
from jobs import rundir
from jobs.processes import Ranks

ROOT = Path(__file__).parents[2]


def argv(flags):
    """{"lr": 1e-3, "resume": True} -> ["--lr", "0.001", "--resume"]"""
    words = []
    for name, value in flags.items():
        switch = value is True or value is False
        words += [f"--{'' if value else 'no-'}{name}"] if switch else [f"--{name}", str(value)]
    return words


def train_here(*runs):
    """These runs in this process, one after the other; under torchrun in all its processes."""
    torch.set_num_threads(1)  # as every other run of the tests, so that runs are bitwise equal
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    ranks = Ranks("cpu")
    try:
        for flags in runs:
            train.train(rundir.read_flags(train.TrainFlags, "", argv(flags)), ranks)
    finally:
        dist.destroy_process_group()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start_words(processes, nodes=1):
    """The command that starts train.py in so many processes, without its flags.

    nodes: how often the command will be started, to meet at a rendezvous as on as many machines.
    """
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    if nodes == 1:
        launcher += ["--standalone"]
    else:
        endpoint = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
        launcher += [f"--nnodes={nodes}", "--rdzv-backend=c10d", endpoint, "--rdzv-id=nodes"]
    alone = processes == nodes == 1
    return [sys.executable, *([] if alone else launcher), str(ROOT / "train.py")]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(flags, fault=None):
    """`python train.py` with these flags, started; stdout and stderr are captured as text.

    fault: one of sabotage.py, which is then started in its place.
    """
    script = [ROOT / "tests" / "tools" / "sabotage.py", fault] if fault else [ROOT / "train.py"]
    return _start([sys.executable, *map(str, script), *argv(flags)])


def torchrun(processes, *runs):
    """These runs under torchrun, waited for. Returns (exit status, stdout, stderr)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc-per-node={processes}", str(Path(__file__))]
    process = _start([*launcher, json.dumps(runs, default=str)])
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def _start(words, **options):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=env, **pipes | options)


def lines(out, key="loss"):
    """The lines of OUT/metrics.jsonl that have this key."""
    rows = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if key in row]


def losses(out):
    return torch.tensor([line["loss"] for line in lines(out)], dtype=torch.float64)


def final(out, name="final"):
    """{name: tensor} of the exported model."""
    return load_file(Path(out) / name / "model.safetensors")


def furthest(a, b):
    """The largest difference between two exported models."""
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


if __name__ == "__main__":
    train_here(*json.loads(sys.argv[1]))
