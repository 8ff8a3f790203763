"""The memory plan's bytes per row against what a process takes: `bench/activation_memory.py`.

Two layers of a published shape run one row forward in fp32 on the CPU, with and without recomputed
blocks; the growth of the process's private memory, with the graph alive, is what activations take.
"""

import os
import sys
from pathlib import Path

# every large tensor is its own mapping, so that what is freed is seen as free
if os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, *sys.argv], env)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dataclasses  # noqa: E402
import gc  # noqa: E402

import torch  # noqa: E402

from bench.process_memory import private_bytes  # noqa: E402
from data import build_row, lay_out  # noqa: E402
from evals.plan import measure  # noqa: E402
from hub.weights import read_config  # noqa: E402
from kernels import chains  # noqa: E402
from model import Transformer  # noqa: E402

TOKENS = 512
SHAPES = ("llama-3.2-1b", "pythia-2.8b", "gemma-2-9b")


def config_of(shape):
    """The published shape with two layers and a small vocabulary, so that it fits a laptop."""
    _, config = read_config(ROOT / "bench" / "shapes" / shape)
    return dataclasses.replace(config, n_layers=2, windows=config.windows[:2], vocab=1024)


def measured(config, recompute):
    """Bytes that a row's forward leaves behind while its graph is alive."""
    with torch.device("meta"):
        model = Transformer(config)
        model.attend = chains.attend
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    for block in model.blocks:
        block.recompute = recompute
    ids = torch.randint(0, config.vocab, (TOKENS,), dtype=torch.int32).numpy()
    row = build_row([lay_out([([ids[:10], ids[10:]], TOKENS - 10)])], [0], 1)
    gc.collect()
    before = private_bytes()
    out = model(row)
    return private_bytes() - before if out.requires_grad else 0


def main():
    print("| two layers of | kept: plan | measured | recomputed: plan | measured |")
    print("| --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        config = config_of(shape)
        planned = measure(config, TOKENS, torch.float32)
        forward = planned.recomputed - planned.block  # the one block exists in backward only
        cells = (planned.activations, measured(config, False), forward, measured(config, True))
        print(f"| {shape} | " + " | ".join(f"{c / 1e6:.0f} MB" for c in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
