"""train.py with something broken in it: `python tests/tools/sabotage.py FAULT,… FLAGS …`.

The product has no hooks for faults: what is to break is replaced from outside, in the process, and
then train.py runs as it is.
"""

import errno
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


def nothing():
    """The whole run, undisturbed."""


def drawing():
    """The same, with its curves."""


HELD = 20  # seconds that a run waits at most for what is to hit it


def held():
    """In front of its last step but one, until it is hit: nothing can come too late."""
    _hold(lambda job: job.plan.steps - 1)


def held_halfway():
    """The same in front of the step behind its half."""
    _hold(lambda job: job.plan.steps // 2 + 1)


def _hold(at):
    """Wait in front of step at(job) for a signal, or for a file OUT.go that tells to go on."""
    from train import Run

    step = Run.step

    def waiting(self, number, stopping):
        until, go = time.monotonic() + HELD, Path(f"{self.s.out}.go")
        while number + 1 == at(self) and time.monotonic() < until:
            if self.ranks.stopping or go.exists():
                break
            time.sleep(0.01)
        return step(self, number, stopping or self.ranks.stopping)

    Run.step = waiting


def _break_step(number, what):
    """Run `what(job)` in front of the gradient's use in one step, on the last rank only."""
    from train import Run

    update = Run.update

    def broken(self, step, loss):
        if step + 1 == number and self.ranks.rank == self.ranks.world - 1:
            loss = what(self, loss)
        return update(self, step, loss)

    Run.update = broken


def inf_gradient():
    def poison(job, loss):
        gradient = next(job.model.parameters()).grad
        gradient.to_local()[0, 0] = math.inf
        return loss

    _break_step(8, poison)


def nan_loss():
    from train import Run

    backward = Run.backward

    def broken(self, row, pairs, *rest):
        totals = backward(self, row, pairs, *rest)
        return totals * math.nan if self.plan.pairs(7) == pairs else totals

    Run.backward = broken


def raising_rank():
    def fail(job, loss):
        raise RuntimeError("a board has caught fire")

    _break_step(8, fail)


def raise_once():
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        raising_rank()


def nan_reference():
    from train import Run

    score = Run.score

    def broken(self, model, dataset, pairs, paths, label=None):
        values = score(self, model, dataset, pairs, paths, label)
        if label:
            values[2] = math.nan
        return values

    Run.score = broken


def full_disk(path):
    """Writing `path`… fails as on a full disk."""
    from hub import weights
    from jobs import checkpoint

    def failing(function):
        def write(tensors, file, **options):
            if path in str(file):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            return function(tensors, file, **options)

        return write

    checkpoint.save_file = failing(checkpoint.save_file)
    weights.save_file = failing(weights.save_file)


def full_at_checkpoint():
    full_disk(".step-6")


def full_at_last_checkpoint():
    full_disk(".step-12")


def full_at_export():
    full_disk(".final")


def full_at_metrics():
    """A true limit of the kernel: no file of this process may grow beyond 1,500 bytes."""
    from jobs.rundir import Metrics

    write = Metrics.write

    def limited(self, line):
        if line.get("step") == 8:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            size = self.file.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
        write(self, line)

    Metrics.write = limited


def clock_backwards():
    true, begun = time.time, time.time()
    time.time = lambda: begun - 3 * (true() - begun)


def inside(names):
    """Break what is to be broken, then be train.py. names: of faults, with commas between."""
    import torch

    import train
    from jobs.cli import run
    from jobs.rundir import Metrics

    torch.set_num_threads(1)
    if "drawing" not in names:  # two thirds of the time of so short a run
        Metrics.plot = lambda self: None
    for name in names.split(","):
        FAULTS[name]()
    run(train.main)


FAULTS = {f.__name__: f for f in (nothing, drawing, held, held_halfway, inf_gradient, nan_loss,
          nan_reference, raising_rank, raise_once, full_at_checkpoint, full_at_last_checkpoint,
          full_at_export, full_at_metrics, clock_backwards)}  # fmt: skip

if __name__ == "__main__":
    inside(sys.argv.pop(1))
