"""The run directory OUT of train.py: chosen, held against other runs, and described in config.json.

OUT/config.json   every resolved setting, and the versions it ran on
OUT/.lock         held by the run while it lives
"""

import contextlib
import dataclasses
import fcntl
import platform
import time
from pathlib import Path

import torch

from jobs.cli import UserError
from jobs.files import parse_json, write_json

# what a resumed run may change: where and how it runs, not what it computes
MAY_CHANGE = ("out", "resume", "save_every", "keep", "device", "offload", "checkpoint_activations",
              "shard_group", "log", "revision")  # fmt: skip


@contextlib.contextmanager
def open_out(s, ranks):
    """Chooses, creates and holds the run directory; yields its path, the same on every rank.

    UserError for a directory that holds another run, unless it is to be resumed. The lock goes
    with the process.
    """
    lock = contextlib.ExitStack()

    def choose():
        out = Path(s.out or _free_name(s.loss, s.resume))
        holds_run = (out / "config.json").exists() or any(out.glob("checkpoints/step-*"))
        if holds_run and not s.resume:
            raise UserError(f"--out {out} holds a run; add --resume to go on, or choose another")
        out.mkdir(parents=True, exist_ok=True)
        lock.enter_context(hold(out / ".lock", ranks.say))
        return str(out)

    with lock:
        yield ranks.share(choose)


def _free_name(loss, resume):
    """runs/LOSS, or the first of runs/LOSS-2, … that is free; to resume, the last that is not."""
    names = (Path("runs") / (loss + (f"-{n}" if n > 1 else "")) for n in range(1, 10**6))
    taken = None
    for path in names:
        if not path.exists():
            return taken if resume and taken else path
        taken = path


@contextlib.contextmanager
def hold(file, say, patience=60):
    """Holds a lock file; UserError if another process still has it after `patience` seconds.

    It is waited for, since a run whose launcher was killed may still be saving.
    """
    with open(file, "w", encoding="utf-8") as f:
        until, said = time.monotonic() + patience, False
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(f"--out {file.parent}: another run is writing to it") from None
                if not said:
                    say(f"{file.parent}: another run is writing to it; waiting")
                said = True
                time.sleep(0.2)
            except OSError as error:
                say(f"{file}: this file system keeps no locks ({error.strerror}); going on without")
                break
        yield


def show(s, ranks, recipe, plan):
    """Print the resolved settings, so that nothing that decides the run is implicit."""
    hyper = ", ".join(f"{k} {v:g}" for k, v in recipe.hyper.items())
    ranks.say(
        f"{recipe.name}: condition {recipe.condition}, bridge {recipe.bridge}, "
        f"reference {recipe.reference if recipe.objective.uses_reference else 'none'}, {hyper}\n"
        f"model {s.model}, {s.dtype}, {s.attention} on {ranks.world} x {ranks.kind}\n"
        f"{plan.steps} steps of {s.batch} pairs, lr {s.lr:g}, max_len {s.max_len}, "
        f"row_tokens {s.row_tokens}, seed {s.seed}; out {s.out}"
    )


def check_config(s, ranks):
    """A resumed run must agree with OUT/config.json; UserError names the flag that does not."""
    file, now = Path(s.out) / "config.json", dataclasses.asdict(s)

    def check():
        if not file.exists():
            return
        content = parse_json(file.read_text(encoding="utf-8"), str(file))
        then = content.get("settings") if isinstance(content, dict) else None
        if not isinstance(then, dict):
            raise UserError(f"{file}: holds no settings; not the config.json of a run")
        for name, value in now.items():
            if name not in MAY_CHANGE and then.get(name) != value:
                was = then.get(name)
                raise UserError(f"--resume: --{name} is {value}, but {file} has {was}")

    ranks.share(check)


def write_config(s, ranks, extra):
    """Writes OUT/config.json: the resolved settings and versions, once nothing stands in the way.

    Before it is there, a start that failed can be corrected and tried again in the same OUT.
    """
    file = Path(s.out) / "config.json"

    def write():
        if file.exists():
            return
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        content = {"settings": dataclasses.asdict(s), "versions": versions, "ranks": ranks.world}
        write_json(file, content | extra)

    ranks.share(write)
