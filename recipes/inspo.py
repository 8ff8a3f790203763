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
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from hub.template import Template
from jobs.cli import UserError, flag
from jobs.rundir import read_metrics
from recipes import cost
from recipes.steps import RecipeFlags, cell, main, seeds_of, words_of

HERE = Path("recipes/miniature")

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


class Benchmark(NamedTuple):
    """Questions, and who answered them before: files, hub ids or (hub dataset, file)."""

    questions: object
    answers: int  # that a model has to give
    baseline: object = None  # or the HF directory of a model that has yet to answer
    named: str | None = None  # what the baseline is called in its file


class Size(NamedTuple):
    """All that differs between the paper's size and a laptop's."""

    models: dict
    prepare: dict  # flags of recipes.prepare
    train: dict  # flags of train.py
    sampling: dict  # flags of generate.py
    benchmarks: dict
    alpaca: dict  # flags of evaluate.py alpaca
    judge: str  # of AlpacaEval 2 and Arena-Hard
    graders: str  # of MT-Bench
    grid: int  # how many values of each grid are tried
    max_lens: tuple
    draft_caps: tuple
    timed_steps: int


ARENA, ARENA_01 = "lmarena-ai/arena-hard-auto", "data/arena-hard-v0.1"
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
        benchmarks={
            "alpaca_eval": Benchmark("tatsu-lab/alpaca_eval:eval", 805,
                                     ("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json")),
            "arena_hard": Benchmark((ARENA, f"{ARENA_01}/question.jsonl"), 500,
                                    (ARENA, f"{ARENA_01}/model_answer/gpt-4-0314.jsonl"),
                                    "gpt-4-0314"),
            "mt_bench": Benchmark("HuggingFaceH4/mt_bench_prompts", 160),
        },
        alpaca={},  # the published difficulties and gamed baselines
        judge="gpt-4-1106-preview",
        graders="gpt-4o,gpt-4",
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
        prepare={"dedup": True, "max_answer": 64, "min_answer": 2, "limit": 64, "eval_pairs": 4},
        train={"steps": 2, "batch": 4, "lr": 1e-3, "max_len": 256, "eval_every": 2, "keep": 1},
        sampling={"max_new_tokens": 16},
        benchmarks={
            "alpaca_eval": Benchmark(HERE / "alpaca.jsonl", 4, "assets/start"),
            "arena_hard": Benchmark(HERE / "arena.jsonl", 4, "assets/start", "baseline"),
            "mt_bench": Benchmark(HERE / "mt_bench.jsonl", 4),
        },
        alpaca={"difficulty": "none", "gamed": "none", "resamples": 50},
        judge="judge",
        graders="judge,grader",
        grid=2,
        max_lens=(48, 256),
        draft_caps=(0.3, 1.0),
        timed_steps=3,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Flags(RecipeFlags):
    endpoint: str | None = flag(None, "OpenAI-compatible server of the judges")
    judge: str | None = flag(None, "its name for the judge; default: GPT-4 Turbo, 1106 preview")
    graders: str | None = flag(None, "its names for MT-Bench's; default: gpt-4o,gpt-4")
    models: str | None = flag(None, "only these of mistral, llama3, gemma2; default: the paper's")


class Study:
    """The steps that InSPO's tables share, as methods over a Lab, flags and their Size."""

    def __init__(self, lab, s, models):
        self.lab, self.s, self.size, self.seeds = lab, s, SIZES[s.size], seeds_of(s)
        known = self.size.models
        wanted = s.models.split(",") if s.models else list(known)[:models]
        if unknown := [name for name in wanted if name not in known]:
            raise UserError(f"--models {unknown[0]}: choose from {', '.join(known)}")
        self.models = {name: known[name] for name in wanted}
        self.judge = {"endpoint": s.endpoint, "model": s.judge or self.size.judge}
        self.graders = (s.graders or self.size.graders).split(",")
        if not s.endpoint and not s.dry_run:
            raise UserError("--endpoint URL of the judges' server is missing")

    # -- training

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
        grid, scores = self.grid(loss), {}
        for point in range(len(grid) if len(grid) > 1 else 0):
            run, (_, held) = self.train(model, loss, self.seeds[0], **grid[point]), self.data(model)
            name, best = f"{model}/{run.name}", run / "best"
            about = {"format": "alpaca_eval", "name": run.name} | self.size.sampling
            n = self.size.prepare["eval_pairs"]
            said = self.lab.generate(
                f"{name}/validation.json", cost.sampling(n), model=best, data=held, **about
            )
            verdicts = self.verdicts(f"{name}/validation-verdicts.json", said, held, "alpaca_eval")
            flags = {"annotations": verdicts, "difficulty": "none", "gamed": "none", "resamples": 0}
            found = self.lab.evaluate(f"{name}/validation-score.json", "alpaca", **flags)
            scores[point] = self.lab.read(found, "models", run.name, "length_controlled_winrate")
        return grid[self.lab.best(scores)] if scores else grid[0]

    # -- benchmarks

    def fetched(self, source):
        """A file or hub id as it is; (hub dataset, file) downloaded."""
        if not isinstance(source, tuple):
            return source
        folder = self.lab.out / "benchmarks"
        words = ["hf", "download", *source, "--repo-type", "dataset", "--local-dir", folder]
        return self.lab.step(f"benchmarks/{source[1]}", words)

    def answers(self, form, name, model):
        """A model's answers to the questions of a benchmark, in its format."""
        bench, ending = self.size.benchmarks[form], "json" if form == "alpaca_eval" else "jsonl"
        flags = {"model": model, "data": self.fetched(bench.questions), "format": form}
        flags |= {"name": Path(name).name} | self.size.sampling
        return self.lab.generate(f"{name}/{form}.{ending}", cost.sampling(bench.answers), **flags)

    def baseline(self, form):
        """The answers that a benchmark compares with."""
        source = self.size.benchmarks[form].baseline
        if isinstance(source, tuple):
            return self.fetched(source)
        return self.answers(form, "benchmarks/baseline", source)

    def verdicts(self, name, answers, against, form):
        """Both orders of every pair of answers, judged."""
        flags = {"answers": answers, "against": against, "format": form} | self.judge
        return self.lab.evaluate(name, "judge", **flags)

    def alpaca(self, name, run):
        """AlpacaEval 2 of a run's best checkpoint -> {"LC", "WR"}: [mean, low, high] in percent."""
        said = self.answers("alpaca_eval", name, run / "best")
        against = self.baseline("alpaca_eval")
        verdicts = self.verdicts(f"{name}/annotations.json", said, against, "alpaca_eval")
        flags = {"annotations": verdicts} | self.size.alpaca
        found = self.lab.evaluate(f"{name}/alpaca.json", "alpaca", **flags)
        keys = {"LC": "length_controlled_winrate", "WR": "win_rate"}
        return {c: self.lab.read(found, "models", run.name, key) for c, key in keys.items()}

    def arena(self, model, table, runs):
        """Arena-Hard of all runs together, as style control is fitted -> {run: {"AH WR", "AH SC"}}.

        WR is the mean over games in both orders, SC the style-controlled one.
        """
        against, verdicts, said = self.baseline("arena_hard"), [], []
        for run in runs:
            name = f"{model}/{run.name}"
            said.append(self.answers("arena_hard", name, run / "best"))
            file = f"{name}/arena-verdicts.jsonl"
            verdicts.append(self.verdicts(file, said[-1], against, "arena_hard"))
        names = {"judgments": verdicts, "answers": [*said, against]}
        flags = {name: ",".join(map(str, files)) for name, files in names.items()}
        named = self.size.benchmarks["arena_hard"].named
        flags |= {"control": "both", "baseline": named}
        found = self.lab.evaluate(f"{model}/{table}-arena.json", "arena", **flags)
        keys = {"AH WR": "score", "AH SC": "controlled"}
        return {
            run: {c: self.lab.read(found, "models", run.name, key) for c, key in keys.items()}
            for run in runs
        }

    def mt_bench(self, name, run):
        """MT-Bench, mean grade of both turns -> {"MT <grader>": [mean, low, high]}."""
        said, found = self.answers("mt_bench", name, run / "best"), {}
        questions = self.size.benchmarks["mt_bench"].questions
        for grader in self.graders:
            flags = {"answers": said, "questions": questions, "format": "mt_bench"}
            flags |= self.judge | {"model": grader}
            file = f"{name}/grades-{grader.replace('/', '-')}.jsonl"
            grades = self.lab.evaluate(file, "judge", **flags)
            local = {"questions": questions} if Path(questions).exists() else {}
            scores = f"{name}/mtbench-{grader.replace('/', '-')}.json"
            scores = self.lab.evaluate(scores, "mtbench", judgments=grades, **local)
            found[f"MT {grader}"] = self.lab.read(scores, "models", run.name, "score")
        return found

    def benchmarks(self, model, table, rows, columns):
        """{row: [a run per seed]} -> {row: {"MODEL COLUMN": Cell}}."""
        found = {}
        for run in itertools.chain(*rows.values()):
            name = f"{model}/{run.name}"
            found[run] = self.alpaca(name, run)
            found[run] |= self.mt_bench(name, run) if "mt_bench" in columns else {}
        for run, scores in self.arena(model, table, found).items() if "arena" in columns else ():
            found[run] |= scores
        return {row: self.cells(model, [found[run] for run in runs]) for row, runs in rows.items()}

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
    study = Study(lab, s, models=2)
    model = "llama3" if "llama3" in study.models else next(iter(study.models))
    rows = {}
    for max_len, cap in itertools.product(study.size.max_lens, study.size.draft_caps):
        flags = study.grid("ins_dpo")[0] | {"max_len": max_len, "draft_cap": cap}
        runs = [study.train(model, "ins_dpo", seed, **flags) for seed in study.seeds]
        rows[f"{max_len}, {'none' if cap == 1 else cap}"] = runs
    part = study.benchmarks(model, "table3", rows, ("alpaca",))
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
            said = study.answers("alpaca_eval", f"{model}/{run.name}", run / "final")
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
    study = Study(lab, s, models=2)
    model = "llama3" if "llama3" in study.models else next(iter(study.models))
    runs = {}
    for loss in (f"{form}{base}" for base in BASES for form in ("", "ins_")):
        flags = study.grid(loss)[0]
        runs[loss] = [study.train(model, loss, seed, **flags) for seed in study.seeds]
    if lab.plan is None:
        return
    curves = {loss: [curve(run) for run in seeds] for loss, seeds in runs.items()}
    draw(curves, lab.out / "figure2.png")
    rows = [
        {"method": loss} | {name: cell([seed[name][-1] for seed in seeds]) for name in MEASURES}
        for loss, seeds in curves.items()
    ]
    lab.tell("figure2", rows, model=model, curves=curves)


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
