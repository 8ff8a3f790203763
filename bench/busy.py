"""What other busy processes cost a training run, by how its OpenMP threads wait (jobs/waiting.py).

    python -m bench.busy [--repeat 3] [--only "chosen here; as OpenMP does"]

The embedded run of `torchrun train.py --loss ins_dpo`, cut to a few steps: alone, and beside loops
that this command starts and ends. All contenders run in turn, alone and busy, so that a machine
that has other work too disturbs them alike; the load average is kept with the figures.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.measuring import ROOT, chosen, in_turn, median, table, tell, times
from jobs.cli import flag, parse, run
from jobs.rundir import read_metrics
from jobs.waiting import SPINS

WAITING = {  # name: environment
    "chosen here": {},
    "as OpenMP does": {"GOMP_SPINCOUNT": "300000"},  # libgomp, where nothing is chosen
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


@dataclass(frozen=True)
class BusyFlags:
    """Flags."""

    steps: int = flag(12, "optimizer steps of a run")
    repeat: int = flag(3, "runs of each contender")
    loops: int = flag(2, "busy processes")
    patience: float = flag(300.0, "seconds after which a run is given up and counted so")
    only: str | None = flag(None, "contenders by name, with semicolons between them; default: all")
    out: str = flag("bench/out/busy.json", "where the figures go")


def measure(s, variables, loops):
    """Seconds of a whole run, and of its median step, beside so many busy processes."""
    given = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", *SPINS}
    env = {k: v for k, v in os.environ.items() if k not in given} | variables
    words = [sys.executable, str(ROOT / "train.py"), "--steps", str(s.steps), "--out"]
    with tempfile.TemporaryDirectory() as out, busy(loops):
        begun, seconds = time.perf_counter(), s.patience
        with contextlib.suppress(subprocess.TimeoutExpired):
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run([*words, out], env=env, check=True, timeout=s.patience, **pipes)
            seconds = time.perf_counter() - begun
        file = Path(out) / "metrics.jsonl"
        steps = [x["seconds"] for x in read_metrics(file) if "loss" in x] if file.exists() else []
    return {"run": seconds, "step": statistics.median(steps) if steps else None,
            "load": os.getloadavg()[0]}  # fmt: skip


@contextlib.contextmanager
def busy(loops):
    """So many processes that take all they get, until the end of the block."""
    words = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(words) for _ in range(loops)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main():
    s, contenders = parse(BusyFlags, __doc__.splitlines()[0]), {}
    for name in chosen(s.only, WAITING):
        for loops in (0, s.loops):
            contenders[name, loops] = partial(measure, s, WAITING[name], loops)
    runs, rows = in_turn(contenders, s.repeat), []
    found = {key: median(figures) for key, figures in runs.items()}
    base = found.get(("as OpenMP does", 0), {})
    for name in dict.fromkeys(name for name, _ in found):
        idle, loaded = found[name, 0], found[name, s.loops]
        row = [name]
        for what in ("step", "run"):
            ratios = times(loaded[what], idle[what]), times(idle[what], base.get(what))
            row += [idle[what], loaded[what], *ratios]
        rows.append(row)
    heads = ["alone", f"{s.loops} loops", "busy / alone", "alone / OpenMP's"]
    heads = [f"{what}: {head}" for what in ("step, s", "run, s") for head in heads]
    figures = {f"{name}, {loops} loops": figures for (name, loops), figures in runs.items()}
    tell(s, figures, table(["threads wait", *heads], rows))


if __name__ == "__main__":
    run(main)
