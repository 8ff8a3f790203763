"""What a run reports: OUT/metrics.jsonl, drawn in OUT/curves.png, and told to other loggers."""

import json
import os
import resource
from pathlib import Path

import torch

from jobs.cli import UserError
from jobs.files import replace, to_line

# ----------------------------------------------------------------------------- writing


class Metrics:
    """OUT/metrics.jsonl, one line per step, validation and reference pass; and curves.png of it."""

    def __init__(self, s, ranks, step):
        self.file, self.active, self.loggers = Path(s.out) / "metrics.jsonl", ranks.first, []
        self.say = ranks.say
        if self.active:
            if self.file.exists():
                self._cut_back(step, ranks.say)
            self.loggers = [LOGGERS[name](s, step) for name in logger_names(s.log)]

    def _cut_back(self, step, say):
        """Keep what precedes the resumed step; written whole, so that no kill can lose the rest."""
        rows = read_metrics(self.file, say)
        replace(self.file, [to_line(row) for row in rows if self._precedes(row, step)])

    @staticmethod
    def _precedes(line, step):
        """A run that resumes after `step` repeats what came later, its validation included."""
        at = line.get("step", -1)
        return at < step or (at == step and "loss" in line)

    def write(self, metrics):
        """One line of numbers; every logger gets the same names."""
        if self.active:
            with open(self.file, "a", encoding="utf-8") as f:
                f.write(json.dumps(metrics) + "\n")
            for logger in self.loggers:
                logger.write(metrics)

    def flush(self):
        """To disk, before a checkpoint claims that these steps are done."""
        if self.active and self.file.exists():
            with open(self.file, "rb") as f:
                os.fsync(f.fileno())

    def close(self):
        self.plot()
        for logger in self.loggers:
            logger.close()

    def plot(self):
        """Loss, accuracy and margin over steps (InSPO Figure 2). A picture never ends a run."""
        if not self.active:
            return
        figure = self.file.with_name("curves.png")
        try:
            draw({None: read_metrics(self.file)}, figure)
        except Exception as error:  # a full disk, or one of matplotlib's own: fonts, caches, …
            self.say(f"{figure} could not be drawn: {error}")


class TensorBoard:
    """--log tensorboard: event files in OUT/tensorboard."""

    def __init__(self, s, step):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--log tensorboard: pip install tensorboard") from error
        self.writer = SummaryWriter(Path(s.out) / "tensorboard", purge_step=step + 1)

    def write(self, metrics):
        for name, value in metrics.items():
            if name != "step":
                self.writer.add_scalar(name, value, metrics.get("step", 0))

    def close(self):
        self.writer.close()


class Wandb:
    """--log wandb: one wandb run per OUT, gone on with by --resume; WANDB_* variables apply."""

    def __init__(self, s, step):
        try:
            import wandb
        except ImportError as error:
            raise UserError("--log wandb: pip install wandb") from error
        name = Path(s.out).resolve().name
        self.run = wandb.init(
            project="nanopo", name=name, id=run_id(s.out), dir=s.out, config=vars(s), resume="allow"
        )
        # wandb's own count of steps never goes back, as a run that is resumed does
        self.run.define_metric("*", step_metric="step")

    def write(self, metrics):
        self.run.log(metrics)

    def close(self):
        self.run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": Wandb}


def run_id(out):
    """A name that stays with a run directory, kept in it."""
    file = Path(out) / ".run-id"
    if not file.exists():
        file.write_text(os.urandom(4).hex(), encoding="utf-8")
    return file.read_text(encoding="utf-8")


def logger_names(log):
    """ "tensorboard,wandb" -> their names; UserError for one that does not exist."""
    names = [name.strip() for name in (log or "").split(",") if name.strip()]
    for name in names:
        if name not in LOGGERS:
            raise UserError(f"--log {name}: unknown; choose from {', '.join(LOGGERS)}")
    return names


def peak_memory(kind):
    """The most memory that this process has held so far, in GiB: of the GPU, else resident."""
    if kind == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ----------------------------------------------------------------------------- reading


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


def draw(runs, file):
    """{label or None: lines} -> a figure of loss, accuracy and margin over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, name in zip(axes, ("loss", "accuracy", "margin"), strict=True):
        for n, (label, lines) in enumerate(runs.items()):
            for key, style in (
                (name, "-"),
                (f"eval_{name}", "o-"),
                (f"eval_plain_{name}", "s--"),
            ):
                points = [(x["step"], x[key]) for x in lines if key in x]
                if points:
                    shown = {"label": f"{label}: {key}" if label else key}
                    shown |= {"color": f"C{n}"} if label else {}
                    axis.plot(*zip(*points, strict=True), style, ms=3.5, lw=1.2, **shown)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)
