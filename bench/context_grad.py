"""What does `--context_grad false` change? The gradient, and win rates in the small world.

    python -m bench.context_grad --pairs 6

    gradient    at the start of DPO, where every pair weighs the same: its cosine with the exact one
                and its share of the exact norm, over all parameters, mean over pairs
    win rates   in the small world (bench/small_world.py's runs, learning rate and seeds), of the
                policy as deployed and as shown the answer to beat; percent, mean ± standard
                deviation over seeds; *cut* is without the gradient of contexts

What it saves is a row of bench/pairs_per_second.py.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import losses
from bench import small_world
from bench.inputs import WorkloadFlags
from bench.measuring import table, tell
from bench.small_world_report import spread
from bench.training import CONTENDERS
from data import Dataset, Limits, build_row
from hub.template import Template
from jobs.cli import flag, parse, run
from kernels import chains, detached
from model import load, scored_states
from pairs.read import Drops, read_pairs

FORMS = ("ins_dpo", "ins_dpo, turn", "averaged, sep", "averaged, turn", "dpo")
START, KIND, LR = "start", "separable", 4e-4  # as bench/small_world.py runs dpo


@dataclass(frozen=True)
class ContextGradFlags(WorkloadFlags):
    """Flags."""

    pairs: int = flag(8, "pairs whose gradients are compared")
    seeds: int = flag(5, "runs of each form in the small world, at least 2; 0: none")
    workers: int = flag(2, "runs side by side")
    out: str = flag("bench/out/context_grad.json", "where the figures go")


def distances(s, directory, data):
    """{form: (cosine, share of the norm)}, mean over pairs."""
    model, template = load(directory).requires_grad_(True), Template(directory)
    model.attend = chains.attend
    pairs, found = read_pairs(data, Drops(), s.pairs), {}
    for name in FORMS:
        form = CONTENDERS[name]
        recipe = losses.recipe(form["loss"], form.get("condition"), form.get("bridge"))
        dataset = Dataset(pairs, template, recipe, Limits(s.max_len, 0.4), "better")
        lines = [distance(model, dataset, i, recipe.paths) for i in range(len(dataset))]
        found[name] = [statistics.mean(column) for column in zip(*lines, strict=True)]
    return found


def distance(model, dataset, i, paths):
    """(cosine, share of the norm) of one pair's gradient without that of contexts."""
    row = build_row([dataset.trie(i, paths)], [i], len(paths))
    signs = torch.tensor([1.0 if path.target == "chosen" else -1.0 for path in paths])
    exact, cut = (gradient(model, row, signs, grad) for grad in (True, False))
    return torch.cosine_similarity(exact, cut, 0).item(), (cut.norm() / exact.norm()).item()


def gradient(model, row, signs, context_grad):
    """The gradient of sum over paths of sign times log-probability, as one vector."""
    model.states = scored_states if context_grad else detached.states
    model.zero_grad()
    (row.sums(model(row)) * signs).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def win_rates(s):
    """{form: {view: (exact, cut)}}, (seeds,) win rates each, of runs in the small world."""
    jobs = {}
    for form, grad in ((form, grad) for form in FORMS for grad in (True, False)):
        stages = (small_world.Stage(**CONTENDERS[form], lr=LR, context_grad=grad),)
        name = ("context_grad", form, str(grad))
        jobs[form, grad] = [small_world.Job(name, START, KIND, n, stages) for n in range(s.seeds)]
    with tempfile.TemporaryDirectory() as folder:
        every = [job for group in jobs.values() for job in group]
        known = small_world.run_all(every, Path(folder) / "results.jsonl", {}, s.workers)

    def of(view, form, grad):
        return [known[job][view] for job in jobs[form, grad]]

    return {f: {v: (of(v, f, True), of(v, f, False)) for v in ("plain", "shown")} for f in FORMS}


def main():
    s = parse(ContextGradFlags, __doc__.splitlines()[0])
    with s.ready() as (model, data):
        near = distances(s, model, data)
    tables = [table(("form", "cosine", "norm / exact"), [(k, *v) for k, v in near.items()])]
    figures = {"gradient": near}
    if s.seeds:
        figures["win_rates"] = win_rates(s)
        headers = ("form", "plain, exact", "plain, cut", "shown, exact", "shown, cut")
        rows = [
            (form, *(spread(np.array(runs)) for both in views.values() for runs in both))
            for form, views in figures["win_rates"].items()
        ]
        tables.append(table(headers, rows))
    tell(s, figures, *tables)


if __name__ == "__main__":
    run(main)
