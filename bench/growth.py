"""How do time, memory and utilisation of `ins_dpo` grow with pairs, rows, width, words, processes?

    python -m bench.growth                                     # a small model on the CPU
    python -m bench.growth --only "pairs; processes"
    python -m bench.growth --fill --only "row_tokens; vocab" --row_tokens 4096,1024,16384 \
        --vocab 32768,262144                                   # memory of a step of one row
    python -m bench.growth --fill --utilisation --only row_tokens --row_tokens 2048,512 \
        --shape llama-3-8b --layers 2 --width 0 --vocab 4096 --dtype bf16
    python -m bench.growth --fill --utilisation --only row_tokens --row_tokens 16384,4096 --rows 4 \
        --shape llama-3-8b --layers 0 --width 0 --vocab 0 --dtype bf16 --device cuda

One axis at a time; each point is a run in a process of its own (several under torchrun, one thread
each) with a model of noise and synthetic pairs: of --mix, or with --fill those whose tries fill
--rows rows of an optimizer step. On CUDA there are at most as many blocks as kernels/memory.py
says fit beside the longest row.

Time: *data* is reading, rendering and tokenising. Memory: *KiB/pair* is what a pair takes, tokens
and reference included; *step* is the peak over what was held before the first step; beside it what
the logits of a row's scored tokens would take if they were ever all there at once, in fp32: the
head makes them a chunk at a time. On the CPU memory is resident memory, less what the allocator
keeps for later; on CUDA it is what torch has allocated.

With --utilisation useful model FLOPs (bench/measuring.py) per second are also told over the rate of
plain matrix products of these shapes measured just before, over that of a big square, and over the
datasheet's bf16 rate where the GPU is known; and a row of the model as it trains is held against
the fp32 CPU reference: a large difference is an error. So is, always, a recompilation in the
counted steps.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import measuring, training
from bench.inputs import MIXES, Mix, filling, published, resized, write_noise, write_pairs
from bench.measuring import DTYPES, Flops, percent, table, whole_numbers
from data import build_row
from jobs.cli import UserError, flag, parse, run
from kernels.memory import HEADROOM, per_gpu
from kernels.memory import measure as sizes_of
from model import config_of, load
from train import TrainFlags

AXES = ("pairs", "row_tokens", "width", "vocab", "processes")
FARTHEST = {"fp32": (1e-4, 1e-3), "bf16": (0.05, 1.0)}  # mean and largest |difference|, nats


@dataclass(frozen=True)
class GrowthFlags:
    """Flags. The first value of every list is where the others rest."""

    only: str | None = flag("pairs; row_tokens; width; processes", "axes")
    pairs: str = flag("1024,4096,16384", "pairs of the dataset; not with --fill")
    row_tokens: str = flag("2048,4096,8192", "row lengths")
    width: str = flag("64,128,256", "of the model; heads and feed-forward follow; 0: the shape's")
    vocab: str = flag("1024", "words of the vocabulary; 0: the shape's")
    processes: str = flag("1,2", "processes, under torchrun when several")
    shape: str = flag("small", "small, or a folder of bench/shapes")
    layers: int = flag(2, "blocks; 0: the shape's")
    mix: str = flag("hh", "length mix", tuple(MIXES))
    fill: bool = flag(False, "instead: UltraFeedback-like pairs that fill each row")
    batch: int = flag(32, "pairs per optimizer step; not with --fill")
    rows: int = flag(1, "with --fill: rows per optimizer step")
    steps: int = flag(3, "counted steps")
    uncounted: int = flag(1, "steps before them")
    repeat: int = flag(1, "runs of each point, in turn")
    dtype: str = flag("fp32", "compute dtype", tuple(DTYPES))
    device: str = flag("cpu", "where", ("cpu", "cuda"))
    compile: bool | None = flag(None, "compile the blocks; default: on CUDA")
    checkpoint_activations: bool = flag(False, "recompute blocks in backward")
    utilisation: bool = flag(False, "also matmul rates, and log-probabilities held to fp32's")
    out: str = flag("bench/out/growth.json", "where the figures go")


def points(s):
    """{(axis, value): {axis: value of every axis}}."""
    values = {axis: whole_numbers(getattr(s, axis)) for axis in AXES}
    rest = {axis: first for axis, (first, *_) in values.items()}
    axes = measuring.chosen(s.only, AXES)
    return {(axis, value): rest | {axis: value} for axis in axes for value in values[axis]}


def shape_of(s, point):
    """config.json of the model of one point, as a dict."""
    raw = resized(published(s.shape), s.layers, point["width"], point["vocab"])
    return resized(raw, layers=fitting(s, raw)) if s.device == "cuda" else raw


def fitting(s, raw):
    """As many blocks, at most all, as fit this GPU beside the longest row: kernels/memory.py."""
    room = HEADROOM * torch.cuda.get_device_properties(0).total_memory
    for n in range(raw["num_hidden_layers"], 0, -1):
        config = config_of(raw | {"num_hidden_layers": n})
        sizes = sizes_of(config, max(whole_numbers(s.row_tokens)))
        row = sizes["recomputed" if s.checkpoint_activations else "activations"]
        if sum(per_gpu(sizes, 1).values()) + row <= room:
            return n
    raise UserError(f"not one block of {s.shape} fits; lower --row_tokens or --vocab")


def prepared(s, point, raw, scratch):
    """(flags of bench/training.py, scored tokens of a row) of one point; writes model and pairs."""
    length, model = point["row_tokens"], Path(scratch) / f"{point['width']}-{point['vocab']}"
    if not model.exists():
        write_noise(model, raw)
    pairs, batch, mix, options = point["pairs"], s.batch, MIXES[s.mix], {}
    if s.fill:
        inside, mix = filling(length)
        pairs, batch, options = s.rows * inside, s.rows * inside, {"spread": 0.0}
    data = write_pairs(f"{scratch}/pairs.jsonl", mix, pairs, model, **options)
    flags = {"loss": "ins_dpo", "model": str(model), "data": data, "batch": batch}
    flags |= {"row_tokens": length, "max_len": length if s.fill else 1024, "steps": s.steps}
    flags |= {"uncounted": s.uncounted, "dtype": s.dtype, "device": s.device}
    flags |= {"compile": s.compile, "checkpoint_activations": s.checkpoint_activations}
    return flags, (mix.chosen + mix.rejected) * batch / s.rows


def measure(s, point, scratch):
    """Figures of one point: per pair, per second, GiB; and the machine's matmul rates."""
    raw = shape_of(s, point)
    flags, scored = prepared(s, point, raw, scratch)
    rates = {}
    if s.utilisation:
        size = (point["row_tokens"], DTYPES[s.dtype], s.device)
        rates = measuring.ceilings(Flops(config_of(raw)).shapes, *size, repeat=3)
        if s.device == "cuda":
            torch.cuda.empty_cache()  # the process that trains wants it
    found = measuring.fresh("training.measure", point["processes"], **flags)
    logits = scored * raw["vocab_size"] * 4 / 2**30
    return found | rates | {"logits_gib": logits if s.fill else None}


def check(s, point, scratch):
    """(mean, largest) difference of log-probabilities from the fp32 CPU reference; one pair."""
    flags, _ = prepared(s, point, shape_of(s, point), scratch)
    data = write_pairs(f"{scratch}/check.jsonl", Mix(40, 60, 60), 1, flags["model"])
    given = {k: v for k, v in flags.items() if k != "uncounted"} | {"data": data}
    with training.opened(TrainFlags(**given)) as (job, _), torch.no_grad():
        paths = job.recipe.paths
        ours = job.model(next(job.rows(job.train, [0], paths))).cpu()
        row = build_row([job.train.trie(0, paths)], [0], len(paths))
        theirs = load(flags["model"])(row)
    gap = (ours - theirs).abs()
    found, allowed = (gap.mean().item(), gap.max().item()), FARTHEST[s.dtype]
    if not (found[0] <= allowed[0] and found[1] <= allowed[1]):
        raise UserError(f"log-probabilities are {found} nats from the reference, not {allowed}")
    return found


# ----------------------------------------------------------------------------- tables

TIME = ("data, ms/pair", "reference, ms/pair", "step, ms/pair", "tokens/s", "row fill")
MEMORY = ("KiB/pair", "peak GiB", "held before", "step", "its whole logits")
SHARES = ("useful TFLOP/s", "of these shapes' products", "of a square's", "of the datasheet's")


def time_row(m):
    """The columns of TIME."""
    seconds = m["data seconds"] / m["pairs"], m["reference_seconds_per_pair"]
    milliseconds = [1e3 * x for x in (*seconds, m["step_seconds_per_pair"])]
    return [*milliseconds, m["tokens_per_second"], percent(m["row_fill"], 1)]


def memory_row(m):
    """The columns of MEMORY."""
    peak, held = m["peak_gib"], m["held_gib"]
    return [m["dataset_gib"] * 2**20 / m["pairs"], peak, held, peak - held, m["logits_gib"]]


def share_row(m):
    """The columns of SHARES."""
    rate = m["step_flops_per_second"]
    ceilings = (m["model"], m["square"], measuring.datasheet_rate())
    return [rate / 1e12, *(percent(rate, ceiling) for ceiling in ceilings)]


def main():
    s = parse(GrowthFlags, __doc__.splitlines()[0])
    every = points(s)
    with tempfile.TemporaryDirectory() as scratch:
        measures = {k: lambda p=p: measure(s, p, scratch) for k, p in every.items()}
        runs = measuring.in_turn(measures, s.repeat)
        gap = check(s, next(iter(every.values())), scratch) if s.utilisation else None
    middle = {f"{axis} {n:,}": measuring.median(runs[axis, n]) for axis, n in every}
    kinds = [(TIME, time_row), (MEMORY, memory_row), (SHARES, share_row)][: 3 if gap else 2]
    tables = [table(("", *h), [(k, *row(m)) for k, m in middle.items()]) for h, row in kinds]
    if gap:
        told = f"log-probabilities within {gap[0]:.2g} nats of the fp32 reference in the mean, "
        tables.append(told + f"{gap[1]:.2g} at most")
    named = {f"{axis} {n}": figures for (axis, n), figures in runs.items()}
    measuring.tell(s, {"runs": named, "gap": gap}, *tables)


if __name__ == "__main__":
    run(main)
