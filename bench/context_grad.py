"""What --context_grad false changes: `python bench/context_grad.py`.

    gradient    at the start of DPO, where every pair weighs the same: its cosine with the exact one
                and its share of the exact norm, over all parameters, mean over pairs
    win rates   in the small world (bench/small_world.py's runs, learning rate and seeds), of the
                policy as deployed and as shown the answer to beat

What it saves is a row of bench/overhead.py and bench/pairs_per_second.py.
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]

import small_world  # noqa: E402
import torch  # noqa: E402
from smollm2 import smollm2_dir  # noqa: E402

from bench.measuring import table, tell  # noqa: E402
from bench.training import CONTENDERS  # noqa: E402
from data import Dataset, Limits, build_row  # noqa: E402
from generate import load_model  # noqa: E402
from jobs.cli import flag, parse, run  # noqa: E402
from kernels import detached  # noqa: E402
from losses import recipe  # noqa: E402
from model import scored_states  # noqa: E402
from pairs.read import Drops, read_pairs  # noqa: E402

NAMES = ("ins_dpo", "ins_dpo, turn", "averaged, sep", "averaged, turn", "dpo")
FORMS = {name: CONTENDERS[name] for name in NAMES}  # as flags
START, KIND, LR = "start", "separable", 4e-4  # as bench/small_world.py runs dpo


@dataclass
class Settings:
    """Flags."""

    model: str | None = flag(
        None, "HF directory; default: SmolLM2-135M, see tests/tools/smollm2.py"
    )
    data: str = flag("../shared/data/hh-harmless-test.jsonl.gz", "preference pairs")
    pairs: int = flag(8, "pairs whose gradients are compared")
    seeds: int = flag(5, "runs of each form in the small world; 0: none")
    workers: int = flag(2, "runs side by side")
    out: str = flag("bench/context_grad.json", "where the figures go")


def gradient(model, row, signs, context_grad):
    """The gradient of sum over paths of sign times log-probability, as one vector."""
    model.states = scored_states if context_grad else detached.states
    model.zero_grad()
    (row.sums(model(row)) * signs).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def distances(s):
    """{form: (cosine, share of the norm)}, mean over pairs."""
    model, template = load_model(s.model or smollm2_dir(build=True), "fp32", "cpu")
    model.requires_grad_(True)
    pairs = read_pairs(s.data, Drops(), s.pairs)
    found = {}
    for name, form in FORMS.items():
        rule = recipe(form["loss"], form.get("condition"), form.get("bridge"))
        dataset = Dataset(pairs, template, rule, Limits(1024, 0.4), "better")
        signs = torch.tensor([1.0 if path.target == "chosen" else -1.0 for path in rule.paths])
        lines = []
        for i in range(len(dataset)):
            row = build_row([dataset.trie(i, rule.paths)], [i], len(rule.paths))
            exact, cut = (gradient(model, row, signs, grad) for grad in (True, False))
            cosine = torch.cosine_similarity(exact, cut, 0).item()
            lines.append((cosine, (cut.norm() / exact.norm()).item()))
        found[name] = [statistics.mean(column) for column in zip(*lines, strict=True)]
    return found


def win_rates(s):
    """{(form, context_grad): [result of each seed]} of runs in the small world."""
    jobs = {}
    for name, form in FORMS.items():
        for grad in (True, False):
            stages = (small_world.Stage(**form, lr=LR, context_grad=grad),)
            made = (
                small_world.Job((name, str(grad)), START, KIND, n, stages) for n in range(s.seeds)
            )
            jobs[name, grad] = list(made)
    with tempfile.TemporaryDirectory() as folder:
        every = [job for group in jobs.values() for job in group]
        known = small_world.run_all(every, Path(folder) / "results.jsonl", {}, s.workers)
    return {key: [known[job] for job in group] for key, group in jobs.items()}


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    near = distances(s)
    tables = [table(("form", "cosine", "norm / exact"), [(k, *v) for k, v in near.items()])]
    figures = {"gradient": near}
    if s.seeds:
        results = win_rates(s)
        tables.append(world_table(results))
        figures["win_rates"] = {" ".join(map(str, key)): runs for key, runs in results.items()}
    tell(s, figures, *tables)


def world_table(results):
    """Mean and standard deviation over seeds, exact against forward-only contexts."""
    columns = [(view, grad) for view in ("plain", "shown") for grad in (True, False)]
    rows = [
        (name, *(spread(results[name, grad], view) for view, grad in columns)) for name in FORMS
    ]
    headers = [f"{view}, {'exact' if grad else 'context_grad false'}" for view, grad in columns]
    return table(("form", *headers), rows)


def spread(runs, view):
    """Percent, as mean ± standard deviation."""
    values = [100 * run[view] for run in runs]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    run(main)
