"""This project's contender: one training run in a process, set up as train.py does, stage by stage.

    python bench/training.py --loss ins_dpo --model DIR --data FILE --limit 32 --batch 16 --steps 2

Takes every flag of train.py. The reference pass is timed after one over the first batch, and of
the steps the first `--warmup` are not counted, so that neither allocation nor compilation is in
them; from then on a recompilation is an error. Validation, checkpoints and export are left out.
The last line of stdout is one JSON object. Works under torchrun; the figures are rank 0's.
"""

import dataclasses
import time

BEGUN = time.perf_counter()

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

from bench.flops import Flops  # noqa: E402
from bench.measuring import execute, last_json, synchronize  # noqa: E402
from bench.process_memory import kept_bytes, smaps  # noqa: E402
from data import Plan  # noqa: E402
from hub.template import Template  # noqa: E402
from jobs.cli import flag, parse, run  # noqa: E402
from jobs.processes import Ranks, peak_memory  # noqa: E402
from losses import recipe  # noqa: E402
from train import Run, TrainFlags, build_model, fit_to_data, load_data, resolve  # noqa: E402

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


@dataclass
class Settings(TrainFlags):
    """Every flag of train.py, and one of the measurement."""

    warmup: int = flag(1, "steps before the --steps that are counted")


class Clock:
    """Seconds and memory by stage, this process's."""

    def __init__(self, device):
        self.device, self.seconds, self.gib = device, {"import": IMPORTED - BEGUN}, {}

    @contextmanager
    def stage(self, name):
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = time.perf_counter() - start
        self.gib[name] = held(self.device)


def held(device):
    """GiB that this process holds now: of the GPU, else resident and not freed."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 2**30
    return (smaps()["Rss"] - kept_bytes()) / 2**30


def set_up(s, ranks, clock):
    """What train.fit does before its loop -> train.Run."""
    rule = recipe(s.loss, s.condition, s.bridge, s.reference)
    s = dataclasses.replace(s, eval_pairs=0)
    with clock.stage("template"):
        template = Template(s.model)
    with clock.stage("data"):
        sets, _ = load_data(s, template, rule, ranks)
        plan = Plan(len(sets["train"]), s.batch, s.seed, 0.0, s.warmup + s.steps)
        s = fit_to_data(s, ranks, rule, sets, plan)
    with clock.stage("load"):
        model = build_model(s, ranks, Path(s.model), rule.objective.head)
    return Run(s, ranks, rule, model, "", sets, plan)


@contextmanager
def opened(s):
    """A train.Run whose reference is scored, and the Clock of how it came to be."""
    with Ranks(s.device) as ranks, tempfile.TemporaryDirectory() as out:
        ranks.say = lambda text: None
        s = dataclasses.replace(resolve(s, ranks.kind)[0], out=out)
        clock = Clock(ranks.device)
        job = set_up(s, ranks, clock)
        if job.wanted:
            first = range(min(s.batch, len(job.train)))
            job.score(job.model, job.train, first, job.recipe.reference_paths)
        with clock.stage("reference"):
            job.score_reference(Path(s.model), "")
        yield job, clock


@contextmanager
def compiled_once(strict):
    """Where strict, an error if a compiled function would be compiled again."""
    config = torch._dynamo.config
    before, config.error_on_recompile = config.error_on_recompile, strict
    try:
        yield
    finally:
        config.error_on_recompile = before


def timed_steps(job, clock, warmup):
    """Run the plan's steps -> metrics of each counted one, with its exact `seconds`."""
    lines = []
    for k in range(job.plan.steps):
        stage = "first step" if k == 0 else "step"
        with clock.stage(stage), compiled_once(k >= warmup):
            line, _ = job.step(k, False)
        lines.append(line | {"seconds": clock.seconds[stage]})
    return lines[warmup:]


def figures(job, clock, lines):
    """What one process measured, per pair and in all; seconds of the steps are summed."""
    first = job.plan.steps - len(lines)
    pairs = [i for k in range(first, job.plan.steps) for i in job.plan.pairs(k)]
    training, reference = Flops(job.model.config).of_pairs(job.train, pairs, job.recipe)
    n, total = len(job.train), sum(line["seconds"] for line in lines)
    reference_tokens = sum(job.train.size(i, job.recipe.reference_paths) for i in pairs)
    per_pair = total / len(pairs) + clock.seconds["reference"] / n
    stages = {f"{stage} seconds": value for stage, value in clock.seconds.items()}
    stages |= {f"{stage} gib": value for stage, value in clock.gib.items()}
    return {
        "pairs_per_second": 1 / per_pair,
        "step_seconds_per_pair": total / len(pairs),
        "reference_seconds_per_pair": clock.seconds["reference"] / n,
        "tokens_per_second": sum(line["tokens"] for line in lines) / total,
        "tokens_per_pair": sum(line["tokens"] for line in lines) / len(pairs),
        "reference_tokens_per_pair": reference_tokens / len(pairs),
        "flops_per_pair": (training + reference) / len(pairs),
        "step_flops_per_second": training / total,
        "row_fill": sum(line["row_fill"] for line in lines) / len(lines),
        "pairs": n,
        "loss": lines[-1]["loss"],
        "dataset_gib": clock.gib["data"] - clock.gib["template"],
        "peak_gib": job.ranks.most(peak_memory(job.ranks.kind)),
    } | stages


def measure(s):
    """One run of train.py's flags -> its figures (of rank 0)."""
    with opened(s) as (job, clock):
        return figures(job, clock, timed_steps(job, clock, s.warmup))


def in_fresh_process(flags, processes=1):
    """{flag: value} -> the figures of a process of its own, or of several under torchrun.

    True and False become --flag and --no-flag, None is left out.
    """
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words.append(Path(__file__))
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words.append(f"--{name}={value}")
    output, _ = execute(words)
    return last_json(output)


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    found = measure(s)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    run(main)
