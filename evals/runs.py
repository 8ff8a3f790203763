"""Compares training runs: `python evaluate.py runs OUT1 OUT2 …`.

Draws the curves of their metrics.jsonl over each other, and tabulates where each of them ended.
"""

from dataclasses import dataclass
from pathlib import Path

from evals.results import markdown_table, out_file
from jobs.cli import UserError, flag
from jobs.rundir import draw, read_metrics


@dataclass(frozen=True)
class RunsFlags:
    runs: tuple = flag((), "run directories of train.py")
    out: str = flag("runs.png", "the figure")


def runs(s):
    """Draw training runs over each other, and print where each of them ended."""
    if not s.runs:
        raise UserError("runs: name the run directories, OUT1 OUT2 …")
    lines = {str(Path(run)): read_metrics(Path(run) / "metrics.jsonl") for run in s.runs}
    rows = [{"run": name} | ends(of) for name, of in lines.items()]
    print("\n".join(markdown_table(rows[0], [row.values() for row in rows])))
    with out_file(s.out):
        draw(lines, s.out)
    print(f"drawn: {s.out}")


def ends(lines):
    """{column: text} of a run: its last step, best validation after the start, mean speed."""
    steps = [x for x in lines if "loss" in x]
    evals = [x for x in lines if "eval_loss" in x and x["step"] > 0]
    last = steps[-1] if steps else {}
    best = min(evals, key=lambda x: x["eval_loss"], default={})
    seconds = sum(x["seconds"] for x in steps)
    found = {
        "steps": last.get("step"),
        "loss": last.get("loss"),
        "grad norm": last.get("grad_norm"),
        "best eval loss": best.get("eval_loss"),
        "at step": best.get("step"),
        "its accuracy": best.get("eval_accuracy"),
        "its plain accuracy": best.get("eval_plain_accuracy"),
        "its plain margin": best.get("eval_plain_margin"),
        "pairs/s": sum(x["pairs"] for x in steps) / seconds if seconds else None,
    }
    forms = {int: "{}", float: "{:.4f}", type(None): "-"}
    return {name: forms[type(value)].format(value) for name, value in found.items()}
