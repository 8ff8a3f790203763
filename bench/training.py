"""Measures one training run in this process, set up as train.py does, stage by stage.

The reference pass is timed after one over the first batch, and of the steps the first `uncounted`
come before the counted ones, so that neither allocation nor compilation is in them; from then on a
recompilation is an error. Validation, checkpoints and export are left out. Figures are in seconds,
GiB, and rates per second or per pair; under torchrun those of the first rank.
"""

import dataclasses
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch

import losses
from bench import BEGUN
from bench.measuring import Flops, held_gib, synchronize
from data import Plan
from hub.template import Template
from jobs.processes import Ranks, peak_memory
from model import path_limit
from train import Run, TrainFlags, build_model, fit_to_data, load_data, resolve_flags

IMPORTED = time.perf_counter()

CONTENDERS = {  # what train.py can be told to do, as flags
    "dpo": {"loss": "dpo"},
    "ins_dpo": {"loss": "ins_dpo"},
    "ins_dpo, context_grad false": {"loss": "ins_dpo", "context_grad": False},
    "ins_dpo, compiled": {"loss": "ins_dpo", "compile": True},
    "ins_dpo, context_grad false, compiled": {
        "loss": "ins_dpo",
        "context_grad": False,
        "compile": True,
    },
    "ins_dpo, turn": {"loss": "ins_dpo", "bridge": "turn"},
    "ifsr_dpo": {"loss": "ifsr_dpo"},
    "one_sided": {"loss": "ins_dpo", "condition": "one_sided"},
    "averaged, sep": {"loss": "ins_dpo", "condition": "averaged"},
    "averaged, turn": {"loss": "ins_dpo", "condition": "averaged", "bridge": "turn"},
}
SAVERS = {  # of memory, at the price of time
    "ins_dpo, half kept": {"loss": "ins_dpo", "keep_activations": 0.5, "compile": True},
    "ins_dpo, recomputed": {"loss": "ins_dpo", "checkpoint_activations": True},
    "ins_dpo, offload": {"loss": "ins_dpo", "offload": True},
}
STAGES = ("import", "template", "data", "load", "reference", "first step", "step")


class Clock:
    """Seconds and memory by stage, this process's."""

    def __init__(self, device):
        self.device, self.seconds, self.gib = device, {"import": IMPORTED - BEGUN}, {}

    @contextmanager
    def stage(self, name):
        """Times what is done inside as the stage of this name, and looks what is held then."""
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = time.perf_counter() - start
        self.gib[name] = held_gib(self.device)


@contextmanager
def opened(s, uncounted=1):
    """A train.Run whose reference is scored, and the Clock of how it came to be."""
    with Ranks(s.device) as ranks, tempfile.TemporaryDirectory() as out:
        ranks.say = lambda text: None
        s = dataclasses.replace(resolve_flags(s, ranks.kind)[0], out=out, eval_pairs=0)
        s = dataclasses.replace(s, steps=uncounted + s.steps)
        clock = Clock(ranks.device)
        job = set_up(s, ranks, clock)
        if job.wanted:
            first = range(min(s.batch, len(job.train)))
            job.score(job.model, job.train, first, job.recipe.reference_paths)
        with clock.stage("reference"):
            job.score_reference(Path(s.model), "")
        yield job, clock


def set_up(s, ranks, clock):
    """What train.fit does before its loop -> train.Run."""
    recipe = losses.recipe(s.loss, s.condition, s.bridge, s.reference)
    with clock.stage("template"):
        s = dataclasses.replace(s, max_len=path_limit(s.max_len, s.model))
        template = Template(s.model)
    with clock.stage("data"):
        sets, _ = load_data(s, template, recipe, ranks)
        plan = Plan(len(sets["train"]), s.batch, s.seed, 0.0, s.steps)
        if s.row_tokens is None:  # given, it need not hold the plain paths: nothing is validated
            s = fit_to_data(s, ranks, recipe, sets, plan)
    with clock.stage("load"):
        model = build_model(s, ranks, Path(s.model), recipe.objective.head)
    return Run(s, ranks, recipe, model, {}, sets, plan)


@contextmanager
def compiled_once(strict):
    """Where strict, an error if a compiled function would be compiled again."""
    config = torch._dynamo.config
    before, config.error_on_recompile = config.error_on_recompile, strict
    try:
        yield
    finally:
        config.error_on_recompile = before


def timed_steps(job, clock, uncounted):
    """Run the plan's steps -> metrics of each counted one, with its exact `seconds`."""
    lines = []
    for k in range(job.plan.steps):
        stage = "first step" if k == 0 else "step"
        with clock.stage(stage), compiled_once(k >= uncounted):
            line, _ = job.step(k, False)
        lines.append(line | {"seconds": clock.seconds[stage]})
    return lines[uncounted:]


def figures(job, clock, lines):
    """What one process measured, per pair and in all; seconds of the steps are summed."""
    first = job.plan.steps - len(lines)
    pairs = [i for k in range(first, job.plan.steps) for i in job.plan.pairs(k)]
    training, reference = Flops(job.model.config).of_pairs(job.train, pairs, job.recipe)
    n, total = len(job.train), sum(line["seconds"] for line in lines)
    tokens = sum(line["tokens"] for line in lines)
    reference_tokens = sum(job.train.size(i, job.recipe.reference_paths) for i in pairs)
    per_pair = total / len(pairs) + clock.seconds["reference"] / n
    return {
        "pairs_per_second": 1 / per_pair,
        "step_seconds_per_pair": total / len(pairs),
        "reference_seconds_per_pair": clock.seconds["reference"] / n,
        "tokens_per_second": tokens / total,
        "tokens_per_pair": tokens / len(pairs),
        "reference_tokens_per_pair": reference_tokens / len(pairs),
        "flops_per_pair": (training + reference) / len(pairs),
        "step_flops_per_second": training / total,
        "row_fill": sum(line["row_fill"] for line in lines) / len(lines),
        "pairs": n,
        "loss": lines[-1]["loss"],
        "dataset_gib": clock.gib["data"] - clock.gib["template"],
        "held_gib": clock.gib["reference"],
        "peak_gib": job.ranks.most(peak_memory(job.ranks.kind))[0],
    } | {f"{stage} seconds": clock.seconds.get(stage, 0.0) for stage in STAGES}


def measure(**flags):
    """One run with these flags of train.py, and `uncounted` steps before its --steps."""
    uncounted = flags.pop("uncounted", 1)
    with opened(TrainFlags(**flags), uncounted) as (job, clock):
        return figures(job, clock, timed_steps(job, clock, uncounted))
