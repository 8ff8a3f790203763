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
import importlib.util
import itertools
import json
import math
import os
import platform
import time
from pathlib import Path

import torch

from jobs.cli import UserError, parse
from jobs.files import flush, read_json, remove, replace, rows_in, to_line, write_json

# what a resumed run may change: where and how it runs, not what it computes
MAY_CHANGE = ("out", "resume", "save_every", "eval_every", "keep", "device", "offload",
              "checkpoint_activations", "keep_activations", "shard_group", "log",
              "revision")  # fmt: skip
# what it may change of what is computed, from there on; not given, it is as before
TUNABLE = ("lr", "warmup", "schedule", "final_lr", "weight_decay", "clip", "steps", "epochs")


@contextlib.contextmanager
def open_out(s, ranks):
    """Chooses, creates and holds the run directory; yields its path, the same on every rank.

    UserError for a directory that holds another run, unless it is to be resumed. The lock goes
    with the process.
    """
    logger_names(s.log)
    lock = contextlib.ExitStack()

    def choose():
        for out in run_directories(s):
            out.mkdir(parents=True, exist_ok=True)
            held = hold(out / ".lock", ranks.say, 60 if s.resume else 0)
            # looked at under the lock, so that of two starts on one OUT only one trains
            holds_run = (out / "config.json").exists() or any(out.glob("checkpoints/step-*"))
            if held and (s.resume or not holds_run):  # what a failed start left is no run
                if not s.out:
                    lock.callback(remove_unused, out)
                lock.enter_context(held)
                return str(out)
            if s.out or s.resume:
                fault = " holds a run; add --resume to go on, or choose another"
                raise UserError(f"--out {out}{fault if held else ': another run is writing to it'}")
            if held:
                held.close()

    with lock:
        yield ranks.share(choose)


def run_directories(s):
    """The directories that may be OUT, the likeliest first: runs/LOSS, LOSS-2, … without --out."""
    first = Path("runs") / s.loss
    auto = itertools.chain([first], (Path(f"{first}-{n}") for n in itertools.count(2)))
    if s.resume:  # the last that is there
        auto = list(itertools.takewhile(Path.exists, auto))[-1:] or [first]
    return [Path(s.out)] if s.out else auto


def remove_unused(out):
    """Deletes the directory of a start that failed before there was anything in it but its lock."""
    if [file.name for file in out.iterdir()] == [".lock"]:
        remove(out)


def hold(file, say, patience=60):
    """Opens and locks a file; None where another process has it still after `patience` seconds.

    With --resume it is waited for, since a run whose launcher was killed may still be saving.
    """
    opened = open(file, "w", encoding="utf-8")  # noqa: SIM115
    fault = f"{file.parent}: another run is writing to it"
    for n in range(5 * patience + 1):
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return opened
        except BlockingIOError:
            if n < 5 * patience:
                say(f"{fault}; waiting") if n == 0 else None
                time.sleep(0.2)
        except OSError as error:
            say(f"{file}: this file system keeps no locks ({error.strerror}); going on without")
            return opened
    opened.close()


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


def settings_of(out):
    """The settings in OUT/config.json; {} where there is none."""
    file = Path(out) / "config.json"
    then = read_json(file).get("settings", {})
    if not isinstance(then, dict) or (file.exists() and not then):
        raise UserError(f"{file}: holds no settings; not the config.json of a run")
    return then


def read_flags(settings, description, argv=None):
    """The flags of argv; a resumed run has those of its earlier starts where it gives no others.

    --steps takes the place of --epochs, and the other way round.
    """
    s = parse(settings, description, argv)
    if not s.resume:
        return s
    settings_of(out := next(iter(run_directories(s))))  # refuses what is none
    length = {"steps", "epochs"} if s.steps or s.epochs else set()
    before = (read_json(out / "config.json") or {}).get("flags", {})
    before = {name: before[name] for name in before.keys() & vars(s).keys() - length}
    return parse(settings, description, argv, before=before)


def check_config(s, say):
    """A resumed run must agree with OUT/config.json; UserError names the flag that does not.

    What it may change of its numbers is said; the schedule is then that of the new settings, from
    the step where it goes on.
    """
    then, changed = settings_of(s.out), []
    # a flag that is younger than the run was then as by default
    known = {f.name: f.default for f in dataclasses.fields(s) if f.default is not None} | then
    for name, value in dataclasses.asdict(s).items():
        if not then or name in MAY_CHANGE or (was := known.get(name, value)) == value:
            continue
        if name not in TUNABLE:
            file = Path(s.out) / "config.json"
            raise UserError(f"--resume: --{name} is {value}, but {file} has {was}")
        changed.append(f"{name} {value} (was {was})")
    if changed:
        say(f"--resume: from here on {', '.join(changed)}; lr follows the schedule of these values")


def write_config(s, asked, **extra):
    """Writes OUT/config.json: the resolved settings, the flags that were given, and versions.

    Before it is there, a start that failed can be corrected and tried again in the same OUT.
    """
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    flags = [f for f in dataclasses.fields(s) if f.name not in ("out", "resume")]
    given = {f.name: x for f in flags if (x := getattr(asked, f.name)) != f.default}
    content = {"settings": dataclasses.asdict(s), "flags": given, "versions": versions} | extra
    write_json(Path(s.out) / "config.json", content)


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
                except Exception as error:  # no key, no network, …: whatever the package raises
                    raise UserError(f"--log {name}: {' '.join(str(error).split())}") from error

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
        if self.active:
            self.say(what_moved(read_metrics(self.file)))
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
    rows = [row for _, row in rows_in(file)]
    if Path(file).read_bytes()[-1:] not in (b"", b"\n"):
        say(f"{file}:{len(rows) + 1}: the last line is torn; left out")
    return rows


def what_moved(rows):
    """One line on what a run has changed, by its first and last validation of the plain policy."""
    rows = [row for row in rows if "eval_loss" in row]
    if len(rows) < 2:
        return "what moved was not measured: there are no validation pairs (--eval_pairs)"
    names = ("eval_plain_margin", "eval_plain_accuracy")
    names = names if names[0] in rows[-1] else ("eval_loss",)
    ends = {name: [x[name] for x in (rows[0], rows[-1]) if measured(x, name)] for name in names}
    told = ", ".join(f"{k} {' -> '.join(f'{x:.4f}' for x in of)}" for k, of in ends.items() if of)
    if abs(rows[-1][names[0]] - rows[0][names[0]]) < 0.01:
        return f"nothing moved: {told}; raise --lr, or --epochs for more steps"
    return f"moved: {told}"


def advise(s, plan, parameters):
    """Lines on a run that is too short, or too slow for the size of its model, to move anything."""
    if plan.steps < 20 and s.steps is None:
        batch = max(1, min(s.batch, 16, plan.n_pairs // 4))
        epochs = max(3, math.ceil(20 * batch / plan.n_pairs))
        cure = f"--batch {batch} --epochs {epochs} makes {epochs * plan.n_pairs // batch}"
        yield f"so few steps ({plan.steps}) may move nothing; with {plan.n_pairs} pairs {cure}"
    if parameters < 2e9 and s.lr < 2e-6:
        size = f"{parameters / 1e6:,.0f}M parameters"
        yield f"lr {s.lr:g} is for models of 7B and may move nothing; for {size} try --lr 2e-5"


CURVES = {"": ("-", "training"), "eval_": ("o-", "eval_…"),  # prefix of a metric: line, legend
          "eval_plain_": ("s--", "eval_plain_… (prompt alone)")}  # fmt: skip


def draw(runs, file):
    """{label or None: lines} -> a figure of loss, accuracy and margin over steps."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(13, 3.6 + 0.2 * (len(runs) - 1)), layout="constrained")
    shown = {}  # what the legend, below all panels, says: {(kind, run, text): one of its lines}
    for axis, name in zip(figure.subplots(1, 3), ("loss", "accuracy", "margin"), strict=True):
        for n, (label, lines) in enumerate(runs.items()):
            for k, (prefix, (style, about)) in enumerate(CURVES.items()):
                key = prefix + name
                points = [(x["step"], x[key]) for x in lines if measured(x, key)]
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


def measured(x, name):
    """Whether a line of metrics has this one. Where the policy is still the reference no pair is
    won, which is no accuracy of 0."""
    tied = name.endswith("accuracy") and x.get(name.replace("accuracy", "margin")) == 0
    return name in x and not (tied and x[name] == 0)


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
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--log {name}: pip install {name}")
    return names
