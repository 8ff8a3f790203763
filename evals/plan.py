"""Computes what a training run will need of each GPU: `python evaluate.py plan --model DIR`.

Only config.json is read, and the model is built on the meta device: no weights, no GPU, a second.
"""

from dataclasses import dataclass

from evals.results import table
from hub.weights import resolve
from jobs.cli import CheckpointFlags, flag, require
from kernels.memory import HEADROOM, measure, per_gpu
from model import read_config

GPUS = (1, 4, 8)


@dataclass(frozen=True)
class PlanFlags(CheckpointFlags):
    row_tokens: int = flag(8192, "tokens per row", least=1)
    keep: int = flag(2, "newest checkpoints that training keeps, beside the best one", least=1)


def memory_table(config, tokens, gpu_bytes=80 * 10**9):
    """The lines that are printed: one per number of GPUs, and what of a row fits beside it."""
    sizes, gb, rows = measure(config, tokens), 1e9, []
    row_sizes = sizes["activations"], sizes["recomputed"]
    kept = "{:.1f} GB for backward, {:.1f} GB".format(*(size / gb for size in row_sizes))
    yield (f"{sizes['parameters']:,} parameters; a row of {tokens} tokens keeps {kept} "
           "with --checkpoint_activations")  # fmt: skip
    for n in GPUS:
        parts = per_gpu(sizes, n)
        parts["sum"] = total = sum(parts.values())
        rows.append({"GPUs": str(n)} | {what: f"{size / gb:.1f}" for what, size in parts.items()})
        for name, row in zip(("+ row", "+ recomputed"), row_sizes, strict=True):
            fits = total + row <= HEADROOM * gpu_bytes
            rows[-1][name] = f"{(total + row) / gb:.1f}{'' if fits else ' (too much)'}"
    yield table(rows)
    yield (f"GB per GPU; too much: over {HEADROOM:.0%} of {gpu_bytes / gb:.0f} GB. "
           "--offload keeps weights, gradients and optimizer in CPU memory")  # fmt: skip


def disk_line(parameters, keep):
    """What a run leaves on disk: fp32 weights and two moments by checkpoint, models in bf16."""
    checkpoint, model = 12 * parameters / 1e9, 2 * parameters / 1e9
    most = (keep + 2) * checkpoint + 2 * model  # the best, and the next before the oldest goes
    return (f"on disk: a checkpoint {checkpoint:.1f} GB, best and final {model:.1f} each; "
            f"with --keep {keep} at most {most:.0f} GB")  # fmt: skip


def plan(s):
    """Print parameters, and bytes per GPU, of a training run of --model."""
    require(s, "model")
    _, config = read_config(resolve(s.model))
    print("\n".join(memory_table(config, s.row_tokens)))
    print(disk_line(measure(config, 1)["parameters"], s.keep))
