"""The run directory OUT of train.py: chosen, held against other runs, described, reported to.

    OUT/.lock           held by the run while it lives
    OUT/config.json     every resolved setting, and the versions it ran on
    OUT/metrics.jsonl   one line per optimizer step, per validation and for the reference pass
    OUT/curves.png      loss, accuracy and margin over steps (InSPO Figure 2)

Checkpoints are checkpoint.py's.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import time
from pathlib import Path

import torch

from jobs.cli import UserError
from jobs.files import flush, read_json, replace, to_line, write_json

# what a resumed run may change: where and how it runs, not what it computes
MAY_CHANGE = ("out", "resume", "save_every", "keep", "device", "offload", "checkpoint_activations",
              "shard_group", "log", "revision")  # fmt: skip


@contextlib.contextmanager
def open_out(s, ranks):
    """Chooses, creates and holds the run directory; yields its path, the same on every rank.

    UserError for a directory that holds another run, unless it is to be resumed. The lock goes
    with the process.
    """
    logger_names(s.log)
    lock = contextlib.ExitStack()

    def choose():
        names = [Path("runs") / (s.loss + (f"-{n}" if n > 1 else "")) for n in range(1, 10**4)]
        free = next(n for n, path in enumerate(names) if not path.exists())
        out = Path(s.out or names[max(0, free - s.resume)])  # to resume: the last that is not free
        holds_run = (out / "config.json").exists() or any(out.glob("checkpoints/step-*"))
        if holds_run and not s.resume:
            raise UserError(f"--out {out} holds a run; add --resume to go on, or choose another")
        out.mkdir(parents=True, exist_ok=True)
        lock.enter_context(hold(out / ".lock", ranks.say))
        return str(out)

    with lock:
        yield ranks.share(choose)


def hold(file, say, patience=60):
    """Opens and locks a file; UserError if another process has it still after `patience` seconds.

    It is waited for, since a run whose launcher was killed may still be saving.
    """
    opened = open(file, "w", encoding="utf-8")  # noqa: SIM115
    fault = f"{file.parent}: another run is writing to it"
    for n in range(5 * patience):
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return opened
        except BlockingIOError:
            if n == 0:
                say(f"{fault}; waiting")
            time.sleep(0.2)
        except OSError as error:
            say(f"{file}: this file system keeps no locks ({error.strerror}); going on without")
            return opened
    raise UserError(f"--out {fault}")


def show(s, ranks, recipe, plan):
    """Print the resolved settings, so that nothing that decides the run is implicit."""
    hyper = ", ".join(f"{k} {v:g}" for k, v in recipe.hyper.items())
    ranks.say(
        f"{recipe.name}: condition {recipe.condition}, bridge {recipe.bridge}, "
        f"reference {recipe.reference if recipe.objective.uses_reference else 'none'}, {hyper}\n"
        f"model {s.model}, {s.dtype}, {s.attention} on {ranks.world} x {ranks.kind}\n"
        f"{plan.steps} steps of {s.batch} pairs, lr {s.lr:g} ({s.schedule}), max_len {s.max_len}, "
        f"row_tokens {s.row_tokens}, seed {s.seed}; out {s.out}"
    )


def check_config(s):
    """A resumed run must agree with OUT/config.json; UserError names the flag that does not."""
    file = Path(s.out) / "config.json"
    if not file.exists():
        return
    content = read_json(file)
    then = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(then, dict):
        raise UserError(f"{file}: holds no settings; not the config.json of a run")
    for name, value in dataclasses.asdict(s).items():
        if name not in MAY_CHANGE and (was := then.get(name)) != value:
            raise UserError(f"--resume: --{name} is {value}, but {file} has {was}")


def write_config(s, **extra):
    """Writes OUT/config.json: the resolved settings and versions, once nothing stands in the way.

    Before it is there, a start that failed can be corrected and tried again in the same OUT.
    """
    file = Path(s.out) / "config.json"
    if not file.exists():
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        write_json(file, {"settings": dataclasses.asdict(s), "versions": versions} | extra)


class Metrics:
    """OUT/metrics.jsonl, one line per step, validation and reference pass; and curves.png of it."""

    def __init__(self, s, ranks, step):
        self.file, self.active, self.loggers = Path(s.out) / "metrics.jsonl", ranks.first, []
        self.say = ranks.say
        if self.active:
            if self.file.exists():  # what follows `step` is repeated, its own validation included
                rows = read_metrics(self.file, self.say)
                kept = [row for row in rows if row.get("step", -1) < step + ("loss" in row)]
                replace(self.file, map(to_line, kept))
            for name in logger_names(s.log):
                try:
                    self.loggers.append(LOGGERS[name](s, step))
                except ImportError as error:
                    raise UserError(f"--log {name}: pip install {name}") from error

    def write(self, metrics):
        """One line of numbers; every logger gets the same names."""
        if self.active:
            with open(self.file, "a", encoding="utf-8") as f:
                f.write(json.dumps(metrics) + "\n")
            for write, _ in self.loggers:
                write(metrics)

    def flush(self):
        """Writes the lines through to disk."""
        if self.active and self.file.exists():
            flush(self.file)

    def close(self):
        self.plot()
        for _, close in self.loggers:
            close()

    def plot(self):
        """Loss, accuracy and margin over steps (InSPO Figure 2). A picture never ends a run."""
        if not self.active:
            return
        figure = self.file.with_name("curves.png")
        try:
            draw({None: read_metrics(self.file)}, figure)
        except Exception as error:  # a full disk, or one of matplotlib's own: fonts, caches, …
            self.say(f"{figure} could not be drawn: {error}")


def read_metrics(file, say=print):
    """The lines of metrics.jsonl. A last line that a kill tore is left out and said."""
    if not Path(file).exists():
        raise UserError(f"{file}: no such file; expected a run directory of train.py")
    rows, texts = [], Path(file).read_text(encoding="utf-8").splitlines()
    for n, text in enumerate(texts, 1):
        try:
            rows.append(json.loads(text))
        except ValueError as error:
            if n < len(texts):
                raise UserError(f"{file}:{n}: broken JSON; mend or remove the line") from error
            say(f"{file}:{n}: the last line is torn; left out")
    return rows


CURVES = {  # prefix of a metric: its line, and what the legend says
    "": ("-", "training"),
    "eval_": ("o-", "eval_…"),
    "eval_plain_": ("s--", "eval_plain_… (prompt alone)"),
}


def draw(runs, file):
    """{label or None: lines} -> a figure of loss, accuracy and margin over steps."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(13, 3.6 + 0.2 * (len(runs) - 1)), layout="constrained")
    shown = {}  # what the legend, below all panels, says: {(kind, run, text): one of its lines}
    for axis, name in zip(figure.subplots(1, 3), ("loss", "accuracy", "margin"), strict=True):
        for n, (label, lines) in enumerate(runs.items()):
            for k, (prefix, (style, about)) in enumerate(CURVES.items()):
                points = [(x["step"], x[prefix + name]) for x in lines if measured(x, prefix, name)]
                if points:
                    look = {"ms": 3.5, "lw": 1.2, "color": f"C{n if label else k}"}
                    (line,) = axis.plot(*zip(*points, strict=True), style, **look)
                    shown[k, n, f"{label}: {about}" if label else about] = line
        axis.set(title=name, xlabel="step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    if shown:
        keys, look = sorted(shown), {"frameon": False, "fontsize": 9, "ncols": len(CURVES)}
        told = [shown[key] for key in keys], [text for *_, text in keys]
        figure.legend(*told, loc="outside lower center", **look)
    figure.savefig(file, dpi=120)


def measured(x, prefix, name):
    """Whether a line of metrics has this one. Where the policy is still the reference no pair is
    won, which is no accuracy of 0."""
    tied = name == "accuracy" and x.get(f"{prefix}margin") == 0 == x.get(f"{prefix}accuracy")
    return prefix + name in x and not tied


def tensorboard(s, step):
    """--log tensorboard: event files in OUT/tensorboard -> (write, close)."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(Path(s.out) / "tensorboard", purge_step=step + 1)

    def write(metrics):
        for name in metrics.keys() - {"step"}:
            writer.add_scalar(name, metrics[name], metrics.get("step", 0))

    return write, writer.close


def wandb(s, step):
    """--log wandb: one run per OUT, gone on with by --resume; WANDB_* apply -> (write, close)."""
    import wandb as client

    name, file = Path(s.out).resolve().name, Path(s.out) / ".run-id"
    if not file.exists():  # it stays with the run directory, so that --resume goes on with it
        file.write_text(os.urandom(4).hex(), encoding="utf-8")
    where = {"project": "nanopo", "name": name, "id": file.read_text(), "dir": s.out}
    run = client.init(**where, config=vars(s), resume="allow")
    # wandb's own count of steps never goes back, as a run that is resumed does
    run.define_metric("*", step_metric="step")
    return run.log, run.finish


LOGGERS = {"tensorboard": tensorboard, "wandb": wandb}


def logger_names(log):
    """ "tensorboard,wandb" -> their names; UserError for one that does not exist."""
    names = [name.strip() for name in (log or "").split(",") if name.strip()]
    for name in names:
        if name not in LOGGERS:
            raise UserError(f"--log {name}: unknown; choose from {', '.join(LOGGERS)}")
    return names
