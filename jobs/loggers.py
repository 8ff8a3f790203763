"""Other places that train.py --log reports to: TensorBoard and Weights & Biases, both optional."""

import os
from pathlib import Path

from jobs.cli import UserError


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
        name, file = Path(s.out).resolve().name, Path(s.out) / ".run-id"
        if not file.exists():  # it stays with the run directory, so that --resume goes on with it
            file.write_text(os.urandom(4).hex(), encoding="utf-8")
        self.run = wandb.init(
            project="nanopo",
            name=name,
            id=file.read_text(),
            dir=s.out,
            config=vars(s),
            resume="allow",
        )
        # wandb's own count of steps never goes back, as a run that is resumed does
        self.run.define_metric("*", step_metric="step")

    def write(self, metrics):
        self.run.log(metrics)

    def close(self):
        self.run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": Wandb}


def logger_names(log):
    """ "tensorboard,wandb" -> their names; UserError for one that does not exist."""
    names = [name.strip() for name in (log or "").split(",") if name.strip()]
    for name in names:
        if name not in LOGGERS:
            raise UserError(f"--log {name}: unknown; choose from {', '.join(LOGGERS)}")
    return names
