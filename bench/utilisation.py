"""How much of the machine does a training step use, on blocks of an 8B model, by row length?

    python bench/utilisation.py --device cuda           # bf16, FlexAttention, compiled; not yet run
    python bench/utilisation.py                         # a small shape on the CPU, to see it work
    python bench/utilisation.py --dtype bf16 --shape llama-3-8b --blocks 1 --vocab 4096

A step of `ins_dpo` is forward, backward and AdamW, set up as train.py does on one device: fp32
masters, compute in --dtype. Rows are filled with UltraFeedback-like pairs that fit their length; on
CUDA there are as many blocks as memory.py says fit the longest row. Utilisation is useful model
FLOPs (bench/flops.py) per second: over the rate of plain matrix products of these shapes measured
just before, over that of a big square, and over the datasheet's bf16 rate where the GPU is known.

What is compiled is compiled before the counted steps: a recompilation in them is an error. A row of
the model as it trains is held against the fp32 CPU reference; a large difference is an error too.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from bench import measuring, training  # noqa: E402
from bench.checkpoints import published, resized, write_noise  # noqa: E402
from bench.flops import Flops  # noqa: E402
from bench.lengths import Mix, write_pairs  # noqa: E402
from bench.measuring import DTYPES, percent, table  # noqa: E402
from data import build_row  # noqa: E402
from evals.plan import HEADROOM, per_gpu  # noqa: E402
from evals.plan import measure as sizes_of  # noqa: E402
from families import Config  # noqa: E402
from jobs.cli import UserError, flag, parse, run  # noqa: E402
from model import load  # noqa: E402

TRIE = 1350  # tokens of ins_dpo's trie of an UltraFeedback-like pair, a little more than the mean
FARTHEST = {"fp32": (1e-4, 1e-3), "bf16": (0.05, 1.0)}  # mean and largest |difference|, nats


@dataclass
class Settings:
    """Flags. None: by device."""

    shape: str | None = flag(None, "a folder of bench/shapes, or small; CUDA: llama-3-8b")
    blocks: int | None = flag(None, "how many; CUDA: as many as fit; CPU: the shape's, at most 4")
    vocab: int | None = flag(None, "vocabulary; default: the shape's")
    lengths: str | None = flag(None, "row lengths; CUDA: 4096,8192,16384; CPU: 512,2048,8192")
    rows: int | None = flag(None, "rows of a step; CUDA: 4; CPU: 1")
    steps: int = flag(5, "counted steps of a run")
    warmup: int = flag(2, "steps before them")
    repeat: int | None = flag(None, "runs of each row length, in turn; CUDA: 1; CPU: 3")
    dtype: str | None = flag(None, "compute dtype; CUDA: bf16; CPU: fp32", tuple(DTYPES))
    device: str = flag("cpu", "where", ("cpu", "cuda"))
    compile: bool | None = flag(None, "compile the blocks; default: on CUDA")
    checkpoint_activations: bool = flag(False, "recompute blocks in backward, as train.py's")
    check: bool = flag(True, "hold log-probabilities against the fp32 CPU reference")
    out: str = flag("bench/out/utilisation.json", "where the figures go")


GPU = {"shape": "llama-3-8b", "lengths": "4096,8192,16384", "rows": 4, "dtype": "bf16", "repeat": 1}
CPU = {"shape": "small", "lengths": "512,2048,8192", "rows": 1, "dtype": "fp32", "repeat": 3}


def resolve(s):
    """Fill in what was not given -> config.json of the blocks as a dict, and the row lengths."""
    for name, value in (GPU if s.device == "cuda" else CPU).items():
        if getattr(s, name) is None:
            setattr(s, name, value)
    lengths = [int(length) for length in s.lengths.split(",")]
    raw = resized(published(s.shape), vocab=s.vocab)
    if s.blocks is None:
        s.blocks = fitting(raw, max(lengths), s) if s.device == "cuda" else 4
    return raw | {"num_hidden_layers": min(s.blocks, raw["num_hidden_layers"])}, lengths


def fitting(raw, tokens, s):
    """As many blocks as memory.py says fit this GPU beside a row of so many tokens."""
    room = HEADROOM * torch.cuda.get_device_properties(0).total_memory
    for n in range(raw["num_hidden_layers"], 0, -1):
        sizes = sizes_of(Config.from_hf(raw | {"num_hidden_layers": n}), tokens)
        row = sizes.recomputed if s.checkpoint_activations else sizes.activations
        if sum(per_gpu(sizes, 1).values()) + row <= room:
            return n
    raise UserError(f"not one block of {s.shape} fits; lower --lengths or --vocab")


def filling(length):
    """(pairs of a row, their Mix): UltraFeedback-like pairs whose tries fill `length` tokens."""
    pairs = max(1, length // TRIE)
    room = length // pairs - 16  # separators and end tokens
    answer = room * 280 // (180 + 4 * 280)
    return pairs, Mix(room - 4 * answer, answer, answer)


def flags_of(s, model, data, length):
    """Flags of bench/training.py for rows of one length."""
    flags = {"loss": "ins_dpo", "model": model, "data": data, "max_len": length}
    flags |= {"row_tokens": length, "batch": s.rows * filling(length)[0], "dtype": s.dtype}
    flags |= {"device": s.device, "compile": s.compile, "steps": s.steps, "warmup": s.warmup}
    return flags | {"checkpoint_activations": s.checkpoint_activations}


def measure(s, model, shapes, scratch, length):
    """Figures of steps with rows of one length, and the machine's matmul rates beside them."""
    pairs, mix = filling(length)
    data = write_pairs(f"{scratch}/{length}.jsonl", mix, s.rows * pairs, model, spread=0.0)
    rates = measuring.ceilings(shapes, length, DTYPES[s.dtype], s.device, repeat=3)
    if s.device == "cuda":
        torch.cuda.empty_cache()  # the process that trains wants it
    found = training.in_fresh_process(flags_of(s, model, data, length))
    kept = ("tokens_per_second", "step_flops_per_second", "row_fill", "peak_gib", "loss")
    return rates | {name: found[name] for name in kept}


def check(s, model, scratch, length):
    """(mean, largest) difference of log-probabilities from the fp32 CPU reference; one pair."""
    data = write_pairs(f"{scratch}/check.jsonl", Mix(40, 60, 60), 1, model)
    settings = training.Settings(**flags_of(s, str(model), data, length))
    with training.opened(settings) as (job, _), torch.no_grad():
        ours = job.model(next(job.scorer.rows(job.train, [0], job.rule.paths))).cpu()
        row = build_row([job.train.trie(0, job.rule.paths)], [0], len(job.rule.paths))
        theirs = load(model)(row)
    gap = (ours - theirs).abs()
    found, allowed = (gap.mean().item(), gap.max().item()), FARTHEST[s.dtype]
    if not (found[0] <= allowed[0] and found[1] <= allowed[1]):
        raise UserError(f"log-probabilities are {found} nats from the reference, not {allowed}")
    return found


HEADERS = ("row tokens", "filled", "tokens/s", "useful TFLOP/s", "of these shapes' matmul rate")
HEADERS += ("of a square's", "of the datasheet's", "peak GiB")


def rows(runs):
    """Lines of the table: medians of each row length's runs, and shares of three ceilings."""
    for length, figures in runs.items():
        m = measuring.median(figures)
        rate = m["step_flops_per_second"]
        ceilings = (m["model"], m["square"], measuring.datasheet_rate())
        shares = [percent(rate, ceiling) for ceiling in ceilings]
        fill, speed = percent(m["row_fill"], 1), m["tokens_per_second"]
        yield [length, fill, speed, rate / 1e12, *shares, m["peak_gib"]]


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    raw, lengths = resolve(s)
    with tempfile.TemporaryDirectory() as scratch:
        model = write_noise(Path(scratch) / "model", raw)
        shapes = Flops(Config.from_hf(raw)).shapes
        measures = {n: lambda n=n: measure(s, model, shapes, scratch, n) for n in lengths}
        runs = measuring.in_turn(measures, s.repeat)
        gap = check(s, model, scratch, lengths[0]) if s.check else None
    said = f"{raw['num_hidden_layers']} blocks of {s.shape}, vocabulary {raw['vocab_size']}, "
    said += f"{s.dtype}; no recompilation in {s.steps} steps of {s.rows} rows"
    if gap:
        said += f"; log-probabilities within {gap[0]:.2g} nats of the fp32 reference in the mean, "
        said += f"{gap[1]:.2g} at most"
    measuring.tell(s, {"runs": runs, "gap": gap}, table(HEADERS, rows(runs)), said)


if __name__ == "__main__":
    run(main)
