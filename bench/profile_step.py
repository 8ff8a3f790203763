"""Where does the time of one training step go? `dpo` and `ins_dpo`, part by part.

    python bench/profile_step.py                          # SmolLM2-135M on hh-rlhf, fp32
    python bench/profile_step.py --shape small --mix hh --pairs 8 --batch 8 --dtype bf16

torch.profiler records a step after two to warm up. Every moment belongs to the innermost operation
under way, and that to the part of the model whose forward it is in, or whose forward made the
gradient that it computes (autograd numbers both alike); so on a CPU the parts sum to the whole
step. Recording costs time of its own, most of it where operations are small.

On CUDA blocks are not compiled here, since a compiled block has no parts: the shares are those of
kernels, and *host* is what is left of the step's wall-clock.
"""

import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402

from bench import measuring, training  # noqa: E402
from bench.measuring import percent, table  # noqa: E402
from bench.workload import Workload  # noqa: E402
from jobs.cli import flag, parse, run  # noqa: E402


@dataclass
class Settings(Workload):
    """Flags."""

    pairs: int = flag(16, "pairs of the dataset")
    batch: int = flag(16, "pairs of the step")
    only: str | None = flag("dpo; ins_dpo", "what is profiled")
    out: str = flag("bench/out/profile_step.json", "where the figures go")


WARMUP = 2  # steps, after which the heap holds all that a step takes
PARTS = ("attention: projections", "attention: scores", "MLP", "norms", "embedding", "head")
PARTS += ("optimizer", "clip", "sharding", "rows", "rest of the model", "host")
PREFIXES = {  # of what the profiler or FSDP name by themselves -> part
    "ScoredLogps": "head",
    "Optimizer.step": "optimizer",
    "FSDP::": "sharding",
}


def part_of(name):
    """The part that a recorded name opens, or None for an operation inside one."""
    if name in PARTS:
        return name
    return next((part for prefix, part in PREFIXES.items() if name.startswith(prefix)), None)


def label_modules(model):
    """Forward hooks that record each part of the model under its name; returns their handles."""
    labelled = [(model.embed, "embedding"), (model.norm, "norms")]
    for block in model.blocks:
        labelled += [(block.attn, "attention: scores"), (block.mlp, "MLP")]
        linear = [m for m in block.attn.children() if isinstance(m, torch.nn.Linear)]
        labelled += [(m, "attention: projections") for m in linear]
        inside = {*block.attn.modules(), *block.mlp.modules()}
        norms = [m for m in block.children() if m not in inside]
        labelled += [(m, "norms") for m in norms]
    handles = []
    for module, part in labelled:
        handles += _record_forward(module, part)
    return handles


def _record_forward(module, part):
    """Two hooks: a range opens before a module's forward and closes behind it."""
    open_ranges = []

    def enter(*_):
        open_ranges.append(record_function(part))
        open_ranges[-1].__enter__()

    def leave(*_):
        open_ranges.pop().__exit__(None, None, None)

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)


def label_step(job):
    """Name what a step does outside its modules: rows, the model's own glue, clipping, the rest."""
    rows, update, hidden, step = job.scorer.rows, job.update, job.model.hidden, job.step

    def named(part, function):
        def call(*args, **kwargs):
            with record_function(part):
                return function(*args, **kwargs)

        return call

    job.scorer.rows = named("rows", lambda *args: list(rows(*args)))
    job.update = named("clip", update)
    job.model.hidden = named("rest of the model", hidden)
    job.step = named("host", step)


def attribute(events, device="cpu"):
    """{part: seconds} of a profile's events: each operation's own time, by the part it is in.

    A backward operation has the sequence number of the forward one that it answers, and belongs to
    the part of that one.
    """
    forward, spent = {}, defaultdict(float)

    def part(event):
        while event is not None:
            if found := part_of(event.name):
                return found
            if backward(event):
                return forward.get(event.sequence_nr, "rest of the model")
            event = event.cpu_parent
        return "host"

    for event in events:
        if event.sequence_nr >= 0 and not in_backward(event):
            forward[event.sequence_nr] = part(event)
    own = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    for event in events:
        spent[part(event)] += getattr(event, own) / 1e6  # counted in microseconds
    return dict(spent)


def backward(event):
    """Whether this is the engine at work on one node of the graph."""
    return event.name.startswith("autograd::engine::evaluate_function")


def in_backward(event):
    """Whether an operation runs inside of that."""
    while event is not None and not backward(event):
        event = event.cpu_parent
    return event is not None


@contextmanager
def labelled(job):
    """The job with all of its parts named; its hooks go at the end."""
    handles = label_modules(job.model)
    label_step(job)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(s, model, data, flags):
    """{part: seconds} of one step, and `step`, its seconds as a whole."""
    given = s.train_flags(str(model), str(data)) | {"batch": s.batch, "compile": False}
    settings = training.Settings(steps=1, warmup=WARMUP, **flags, **given)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (s.device == "cuda")
    with training.opened(settings) as (job, clock), labelled(job):
        for k in range(WARMUP):
            job.step(k, False)
        with profile(activities=kinds, acc_events=True) as recorded, clock.stage("step"):
            job.step(WARMUP, False)
    spent = attribute(recorded.events(), s.device)
    whole = clock.seconds["step"]
    if s.device == "cuda":
        spent["host"] = max(0.0, whole - sum(v for k, v in spent.items() if k != "host"))
    return {name: spent.get(name, 0.0) for name in PARTS} | {"step": whole}


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    with s.ready() as (model, data):
        names = measuring.chosen(s.only, training.CONTENDERS)
        found = {n: measure(s, model, data, training.CONTENDERS[n]) for n in names}
    lines = [[part] for part in (*PARTS, "sum of the parts", "step, seconds")]
    for spent in found.values():
        total = sum(spent[part] for part in PARTS)
        column = [percent(spent[part], spent["step"]) for part in PARTS]
        column += [percent(total, spent["step"]), spent["step"]]
        for line, text in zip(lines, column, strict=True):
            line.append(text)
    measuring.tell(s, found, table(("part", *found), lines))


if __name__ == "__main__":
    run(main)
