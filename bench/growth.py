"""Do time and memory per pair stay flat in the number of pairs? And how do they grow with the rest?

    python bench/growth.py
    python bench/growth.py --only "pairs; processes"

Four axes, one at a time, each point in a process of its own: pairs of the dataset (1k, 4k, 16k),
row length, width of the model, processes under torchrun (one thread each). HH-like synthetic
pairs, a small random model, `ins_dpo`. *Data* is reading, rendering and tokenising; *KiB* is what
a pair in memory takes, tokens and reference included.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import measuring, training  # noqa: E402
from bench.checkpoints import SMALL, resized, write_noise  # noqa: E402
from bench.lengths import MIXES, write_pairs  # noqa: E402
from bench.measuring import median, table  # noqa: E402
from jobs.cli import flag, parse, run  # noqa: E402


@dataclass
class Settings:
    """Flags. The first value of every list is where the others rest."""

    only: str | None = flag(None, 'axes, as "pairs; width"; default: all')
    pairs: str = flag("1024,4096,16384", "pairs of the dataset")
    row_tokens: str = flag("2048,4096,8192", "row lengths")
    width: str = flag("64,128,256", "widths of the model, of 2 layers")
    processes: str = flag("1,2", "processes, under torchrun when several")
    mix: str = flag("hh", "length mix", tuple(MIXES))
    batch: int = flag(32, "pairs per optimizer step")
    steps: int = flag(3, "counted steps")
    repeat: int = flag(1, "runs of each point, in turn")
    out: str = flag("bench/out/growth.json", "where the figures go")


AXES = ("pairs", "row_tokens", "width", "processes")


def values(s, axis):
    return [int(value) for value in getattr(s, axis).split(",")]


def measure(s, point, scratch):
    """Figures of one point {axis: value}."""
    model = Path(scratch) / f"width-{point['width']}"
    if not model.exists():
        write_noise(model, resized(SMALL, 2, point["width"]))
    data = Path(scratch) / f"{point['pairs']}.jsonl"
    if not data.exists():
        write_pairs(data, MIXES[s.mix], point["pairs"], model)
    flags = {"loss": "ins_dpo", "instruction": "go", "model": model, "data": data}
    flags |= {"batch": s.batch, "steps": s.steps, "max_len": 1024, "dtype": "fp32"}
    flags |= {"row_tokens": point["row_tokens"], "device": "cpu"}
    found = training.in_fresh_process(flags, point["processes"])
    return {
        "data_ms": 1e3 * found["data seconds"] / point["pairs"],
        "reference_ms": 1e3 * found["reference_seconds_per_pair"],
        "step_ms": 1e3 * found["step_seconds_per_pair"],
        "tokens_per_second": found["tokens_per_second"],
        "pair_kib": found["dataset_gib"] * 2**20 / point["pairs"],
        "peak_gib": found["peak_gib"],
    }


HEADERS = ("data, ms/pair", "reference, ms/pair", "step, ms/pair", "tokens/s", "KiB/pair")
HEADERS += ("peak GiB",)


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    rest = {axis: values(s, axis)[0] for axis in AXES}
    axes = measuring.chosen(s.only, AXES)
    points = {(axis, value): rest | {axis: value} for axis in axes for value in values(s, axis)}
    with tempfile.TemporaryDirectory() as scratch:
        measures = {k: lambda p=p: measure(s, p, scratch) for k, p in points.items()}
        runs = measuring.in_turn(measures, s.repeat)
    lines = [(f"{axis} {n:,}", *median(runs[axis, n]).values()) for axis, n in points]
    named = {f"{axis} {n}": figures for (axis, n), figures in runs.items()}
    measuring.tell(s, named, table(("", *HEADERS), lines))


if __name__ == "__main__":
    run(main)
