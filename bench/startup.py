"""How long until a run trains: import, data, load, reference pass, first step.

    python bench/startup.py                       # SmolLM2-135M on hh-rlhf
    python bench/startup.py --shape small --mix hh --pairs 64

Each run is a process of its own; the first, which brings the files into the page cache, does not
count. *Template* compiles the chat template; *data* reads, renders and tokenises; *load* builds,
shards and fills the model; the *reference* pass comes once per run and is kept on disk; the *first
step* allocates (and on CUDA compiles) what the later ones find there.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import measuring, training  # noqa: E402
from bench.measuring import median, table  # noqa: E402
from bench.workload import Workload  # noqa: E402
from jobs.cli import flag, parse, run  # noqa: E402


@dataclass
class Settings(Workload):
    """Flags."""

    loss: str = flag("ins_dpo", "objective")
    batch: int = flag(16, "pairs per optimizer step")
    repeat: int = flag(3, "counted runs")
    out: str = flag("bench/out/startup.json", "where the figures go")


STAGES = ("import", "template", "data", "load", "reference", "first step", "step")
PER_PAIR = {"data": "pairs", "reference": "pairs", "first step": "batch", "step": "batch"}


def measure(s, model, data):
    """Seconds by stage of one process."""
    flags = {"loss": s.loss, "batch": s.batch, "steps": 1}
    found = training.in_fresh_process(flags | s.train_flags(model, data))
    return {stage: found[f"{stage} seconds"] for stage in STAGES}


def rows(s, seconds):
    """A line per stage: seconds, and milliseconds per pair where it grows with the pairs."""
    for stage, value in seconds.items():
        pairs = getattr(s, PER_PAIR[stage]) if stage in PER_PAIR else None
        yield stage, value, 1e3 * value / pairs if pairs else None


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    with s.ready() as (model, data):
        measure(s, model, data)
        runs = measuring.in_turn({"start-up": lambda: measure(s, model, data)}, s.repeat)
    lines = rows(s, median(runs["start-up"]))
    measuring.tell(s, runs, table(("stage", "seconds", "ms/pair"), lines))


if __name__ == "__main__":
    run(main)
