"""What a run survives: `python tests/tools/faults.py` injects every fault and prints a table.

Each fault hits a run of the embedded tiny model, which is then started again with --resume as a
user would. "Recovered exactly" counts the runs whose weights, bitwise, and losses then equal those
of the run that nothing disturbed. "Seconds lost" is what the resumed run had to do again: the
steps after its last whole checkpoint. Faults are injected from outside (signals, limits of the
process, mounts), or inside it by sabotage.py: the product has no hooks.

    python tests/tools/faults.py [--times 5] [--seed 0] [--only NAME …]   # docs/guarantees.md
"""

import argparse
import contextlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from runs import ROOT, argv, free_port  # noqa: E402  brings torch and train.py, before the forks
from sabotage import inside  # noqa: E402

STEPS, SAVE_EVERY = 12, 3
FLAGS = {"model": ROOT / "assets" / "start", "data": ROOT / "assets" / "world" / "pairs.jsonl",
         "loss": "ins_dpo", "steps": STEPS, "save_every": SAVE_EVERY, "eval_every": 6, "batch": 4,
         "limit": 24, "eval_pairs": 4, "max_len": 256, "row_tokens": 512, "lr": 3e-4}  # fmt: skip
LIMIT = 600  # seconds that any run may take: a hang

# ----------------------------------------------------------------------------- starting runs


class Processes:
    """The ranks of a run, forked from this process, which has imported torch but not used it.

    No launcher watches over them: what ends them all when one fails is the product itself.
    """

    def __init__(self, out, processes, fault, flags):
        self.status, port = {}, str(free_port())
        for rank in range(processes):
            pid = os.fork()
            if not pid:
                self._be(rank, processes, port, out, fault, flags)
            self.status[pid] = None

    def _be(self, rank, world, port, out, fault, flags):
        """In the child: a rank of the run, and never anything of the harness again."""
        status = 1
        try:
            log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            if world > 1:
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= address | {"RANK": str(rank), "WORLD_SIZE": str(world)}
                os.environ |= {"LOCAL_RANK": str(rank)}
            sys.argv = ["train.py", *argv(flags)]
            inside(fault)
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)

    def poll(self):
        """The worst exit status, or None while a rank still runs."""
        for pid in [pid for pid, status in self.status.items() if status is None]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.status[pid] = os.waitstatus_to_exitcode(status)
        found = list(self.status.values())
        return None if None in found else max(found, key=abs)

    def kill(self, number=signal.SIGKILL, pids=None):
        for pid in self.status if pids is None else pids:
            if self.status[pid] is None:
                os.kill(pid, number)


class Launched:
    """A run under torchrun; the same face as Processes, with the launcher in front."""

    def __init__(self, out, processes, fault, flags, restarts):
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
        words += [str(ROOT / "tests" / "tools" / "sabotage.py"), fault, *argv(flags)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(f"{out}.log", "a", encoding="utf-8") as log:
            self.launcher = subprocess.Popen(words, env=env, stdout=log, stderr=log)

    def poll(self):
        return self.launcher.poll()

    def kill(self, number=signal.SIGKILL):
        self.launcher.send_signal(number)


def start(out, processes=1, fault="nothing", restarts=None, **flags):
    """A run, started; `fault` names one of sabotage.py; restarts: under torchrun. -> its face"""
    flags = FLAGS | flags | {"out": out}
    if restarts is None:
        return Processes(out, processes, fault, flags)
    return Launched(out, processes, fault, flags, restarts)


def finish(process, limit=LIMIT):
    """Its exit status; everything is killed should it hang."""
    until = time.monotonic() + limit
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    if process.poll() is None:
        process.kill()
        raise AssertionError("hung")
    return process.poll()


def log_of(out):
    file = Path(f"{out}.log")
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def rows(out):
    file = Path(out) / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [row for row in map(json.loads, whole) if "loss" in row]


def result(out):
    """What must not depend on faults: the final weights and the loss of every step."""
    weights = (Path(out) / "final" / "model.safetensors").read_bytes()
    return weights, [(row["step"], row["loss"]) for row in rows(out)]


def when(out, sign, process):
    """Wait until sign(out) is true, or the run is over."""
    until = time.monotonic() + LIMIT
    while not sign(out) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)


# ----------------------------------------------------------------------------- signs of a moment


def at_step(n):
    return lambda out: len(rows(out)) >= n


def saving(out):
    return any(Path(out, "checkpoints").glob(".step-*"))


def in_reference(out):
    return "reference train" in log_of(out)


# ----------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def small_disk(place, megabytes):
    """A file system of its own, mounted at `place`. Needs root, and skips the fault without."""
    place.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    if subprocess.run(words, capture_output=True).returncode:
        raise Impossible("needs root, to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def filled(place):
    """Not a byte is free there until the end of the block."""
    filler = Path(place) / "filler"
    with open(filler, "wb", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(bytes(2**16))
    yield
    filler.unlink()


class Impossible(Exception):
    """A fault that cannot be injected here, and why."""


# ----------------------------------------------------------------------------- the faults


class Harness:
    """Runs faults in `directory`, against undisturbed runs of 1 and 2 processes made once."""

    def __init__(self, directory, seed):
        self.directory, self.rng = Path(directory), random.Random(seed)
        self.whole, self.count, self.moments = {}, 0, Counter()

    def moment(self):
        """A random moment: a step, the middle of saving, or the reference pass."""
        name = self.rng.choice(("steps", "saves", "reference passes"))
        self.moments[name] += 1
        at, late = at_step(self.rng.randrange(1, STEPS - 1)), at_step(STEPS - 2)
        sign = {"steps": at, "saves": saving, "reference passes": in_reference}[name]
        return lambda out: sign(out) or late(out)

    def out(self):
        self.count += 1
        return self.directory / f"run-{self.count}"

    def undisturbed(self, processes):
        if processes not in self.whole:
            out = self.directory / f"whole-{processes}"
            assert finish(start(out, processes)) == 0, log_of(out)
            self.whole[processes] = result(out)
        return self.whole[processes]

    def recover(self, out, processes):
        """Resume as a user would -> (recovered exactly, seconds of steps done again)."""
        before = rows(out)
        mark = len(log_of(out))
        assert finish(start(out, processes, resume=True)) == 0, log_of(out)[-3000:]
        found = re.search(r"resuming from .*step-(\d+)", log_of(out)[mark:])
        first = int(found.group(1)) if found else 0
        again = sum(row["seconds"] for row in before if row["step"] > first)
        return result(out) == self.undisturbed(processes), again

    # each returns (exact, seconds lost), having asserted what the fault must look like

    def killed(self, processes, how_many):
        out = self.out()
        process = start(out, processes, "held")
        when(out, self.moment(), process)
        process.kill(pids=self.rng.sample(list(process.status), how_many))
        assert finish(process) != 0
        return self.recover(out, processes)

    def launcher_killed(self):
        """The ranks are orphans then: they save, end, and let the resumed run have OUT."""
        out = self.out()
        process = start(out, 2, "held", restarts=0)
        when(out, self.moment(), process)
        process.kill()
        assert finish(process) != 0
        return self.recover(out, 2)

    def signalled(self, number, processes=1, restarts=None):
        out = self.out()
        process = start(out, processes, "held", restarts=restarts)
        when(out, at_step(self.rng.randrange(1, STEPS - 2)), process)
        process.kill(number)
        status, said = finish(process), log_of(out)
        assert "; --resume goes on from here" in said, said[-3000:]
        assert status == (128 + number if restarts is None else 1), "torchrun's own is 1"
        return self.recover(out, processes)

    def broken(self, fault, message, status=2, processes=1, seconds=120):
        out = self.out()
        process = start(out, processes, fault)
        when(out, lambda out: message in log_of(out), process)
        begun = time.monotonic()
        found = finish(process)
        assert time.monotonic() - begun < seconds, "the others must not wait for minutes"
        assert found == status, log_of(out)[-3000:]
        assert message in log_of(out), log_of(out)[-3000:]
        return self.recover(out, processes)

    def unharmed(self, fault, message, processes=1, **options):
        """Faults that end nothing: the run itself must come out as the undisturbed one."""
        out = self.out()
        assert finish(start(out, processes, fault, **options)) == 0, log_of(out)[-3000:]
        assert message in log_of(out)
        assert all(row["seconds"] >= 0 for row in rows(out))
        return result(out) == self.undisturbed(processes), 0.0

    def full_for_a_while(self):
        """No checkpoint can be written for a time: training goes on, later ones are whole."""
        out, message = self.out(), "No space left on device"
        with small_disk(out / "checkpoints", 64):
            process = start(out, fault="held_halfway")
            when(out, at_step(self.rng.randrange(1, STEPS // 2)), process)
            with filled(out / "checkpoints"):
                Path(f"{out}.go").touch()
                when(out, lambda out: message in log_of(out), process)
            assert finish(process) == 0, log_of(out)[-3000:]
            assert f"{message} (os error 28); training goes on" in log_of(out), log_of(out)
            assert len(list((out / "checkpoints").glob("step-*"))) >= 2
            return result(out) == self.undisturbed(1), 0.0

    def full_for_good(self):
        """Metrics, checkpoints and exports find a full disk; the last line says what ended it."""
        out = self.out()
        with small_disk(out, 64):
            process = start(out, fault="drawing,held")
            when(out, at_step(self.rng.randrange(1, STEPS - 1)), process)
            with filled(out):
                Path(f"{out}.go").touch()
                assert finish(process) == 2, log_of(out)[-3000:]
            error = log_of(out).splitlines()[-1]
            assert error.startswith("error: ") and "No space left on device" in error, error
            assert "Traceback" not in log_of(out)
            return self.recover(out, 1)

    def bad_score(self, value):
        """A score of the data is no number: the row is named, and the mended file trains."""
        out, data = self.out(), self.directory / "scores.jsonl"
        rows = list(map(json.loads, FLAGS["data"].read_text(encoding="utf-8").splitlines()))
        rows[9] |= {"score_chosen": 1.0, "score_rejected": value}
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        assert finish(start(out, data=data)) == 2, log_of(out)
        error = f"error: {data}:10: score_rejected is {value}; expected a finite number or null\n"
        assert log_of(out) == error, log_of(out)
        return self.recover(out, 1)

    def other_reference(self):
        """A reference cache that another model left in OUT, found by a run of its own."""
        donor, out = self.out(), self.out()
        other = ROOT / "assets" / "start-single"
        assert finish(start(donor, model=other)) == 0, log_of(donor)
        out.mkdir()
        cache = "reference.safetensors"
        (out / cache).write_bytes((donor / cache).read_bytes())
        assert finish(start(out)) == 0
        assert "belongs to other weights, data or settings; computing it again" in log_of(out)
        return result(out) == self.undisturbed(1), 0.0

    def unwritable(self):
        """OUT below a plain file: one line, and a run elsewhere is not disturbed."""
        (self.directory / "file").write_text("")
        out = self.directory / "file" / "out"
        log = self.out()
        process = Processes(log, 1, "nothing", FLAGS | {"out": out})
        assert finish(process) == 2
        assert log_of(log).count("\n") == 1 and str(out) in log_of(log)
        assert "Not a directory" in log_of(log)
        return True, 0.0


FAULTS = {
    "SIGKILL of the only process": lambda h: h.killed(1, 1),
    "SIGKILL of one rank of two": lambda h: h.killed(2, 1),
    "SIGKILL of both ranks": lambda h: h.killed(2, 2),
    "SIGTERM": lambda h: h.signalled(signal.SIGTERM),
    "SIGINT": lambda h: h.signalled(signal.SIGINT),
    "SIGTERM to both ranks": lambda h: h.signalled(signal.SIGTERM, 2),
    "SIGTERM to torchrun": lambda h: h.signalled(signal.SIGTERM, 2, restarts=0),
    "SIGKILL of torchrun": lambda h: h.launcher_killed(),
    "one rank raises": lambda h: h.broken(
        "raising_rank", "rank 1: a board has caught fire", status=1, processes=2
    ),
    "one rank raises, torchrun --max-restarts 1": lambda h: h.unharmed(
        "raise_once", "resuming from", processes=2, restarts=1
    ),
    "NaN in the loss": lambda h: h.broken("nan_loss", "step 8: loss nan"),
    "Inf in one gradient": lambda h: h.broken("inf_gradient", "gradient norm inf"),
    "NaN in a reference log-probability": lambda h: h.broken(
        "nan_reference", "its reference log-probability is not finite"
    ),
    "NaN in the data's scores": lambda h: h.bad_score(math.nan),
    "-Infinity in the data's scores": lambda h: h.bad_score(-math.inf),
    "reference cache of other weights": lambda h: h.other_reference(),
    "full disk at a checkpoint": lambda h: h.unharmed(
        "full_at_checkpoint", "No space left on device"
    ),
    "full disk at the last checkpoint": lambda h: h.broken(
        "full_at_last_checkpoint", "No space left on device"
    ),
    "full disk at the metrics": lambda h: h.broken("full_at_metrics", "File too large"),
    "full disk at the export": lambda h: h.broken("full_at_export", "No space left on device"),
    "full disk (tmpfs) under the checkpoints, freed later": lambda h: h.full_for_a_while(),
    "full disk (tmpfs) from some step on": lambda h: h.full_for_good(),
    "unwritable OUT": lambda h: h.unwritable(),
    "clock going backwards": lambda h: h.unharmed("clock_backwards", "saved: "),
}
DRAWN = ("SIG", "full disk (tmpfs)")  # their moment is drawn: worth repeating


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5, help="of each fault at a random moment")
    parser.add_argument("--only", nargs="*", default=list(FAULTS), help="some faults by name")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    print("| fault | times injected | recovered exactly | seconds lost (mean) | in |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory:
        harness = Harness(directory, options.seed)
        for name in options.only:
            times = options.times if name.startswith(DRAWN) else 1
            try:
                results = [FAULTS[name](harness) for _ in range(times)]
            except Impossible as why:
                print(f"| {name} | 0: {why} | | | |", flush=True)
                continue
            lost = sum(seconds for _, seconds in results) / times
            exact = sum(bool(same) for same, _ in results)
            drawn = ", ".join(f"{n} {what}" for what, n in harness.moments.items())
            harness.moments.clear()
            print(f"| {name} | {times} | {exact} | {lost:.1f} | {drawn} |", flush=True)


if __name__ == "__main__":
    main()
