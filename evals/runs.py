"""Compares training runs: `python evaluate.py runs OUT1 OUT2 …`.

Draws the curves of their metrics.jsonl over each other, and tabulates where each of them ended.
"""

from dataclasses import dataclass
from pathlib import Path

from jobs.cli import UserError, arguments, flag
from jobs.rundir import draw, read_metrics


@dataclass
class RunsFlags:
    """Every flag of `evaluate.py runs`."""

    runs: list = arguments("run directories of train.py")
    out: str = flag("runs.png", "the figure")


ENDS = (  # column, which line of metrics.jsonl, key
    ("steps", "last", "step"),
    ("loss", "last", "loss"),
    ("grad norm", "last", "grad_norm"),
    ("best eval loss", "best", "eval_loss"),
    ("at step", "best", "step"),
    ("its accuracy", "best", "eval_accuracy"),
    ("its plain accuracy", "best", "eval_plain_accuracy"),
    ("its plain margin", "best", "eval_plain_margin"),
    ("pairs/s", "speed", "pairs_per_second"),
)


def runs(s):
    """Draw training runs over each other, and print where each of them ended."""
    if not s.runs:
        raise UserError("runs: name the run directories, OUT1 OUT2 …")
    names = [str(Path(run)) for run in s.runs]
    lines = {name: read_metrics(Path(name) / "metrics.jsonl") for name in names}
    print("| run | " + " | ".join(column for column, _, _ in ENDS) + " |")
    print("| --- |" + " --- |" * len(ENDS))
    for name in lines:
        found = ends(lines[name])
        cells = [found[which].get(key) for _, which, key in ENDS]
        shown = (
            "-" if c is None else f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells
        )
        print(f"| {name} | " + " | ".join(shown) + " |")
    Path(s.out).parent.mkdir(parents=True, exist_ok=True)
    draw(lines, s.out)
    print(f"drawn: {s.out}")


def ends(lines):
    """The last step, the best validation after the start, and the mean speed of a run."""
    steps = [x for x in lines if "loss" in x]
    evals = [x for x in lines if "eval_loss" in x and x["step"] > 0]
    best = min(evals, key=lambda x: x["eval_loss"], default={})
    seconds = sum(x["seconds"] for x in steps)
    speed = {"pairs_per_second": sum(x["pairs"] for x in steps) / seconds} if seconds else {}
    return {"last": steps[-1] if steps else {}, "best": best, "speed": speed}
