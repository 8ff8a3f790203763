"""Do a device's defaults train as the plain rule does, and does a stopped run go on where it was?

    python -m bench.defaults --shape small --mix hh --pairs 16 --batch 4
    python -m bench.defaults --device cuda --dtype bf16 --shape llama-3.2-1b --mix hh --only plain

*Plain*: three steps with the defaults, by `--attention sdpa --no-compile`, and by that in fp32, of
the same pairs. Losses and movements of the weights are told as distances from fp32's (norm of the
difference over the norm); defaults that are more than four times as far as the plain rule in the
same dtype are an error. AdamW moves by signs, which rounding turns where a gradient is nearly 0.

*Resume*: `train.py` for six steps, and again, stopped by SIGTERM behind the third and resumed. On
a CPU the two are bitwise equal. On CUDA some sums have no fixed order: there an error is a second
half that moves the weights elsewhere by more than 5%.
"""

import gc
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from runs import command, lines, losses
from splits import weights

from bench import measuring, training
from bench.inputs import WorkloadFlags
from bench.measuring import table
from jobs.cli import UserError, flag, parse, run
from kernels.check import FLOOR, TIMES
from train import TrainFlags

PLAIN = {"attention": "sdpa", "compile": False}


@dataclass(frozen=True)
class DefaultsFlags(WorkloadFlags):
    """Flags."""

    only: str | None = flag(None, "plain; resume; default: both")
    steps: int = flag(3, "steps by the plain rule, and before the stop; behind it as many")
    batch: int = flag(8, "pairs per step")
    lr: float = flag(1e-5, "learning rate")
    out: str = flag("bench/out/defaults.json", "where the figures go")


def distance(found, exact):
    """Norm of the difference of two lists of tensors, over the norm of the second."""
    gap = sum((a.double() - b.double()).square().sum() for a, b in zip(found, exact, strict=True))
    return (gap / sum(b.double().square().sum() for b in exact)).sqrt().item()


def trained(flags):
    """{"losses", "weights": their movements} of a run's steps, in this process."""
    with training.opened(TrainFlags(**flags), 0) as (job, _):
        own = [p.detach().to_local() for p in job.model.parameters()]
        before = [w.to("cpu", copy=True) for w in own]
        found = [torch.tensor([job.step(k, False)[0]["loss"]]) for k in range(job.plan.steps)]
        moved = [w.cpu() - b for w, b in zip(own, before, strict=True)]
    del job, own
    gc.collect()  # FSDP's hooks hold the model in circles, and the next one wants its memory
    return {"losses": found, "weights": moved}


def plain(s, flags):
    """{contender: (losses, distance of these from fp32's, that of the weights' movements)}."""
    ways = {"plain rule in fp32": PLAIN | {"dtype": "fp32"}, "plain rule": PLAIN, "defaults": {}}
    runs = {name: trained(flags | way) for name, way in ways.items()}
    exact = runs["plain rule in fp32"]
    far = {n: [distance(x[k], exact[k]) for k in exact] for n, x in runs.items()}
    for what, gap, rounding in zip(exact, far["defaults"], far["plain rule"], strict=True):
        if not gap <= max(FLOOR, TIMES * rounding):
            told = f"{what} of the defaults are {gap:.1%} from the plain rule in fp32"
            raise UserError(f"{told}, where rounding explains {rounding:.1%}")
    return {n: ([loss.item() for loss in x["losses"]], *far[n]) for n, x in runs.items()}


def resume(s, flags):
    """{contender: as of `plain`} of a stopped and resumed run, from one that was not stopped."""
    steps = 2 * s.steps
    flags |= {"steps": steps, "save_every": s.steps, "keep": 9, "eval_pairs": 0}
    with tempfile.TemporaryDirectory() as scratch:
        whole, halved = Path(scratch) / "whole", Path(scratch) / "halved"
        finish(command(flags | {"out": whole}))
        process = command(flags | {"out": halved})
        while process.poll() is None and not reached(halved, s.steps):
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        finish(process, 128 + signal.SIGTERM)
        finish(command(flags | {"out": halved, "resume": True}))
        base, a, b = weights(whole, s.steps), weights(whole, steps), weights(halved, steps)
        both, n = (losses(whole), losses(halved)), len(lines(halved))
    moved = distance(*([w[k] - base[k] for k in base] for w in (b, a)))
    if n != steps or not moved <= 0.05:
        raise UserError(f"the resumed run took {n} steps and moved its weights {moved:.1%} away")
    equal = torch.equal(*both) and all(torch.equal(a[k], b[k]) for k in a)
    name = "stopped and resumed" + ", bitwise equal" * equal
    return {name: (both[1].tolist(), distance(both[1:], both[:1]), moved)}


def reached(out, step):
    """Whether the metrics of a run hold this step."""
    return (out / "metrics.jsonl").exists() and len(lines(out)) >= step


def finish(process, status=0):
    """Wait for a run of train.py; UserError where it ends in another way."""
    _, told = process.communicate()
    if process.returncode != status:
        raise UserError(f"train.py ended with {process.returncode}, not {status}:\n{told[-2000:]}")


def main():
    s, found = parse(DefaultsFlags, __doc__.splitlines()[0]), {}
    parts = {"plain": plain, "resume": resume}
    with s.ready() as (model, data):
        flags = s.train_flags(model, data) | {"loss": "ins_dpo", "batch": s.batch, "lr": s.lr}
        flags |= {"steps": s.steps, "warmup": 0.0}
        for name in measuring.chosen(s.only, parts):
            found |= parts[name](s, flags)
    rows = [(n, " ".join(f"{x:.4f}" for x in losses), *(f"{d:.2%}" for d in far))
            for n, (losses, *far) in found.items()]  # fmt: skip
    headers = ("ins_dpo", "losses", "losses apart", "movements apart")
    measuring.tell(s, found, table(headers, rows))


if __name__ == "__main__":
    run(main)
