"""What does `--context_grad false` change? The gradient, and win rates in the small world.

    python -m bench.context_grad --pairs 6

    gradient    at the start of DPO, where every pair weighs the same: its cosine with the exact one
                and its share of the exact norm, over all parameters, mean over pairs
    win rates   in the small world (bench/small_world.py's runs, learning rate and seeds), of the
                policy as deployed and as shown the answer to beat; percent, mean ± standard
                deviation over seeds

What it saves is a row of bench/pairs_per_second.py.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import losses
from bench import small_world
from bench.inputs import WorkloadFlags
from bench.measuring import table, tell
from bench.training import CONTENDERS
from data import Dataset, Limits, build_row
from hub.template import Template
from jobs.cli import flag, parse, run
from kernels import detached
from model import load, scored_states
from pairs.read import Drops, read_pairs

FORMS = ("ins_dpo", "ins_dpo, turn", "averaged, sep", "averaged, turn", "dpo")
START, KIND, LR = "start", "separable", 4e-4  # as bench/small_world.py runs dpo


@dataclass
class ContextGradFlags(WorkloadFlags):
    """Flags."""

    pairs: int = flag(8, "pairs whose gradients are compared")
    seeds: int = flag(5, "runs of each form in the small world; 0: none")
    workers: int = flag(2, "runs side by side")
    out: str = flag("bench/out/context_grad.json", "where the figures go")


def distances(s, directory, data):
    """{form: (cosine, share of the norm)}, mean over pairs."""
    model, template = load(directory).requires_grad_(True), Template(directory)
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
    """{(form, context_grad): [result of each seed]} of runs in the small world."""
    jobs = {}
    for key in ((name, grad) for name in FORMS for grad in (True, False)):
        stages = (small_world.Stage(**CONTENDERS[key[0]], lr=LR, context_grad=key[1]),)
        name = ("context_grad", key[0], str(key[1]))
        jobs[key] = [small_world.Job(name, START, KIND, n, stages) for n in range(s.seeds)]
    with tempfile.TemporaryDirectory() as folder:
        every = [job for group in jobs.values() for job in group]
        known = small_world.run_all(every, Path(folder) / "results.jsonl", {}, s.workers)
    return {key: [known[job] for job in group] for key, group in jobs.items()}


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


def main():
    s = parse(ContextGradFlags, __doc__.splitlines()[0])
    with s.ready() as (model, data):
        near = distances(s, model, data)
    tables = [table(("form", "cosine", "norm / exact"), [(k, *v) for k, v in near.items()])]
    figures = {"gradient": near}
    if s.seeds:
        results = win_rates(s)
        tables.append(world_table(results))
        figures["win_rates"] = {" ".join(map(str, key)): runs for key, runs in results.items()}
    tell(s, figures, *tables)


if __name__ == "__main__":
    run(main)
