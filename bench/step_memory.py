"""Peak memory of one training step against vocabulary and row length.

    python bench/step_memory.py                                       # a narrow model on the CPU
    python bench/step_memory.py --device cuda --shape llama-3.2-1b --layers 4 --width 2048

Each point is a step of `ins_dpo` in a process of its own: one row, filled with UltraFeedback-like
pairs. *Step* is the peak over what was held before the first step (weights, the reference); the
optimizer's moments and the gradients are in it, and grow with the vocabulary like the weights.
Beside it what the logits of the row's scored tokens would take if they were ever all there at once,
in fp32: the head makes them a chunk at a time. On the CPU memory is resident memory, less what
the allocator keeps for later; on CUDA it is what torch has allocated.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import measuring, training  # noqa: E402
from bench.checkpoints import published, resized, write_noise  # noqa: E402
from bench.lengths import write_pairs  # noqa: E402
from bench.measuring import DTYPES, median, table  # noqa: E402
from bench.utilisation import filling  # noqa: E402
from jobs.cli import flag, parse, run  # noqa: E402


@dataclass
class Settings:
    """Flags."""

    shape: str = flag("small", "small, or a folder of bench/shapes")
    layers: int = flag(2, "blocks")
    width: int = flag(64, "of the residual stream; heads and feed-forward follow")
    vocabularies: str = flag("32768,65536,131072,262144", "at the middle row length")
    lengths: str = flag("1024,4096,16384", "row lengths, at the first vocabulary")
    dtype: str = flag("fp32", "compute dtype", tuple(DTYPES))
    device: str = flag("cpu", "where", ("cpu", "cuda"))
    checkpoint_activations: bool = flag(False, "recompute blocks in backward, as train.py's")
    repeat: int = flag(1, "runs of each point, in turn")
    out: str = flag("bench/out/step_memory.json", "where the figures go")


def points(s):
    """(vocabulary, row length) pairs: one axis at a time, the other at rest."""
    vocabularies = [int(v) for v in s.vocabularies.split(",")]
    lengths = sorted(int(length) for length in s.lengths.split(","))
    rest = lengths[len(lengths) // 2]
    varied = [(v, rest) for v in vocabularies] + [(vocabularies[0], t) for t in lengths]
    return list(dict.fromkeys(varied))


def measure(s, vocab, length):
    """Peak and held memory (GiB) of a step, and what it scored."""
    pairs, mix = filling(length)
    with tempfile.TemporaryDirectory() as scratch:
        raw = resized(published(s.shape), s.layers, s.width, vocab)
        model = write_noise(Path(scratch) / "model", raw)
        data = write_pairs(Path(scratch) / "pairs.jsonl", mix, pairs, model, spread=0.0)
        flags = {"loss": "ins_dpo", "model": model, "data": data, "batch": pairs}
        flags |= {"steps": 1, "warmup": 1, "max_len": length, "row_tokens": length}
        flags |= {"dtype": s.dtype, "device": s.device}
        flags |= {"checkpoint_activations": s.checkpoint_activations}
        found = training.in_fresh_process(flags)
    held = found["reference gib"]
    logits = pairs * (mix.chosen + mix.rejected) * vocab * 4 / 2**30
    peak = found["peak_gib"]
    return {"peak_gib": peak, "held_gib": held, "step_gib": peak - held, "logits_gib": logits}


HEADERS = ("vocabulary", "row tokens", "peak GiB", "held before", "step", "its whole logits")


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    measures = {point: lambda point=point: measure(s, *point) for point in points(s)}
    runs = measuring.in_turn(measures, s.repeat)
    rows = [[*point, *median(figures).values()] for point, figures in runs.items()]
    named = {f"vocabulary {v}, row {t}": figures for (v, t), figures in runs.items()}
    measuring.tell(s, named, table(HEADERS, rows))


if __name__ == "__main__":
    run(main)
