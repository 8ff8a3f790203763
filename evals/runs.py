"""Compares training runs: `python evaluate.py runs OUT1 OUT2 …`.

Draws the curves of their metrics.jsonl over each other, and tabulates where each of them ended.
Runs whose config.json differs in the seed alone are one group: its mean, and the standard
deviation of one seed. Against the first group, every other one is paired seed by seed (a seed
decides the order of the pairs and the hold-out, which then are the same), with a 95% t-interval.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evals.results import out_file, table
from evals.stats import t_interval
from jobs.cli import UserError, flag
from jobs.rundir import MAY_CHANGE, draw, read_metrics, settings_of

# Runs of one group may differ in chance, in place and in what changes no number
NOT_COMPARED = {*MAY_CHANGE, "seed", "row_tokens", "eval_pairs"} - {"eval_every", "revision"}
MEASURES_OF_A_SEED = ("best eval loss", "its accuracy", "its plain accuracy", "its plain margin")


@dataclass(frozen=True)
class RunsFlags:
    runs: tuple = flag((), "run directories of train.py")
    out: str = flag("runs.png", "the figure")


def runs(s):
    """Draw training runs over each other, and print where each of them ended, by seed too."""
    if not s.runs:
        raise UserError("runs: name the run directories, OUT1 OUT2 …")
    lines = {str(Path(run)): read_metrics(Path(run) / "metrics.jsonl") for run in s.runs}
    found = {name: ends(of) for name, of in lines.items()}
    print(table([{"run": name} | of for name, of in found.items()], ".4f"))
    groups = by_seed(found)
    if any(len(seeds) > 1 for seeds in groups.values()):
        print_seeds(groups)
    with out_file(s.out):
        draw(lines, s.out)
    print(f"drawn: {s.out}")


def by_seed(found):
    """{run: its ends} -> {group: {seed: ends}}; a group is named by the settings that set it apart.

    Runs without a config.json belong to none.
    """
    configs, groups = {run: of for run in found if (of := settings_of(run))}, {}
    keys = dict.fromkeys(key for of in configs.values() for key in of if key not in NOT_COMPARED)
    keys = [k for k in keys if len({json.dumps(of.get(k)) for of in configs.values()}) > 1]
    for run, of in configs.items():
        group = ", ".join(f"{key} {of.get(key)}" for key in keys) or f"loss {of.get('loss')}"
        if of["seed"] in groups.setdefault(group, {}):
            print(f"{run}: {group}, seed {of['seed']} is there already; left out of the groups")
        groups[group].setdefault(of["seed"], found[run])
    return groups


def print_seeds(groups):
    """Prints mean and spread of every group, and its paired differences from the first group."""
    every = [of for seeds in groups.values() for of in seeds.values()]
    names = [m for m in MEASURES_OF_A_SEED if all(of[m] is not None for of in every)]
    values = {group: {seed: np.array([of[m] for m in names]) for seed, of in seeds.items()}
              for group, seeds in groups.items()}  # fmt: skip
    rows = []
    for group, seeds in values.items():
        row = {"group": group, "seeds": len(seeds)}
        for name, of in zip(names, np.array(list(seeds.values())).T, strict=True):  # (seeds,)
            row[name] = f"{of.mean():.4f}" + (f" ± {of.std(ddof=1):.4f}" if len(of) > 1 else "")
        rows.append(row)
    print("\n" + table(rows))
    first, *others = values
    for group in others:
        shared = [seed for seed in values[group] if seed in values[first]]
        gaps = {f"seed {seed}": values[group][seed] - values[first][seed] for seed in shared}
        if len(gaps) > 1:
            of_measures = np.array(list(gaps.values())).T  # (measures, seeds)
            gaps["mean [95%]"] = [t_interval(of) for of in of_measures]
        what = f"{group} less {first}"
        rows = [{what: told} | dict(zip(names, gap, strict=True)) for told, gap in gaps.items()]
        print("\n" + table(rows or [{what: ""}], "+.4f"))


def ends(lines):
    """{column: number or None} of a run: last step, best validation after the start, mean speed."""
    steps = [x for x in lines if "loss" in x]
    evals = [x for x in lines if "eval_loss" in x and x["step"] > 0]
    last = steps[-1] if steps else {}
    best = min(evals, key=lambda x: x["eval_loss"], default={})
    seconds = sum(x["seconds"] for x in steps)
    return {
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
