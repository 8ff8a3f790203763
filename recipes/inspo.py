"""InSPO (arXiv 2512.23126): every table and figure of its experiments.

    python -m recipes.inspo table2 --dry_run                 # what would be run, and for how long
    python -m recipes.inspo table2 --endpoint https://api.openai.com/v1
    python -m recipes.inspo table2 --size miniature --judge NAME --endpoint http://127.0.0.1:8000/v1

Protocol: the defaults of train.py are appendix D.1 (lr 5e-7, batch 128, 3 epochs, 4,096 tokens);
data as in D.2, cleaned once by recipes.prepare; the checkpoint with the best validation loss; one
answer each at temperature 0.7 and top-p 0.95. Tables share what they train in one --out.

What the paper leaves open, and how it is read here: a preference confidence is the sigmoid of the
difference of the reward model's scores, 0.6 being a difference of 0.405; the length-controlled win
rate on the validation prompts, by which a grid is searched, is against their chosen answers; tables
without a search take the first value of each grid. The recipes:
"""

import itertools
import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from hub.template import Template
from jobs.cli import flag
from jobs.rundir import read_metrics
from recipes import cost
from recipes.benchmarks import Benchmarks, JudgeFlags
from recipes.steps import cell, main, seeds_of, selected, words_of

# ----------------------------------------------------------------------------- what is run

GRIDS = {  # {base objective: {hyperparameter: values}}
    "rrhf": {"lam": (0.01,)},  # RRHF's own weight: its ranking term counts 100 times the likelihood
    "slic": {"lam": (0.1,)},
    "cpo": {"lam": (0.1,)},
    "kto": {},
    "dpo": {"beta": (0.1, 0.2, 0.3, 0.5)},
    "ipo": {"tau": (0.1, 0.2, 0.5)},
    "rdpo": {"beta": (0.1, 0.2), "alpha": (0.1, 0.5, 1.0)},
    "orpo": {"lam": (0.1, 0.5, 1.0)},
    "simpo": {"beta": (0.5, 1.0, 2.0), "gamma": (0.5, 1.0, 1.5)},
}
BASES = ("dpo", "ipo", "rdpo", "orpo", "simpo")  # those with an ins_ form in the paper
CONDITIONS = {  # Table 4: {row: flags of train.py}
    "dpo": {"loss": "dpo"},
    "one-sided": {"loss": "ins_dpo", "condition": "one_sided"},
    "symmetric": {"loss": "ins_dpo"},
    "averaged": {"loss": "ins_dpo", "condition": "averaged"},
}


class Model(NamedTuple):
    """A start and its preference data."""

    path: str  # HF directory or hub id
    data: str
    parameters: float
    pairs: int  # of the data, as published


class Size(NamedTuple):
    """All that differs between the paper's size and a laptop's."""

    models: dict
    prepare: dict  # flags of recipes.prepare
    train: dict  # flags of train.py
    sampling: dict  # flags of generate.py
    grid: int  # how many values of each grid are tried
    max_lens: tuple
    draft_caps: tuple
    timed_steps: int


SIZES = {
    "full": Size(
        models={
            "mistral": Model("mistralai/Mistral-7B-Instruct-v0.2",
                             "princeton-nlp/mistral-instruct-ultrafeedback", 7.24e9, 59_700),
            "llama3": Model("meta-llama/Meta-Llama-3-8B-Instruct",
                            "princeton-nlp/llama3-ultrafeedback", 8.03e9, 59_900),
            "gemma2": Model("google/gemma-2-9b-it",
                            "princeton-nlp/gemma2-ultrafeedback-armorm", 9.24e9, 59_600),
        },
        prepare={"dedup": True, "max_answer": 2048, "min_answer": 32, "min_margin": 0.405,
                 "guard": "meta-llama/Llama-Guard-3-8B", "eval_pairs": 1000},
        train={},
        sampling={"max_new_tokens": 2048},
        grid=99,
        max_lens=(1024, 2048, 4096),
        draft_caps=(0.3, 0.4, 0.5, 1.0),
        timed_steps=20,
    ),
    "miniature": Size(
        models={
            "start": Model("assets/start", "assets/world/pairs.jsonl", 0.9e6, 60),
            "start-single": Model("assets/start-single", "assets/world/pairs.jsonl", 0.9e6, 60),
        },
        prepare={"dedup": True, "max_answer": 64, "min_answer": 2, "limit": 64, "eval_pairs": 8},
        train={"steps": 2, "batch": 4, "lr": 1e-3, "max_len": 256, "eval_every": 2, "keep": 1},
        sampling={"max_new_tokens": 16},
        grid=2,
        max_lens=(48, 256),
        draft_caps=(0.3, 1.0),
        timed_steps=3,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Flags(JudgeFlags):
    models: str | None = flag(None, "only these of mistral, llama3, gemma2; default: the paper's")


class Study:
    """The steps that InSPO's tables share; models: how many of them the table has."""

    def __init__(self, lab, s, models):
        self.lab, self.size, self.seeds = lab, SIZES[s.size], seeds_of(s)
        known = self.size.models
        self.models = selected("--models", s.models, known, list(known)[:models])
        # the model of what is shown for one alone
        self.one = "llama3" if "llama3" in self.models else next(iter(self.models))
        self.judges = Benchmarks(lab, s, self.size.sampling)

    def data(self, model):
        """(train.jsonl, validation.jsonl) of a model's data, cleaned."""
        start, flags = self.models[model], self.size.prepare
        folder = self.lab.out / model / "data"
        flags = {"data": start.data, "model": start.path, "out": folder} | flags
        words = ["python", "-m", "recipes.prepare", *words_of(flags)]
        hours = cost.scoring(8e9, 2 * start.pairs) if "guard" in flags else 0
        held = self.lab.step(f"{model}/data/validation.jsonl", words, hours)
        return folder / "train.jsonl", held

    def train(self, model, loss, seed, **flags):
        """A run of train.py -> its directory, named by what differs from the others."""
        train, held = self.data(model)
        start, differs = self.models[model], "".join(f"-{k}{v}" for k, v in flags.items())
        # a short run of --steps sees fewer pairs than the data has
        shape = (128 * flags["steps"], 1) if "steps" in flags else (start.pairs, 3)
        return self.lab.train(
            f"{model}/{loss}{differs}-seed{seed}",
            cost.training(start.parameters, *shape, loss, flags.get("condition")),
            **{"loss": loss, "model": start.path, "data": train, "eval_data": held, "seed": seed},
            **self.size.train | flags,
        )

    def grid(self, loss):
        """The hyperparameters to be tried -> list of dict."""
        names, values = GRIDS[loss.removeprefix("ins_")], []
        for point in itertools.product(*names.values()):
            values.append(dict(zip(names, point, strict=True)))
        return values[: self.size.grid]

    def tuned(self, model, loss):
        """Of the grid, what gives the best length-controlled win rate on the validation prompts."""
        grid, scores, n = self.grid(loss), {}, self.size.prepare["eval_pairs"]
        if len(grid) == 1:
            return grid[0]
        for point, flags in enumerate(grid):
            run, (_, held) = self.train(model, loss, self.seeds[0], **flags), self.data(model)
            found = self.judges.validation(f"{model}/{run.name}", run / "best", held, n)
            scores[point] = found["LC"]
        return grid[self.lab.best(scores)]

    def benchmarks(self, model, table, rows, columns):
        """{row: [a run per seed]} -> {row: {"MODEL COLUMN": Cell}}."""
        models = {f"{model}/{run.name}": run / "best" for run in itertools.chain(*rows.values())}
        found = {name: self.judges.alpaca(name, best) for name, best in models.items()}
        if "mt_bench" in columns:
            for name, best in models.items():
                found[name] |= self.judges.mt_bench(name, best)
        if "arena" in columns:  # of all seeds at once, so more seeds are another file
            file = f"{model}/{table}-arena-seeds{'-'.join(map(str, self.seeds))}.json"
            for name, scores in self.judges.arena(file, models).items():
                found[name] |= scores
        return {
            row: self.cells(model, [found[f"{model}/{run.name}"] for run in runs])
            for row, runs in rows.items()
        }

    def cells(self, model, seeds):
        """[{column: figure} per seed] -> {"MODEL COLUMN": Cell}; Arena-Hard's in percent."""
        scale = {"AH WR": 100, "AH SC": 100}
        return {
            f"{model} {column}": cell([seed[column] for seed in seeds], scale.get(column, 1))
            for column in seeds[0]
        }


# ----------------------------------------------------------------------------- the tables


def table2(lab, s):
    """Nine objectives, of which five also as ins_, on AlpacaEval 2, Arena-Hard and MT-Bench."""
    study, parts, chosen = Study(lab, s, models=2), [], {}
    losses = [*GRIDS, *(f"ins_{base}" for base in BASES)]
    for model in study.models:
        rows = {}
        for loss in losses:
            flags = chosen[f"{model} {loss}"] = study.tuned(model, loss)
            rows[loss] = [study.train(model, loss, seed, **flags) for seed in study.seeds]
        parts.append(study.benchmarks(model, "table2", rows, ("alpaca", "arena", "mt_bench")))
    lab.tell("table2", joined("method", parts), chosen=chosen)


def table3(lab, s):
    """ins_dpo by longest path and cap of the context answer, on AlpacaEval 2."""
    study, rows = Study(lab, s, models=2), {}
    for max_len, cap in itertools.product(study.size.max_lens, study.size.draft_caps):
        flags = study.grid("ins_dpo")[0] | {"max_len": max_len, "draft_cap": cap}
        runs = [study.train(study.one, "ins_dpo", seed, **flags) for seed in study.seeds]
        rows[f"{max_len}, {'none' if cap == 1 else cap}"] = runs
    part = study.benchmarks(study.one, "table3", rows, ("alpaca",))
    lab.tell("table3", joined("max_len, draft cap", [part]))


def table4(lab, s):
    """dpo, and ins_dpo with one-sided, symmetric and averaged conditioning, for two models."""
    study, parts = Study(lab, s, models=2), []
    for model in study.models:
        rows = {}
        for row, how in CONDITIONS.items():
            loss, *_ = how.values()
            flags = study.grid(loss)[0] | {k: v for k, v in how.items() if k != "loss"}
            rows[row] = [study.train(model, loss, seed, **flags) for seed in study.seeds]
        parts.append(study.benchmarks(model, "table4", rows, ("alpaca", "arena")))
    lab.tell("table4", joined("condition", parts))


def joined(name, parts):
    """[{row: {column: Cell}} per model] -> rows of a table whose first column is called `name`."""
    return [
        {name: row} | {c: v for part in parts for c, v in part[row].items()} for row in parts[0]
    ]


def overheads(lab, s):
    """Short runs of dpo and ins_dpo -> {model: {loss: [{measure: figure} per seed]}}."""
    study, found = Study(lab, s, models=3), {}
    for model, loss in itertools.product(study.models, ("dpo", "ins_dpo")):
        steps, seeds = study.size.timed_steps, found.setdefault(model, {}).setdefault(loss, [])
        for seed in study.seeds:
            run = study.train(model, loss, seed, steps=steps, eval_every=steps)
            said = study.judges.answers("alpaca_eval", f"{model}/{run.name}", run / "final")
            seeds.append(measured(lab, run, said))
    return study, found


def measured(lab, run, said):
    """{measure: figure} of a training run and the answers of its model; NaN in the plan."""
    if lab.plan is None:
        return dict.fromkeys(("s/step", "GiB", "ms/token"), math.nan)
    steps = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    texts = [row["output"] for row in json.loads(said.read_text(encoding="utf-8"))]
    tokens = sum(Template(run / "final").lengths(texts))
    return {
        "s/step": float(np.median([line["seconds"] for line in steps[1:]])),  # the first compiles
        "GiB": max(line["memory_gib"] for line in steps),  # of the fullest process
        "ms/token": 1000 * lab.seconds(said) / max(1, tokens),  # loading the model included
    }


def table5(lab, s):
    """Time and memory of training, and time of sampling, of dpo and ins_dpo for three models."""
    study, found = overheads(lab, s)
    parts = [
        {loss: study.cells(model, seeds) for loss, seeds in losses.items()}
        for model, losses in found.items()
    ]
    lab.tell("table5", joined("method", parts))


def table7(lab, s):
    """The same as ratios: ins_dpo over dpo."""
    names, rows = {"s/step": "time", "GiB": "memory", "ms/token": "inference"}, []
    for model, losses in overheads(lab, s)[1].items():
        pairs = list(zip(losses["ins_dpo"], losses["dpo"], strict=True))
        ratios = {
            name: cell([ins[k] / plain[k] for ins, plain in pairs]) for k, name in names.items()
        }
        rows.append({"model": model} | ratios)
    lab.tell("table7", rows)


def figure2(lab, s):
    """Loss, accuracy and margin over training: plain dashed, ins_ solid, mean over seeds."""
    study, runs = Study(lab, s, models=2), {}
    for loss in (f"{form}{base}" for base in BASES for form in ("", "ins_")):
        flags = study.grid(loss)[0]
        runs[loss] = [study.train(study.one, loss, seed, **flags) for seed in study.seeds]
    if lab.plan is None:
        return
    curves = {loss: [curve(run) for run in seeds] for loss, seeds in runs.items()}
    draw(curves, lab.out / "figure2.png")
    rows = [
        {"method": loss} | {name: cell([seed[name][-1] for seed in seeds]) for name in MEASURES}
        for loss, seeds in curves.items()
    ]
    lab.tell("figure2", rows, model=study.one, curves=curves)


MEASURES = ("loss", "accuracy", "margin")


def curve(run):
    """{"step" or a measure: its values over the steps of a run}."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    return {name: [line[name] for line in lines] for name in ("step", *MEASURES)}


def draw(curves, file):
    """{loss: [curve per seed]} -> a figure, a row per objective, whose two forms have one scale."""
    shape = len(BASES), len(MEASURES)
    figure = Figure(figsize=(11, 2.2 * shape[0]), layout="constrained")  # not pyplot: no window
    axes = figure.subplots(*shape, sharex=True)
    for loss, seeds in curves.items():
        base = loss.removeprefix("ins_")
        style, color = ("--", "C0") if loss == base else ("-", "C1")
        for axis, name in zip(axes[BASES.index(base)], MEASURES, strict=True):
            values = np.mean([seed[name] for seed in seeds], axis=0)  # (steps,)
            axis.plot(seeds[0]["step"], values, style, color=color, label=loss, lw=1.2)
            axis.set(title=name)
            axis.grid(alpha=0.3)
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


RECIPES = {recipe.__name__: recipe for recipe in (table2, table3, table4, table5, table7, figure2)}

if __name__ == "__main__":
    main("inspo", RECIPES, Flags, __doc__)
