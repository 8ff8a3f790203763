"""Where does the time of one training step go? `dpo` and `ins_dpo`, part by part.

    python -m bench.profile_step                          # SmolLM2-135M on hh-rlhf, fp32
    python -m bench.profile_step --shape small --mix hh --pairs 8 --batch 8 --dtype bf16

torch.profiler records a step after two that do not count. Every moment belongs to the innermost
operation under way, and that to the part of the model whose forward it is in, or whose forward made
the gradient that it computes (autograd numbers both alike); so on a CPU the parts sum to the whole
step. Recording costs time of its own, most of it where operations are small.

On CUDA blocks are not compiled here, since a compiled block has no parts: the shares are those of
kernels, and *host* is what is left of the step's wall-clock.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench import measuring, training
from bench.inputs import WorkloadFlags
from bench.measuring import percent, table
from jobs.cli import flag, parse, run
from train import TrainFlags


@dataclass(frozen=True)
class ProfileFlags(WorkloadFlags):
    """Flags."""

    pairs: int = flag(16, "pairs of the dataset")
    batch: int = flag(16, "pairs of the step")
    only: str | None = flag("dpo; ins_dpo", "what is profiled")
    out: str = flag("bench/out/profile_step.json", "where the figures go")


UNCOUNTED = 2  # steps, after which the heap holds all that a step takes
PARTS = ("attention: projections", "attention: scores", "MLP", "norms", "embedding", "head")
PARTS += ("optimizer", "clip", "sharding", "rows", "rest of the model", "host")
PREFIXES = {  # of what the profiler or FSDP name by themselves -> part
    "ScoredLogps": "head",
    "Optimizer.step": "optimizer",
    "FSDP::": "sharding",
}

# ----------------------------------------------------------------------------- naming the parts


def label(job):
    """Records every part of a step of a train.Run under its name."""
    model = job.model
    rows = job.rows
    job.rows = lambda *args: list(rows(*args))  # not one by one between forwards
    record(job, "rows", "rows")
    record(job, "step", "host")
    record(job, "update", "clip")
    record(model, "hidden", "rest of the model")
    record(model.embed, "forward", "embedding")
    record(model.norm, "forward", "norms")
    for block in model.blocks:
        record(block.attn, "forward", "attention: scores")
        record(block.mlp, "forward", "MLP")
        for linear in (m for m in block.attn.children() if isinstance(m, torch.nn.Linear)):
            record(linear, "forward", "attention: projections")
        for norm in (m for m in block.children() if m not in (block.attn, block.mlp)):
            record(norm, "forward", "norms")


def record(owner, method, part):
    """Puts a method into a range of the profiler that has the part's name."""
    setattr(owner, method, record_function(part)(getattr(owner, method)))


# ----------------------------------------------------------------------------- reading the profile


def attribute(events, device="cpu"):
    """{part: seconds} of a profile's events: each operation's own time, by the part it is in.

    A backward operation has the sequence number of the forward one that it answers, and belongs to
    the part of that one.
    """
    forward, spent = {}, defaultdict(float)

    def part(event):
        """That of the innermost range around an event that names one."""
        for outer in around(event):
            if found := part_of(outer.name):
                return found
            if backward(outer):
                return forward.get(outer.sequence_nr, "rest of the model")
        return "host"

    for event in events:
        if event.sequence_nr >= 0 and not any(map(backward, around(event))):
            forward[event.sequence_nr] = part(event)
    own = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    for event in events:
        spent[part(event)] += getattr(event, own) / 1e6  # counted in microseconds
    return dict(spent)


def around(event):
    """Yield an event and what it lies in, inside out."""
    while event is not None:
        yield event
        event = event.cpu_parent


def part_of(name):
    """The part that a recorded name opens, or None for an operation inside one."""
    if name in PARTS:
        return name
    return next((part for prefix, part in PREFIXES.items() if name.startswith(prefix)), None)


def backward(event):
    """Whether this is the engine at work on one node of the graph."""
    return event.name.startswith("autograd::engine::evaluate_function")


# ----------------------------------------------------------------------------- the command


def measure(s, model, data, flags):
    """{part: seconds} of one step, and `step`, its seconds as a whole."""
    given = flags | s.train_flags(model, data) | {"batch": s.batch, "compile": False}
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (s.device == "cuda")
    with training.opened(TrainFlags(**given, steps=1), UNCOUNTED) as (job, clock):
        label(job)
        for k in range(UNCOUNTED):
            job.step(k, False)
        with profile(activities=kinds, acc_events=True) as recorded, clock.stage("step"):
            job.step(UNCOUNTED, False)
    spent = attribute(recorded.events(), s.device)
    whole = clock.seconds["step"]
    if s.device == "cuda":
        spent["host"] = max(0.0, whole - sum(v for k, v in spent.items() if k != "host"))
    return {name: spent.get(name, 0.0) for name in PARTS} | {"step": whole}


def main():
    s = parse(ProfileFlags, __doc__.splitlines()[0])
    with s.ready() as (model, data):
        names = measuring.chosen(s.only, training.CONTENDERS)
        found = {n: measure(s, model, data, training.CONTENDERS[n]) for n in names}
    lines = [(p, *(percent(spent[p], spent["step"]) for spent in found.values())) for p in PARTS]
    sums = [percent(sum(spent[p] for p in PARTS), spent["step"]) for spent in found.values()]
    lines.append(("sum of the parts", *sums))
    lines.append(("step, seconds", *(spent["step"] for spent in found.values())))
    measuring.tell(s, found, table(("part", *found), lines))


if __name__ == "__main__":
    run(main)
