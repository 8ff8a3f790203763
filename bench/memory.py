"""Memory of a process: what a row's activations take, and what loading and exporting take.

    python -m bench.memory activations      bytes per row as autograd keeps them, and as measured
    python -m bench.memory loading          bf16 noise in the shape of Llama-3.2-1B: 2.5 GB of disk
    python -m bench.memory loading --shape llama-3-8b      16 GB of disk, 17 GB of memory

Activations: two layers of published shapes run one row forward in fp32 on the CPU, with and without
recomputed blocks; the growth of the process's private memory, with the graph alive, is theirs. The
blocks are not compiled: what compiled ones keep is kernels/memory.py's.

Loading: a checkpoint of noise is written shard by shard, loaded with 1, 2 and 4 processes straight
into FSDP2 shards, exported from them, and removed. A process's memory is sampled while it works:
*private* is what nobody shares and no file backs, *resident* adds the pages of the mapped files,
which the kernel takes back when it needs them. bf16 shards instead of fp32 masters, so that 8B
parameters fit 24 GB.

Figures are in GB and seconds, the largest of all processes.
"""

import dataclasses
import gc
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from bench import measuring
from bench.inputs import published, write_noise
from bench.measuring import ROOT, fresh, smaps, table, whole_numbers
from data import build_row, lay_out
from jobs.cli import UserError, flag, parse, run
from jobs.processes import Ranks, whole_tensors
from kernels import chains
from model import Transformer, export, read_config, rope_table
from train import TrainFlags, build_model


@dataclass(frozen=True)
class MemoryFlags:
    """Flags."""

    what: tuple = flag((), "activations, or loading")
    tokens: int = flag(512, "activations: of a row")
    shapes: str = flag("llama-3.2-1b; pythia-2.8b; gemma-2-9b", "activations: of bench/shapes")
    shape: str = flag("llama-3.2-1b", "loading: a folder of bench/shapes, or small")
    processes: str = flag("1,2,4", "loading: how many load")
    tmp: str | None = flag(None, "loading: where the checkpoint goes")
    out: str = flag("bench/out/memory.json", "where the figures go")


# ----------------------------------------------------------------------------- activations


def activations(s):
    """Bytes of a row of every shape, planned and measured in a process of its own; (…, table)."""
    # every large tensor is its own mapping, so that what is freed is seen as free
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    shapes, figures = [shape.strip() for shape in s.shapes.split(";")], {}
    found = fresh("memory.rows", env=env, shapes=shapes, tokens=s.tokens)
    for shape, (kept, recomputed) in found.items():
        config = two_layers(shape)
        stream = 4 * s.tokens * config.width  # bytes of the residual stream, and 4 at the ends
        plans = {"kept: plan": 2 * saved_bytes(config, s.tokens) + 4 * stream}
        plans |= {"recomputed: plan": 2 * stream + 4 * stream}
        figures[shape] = plans | {"kept": kept, "recomputed": recomputed}
    columns = ("kept: plan", "kept", "recomputed: plan", "recomputed")
    lines = [(shape, *(found[c] / 1e9 for c in columns)) for shape, found in figures.items()]
    return figures, table(("two layers of", *columns), lines)


def two_layers(shape):
    """The Config of a published shape with two layers and a small vocabulary, to fit a laptop."""
    _, config = read_config(ROOT / "bench" / "shapes" / shape)
    return dataclasses.replace(config, n_layers=2, windows=config.windows[:2], vocab=1024)


def saved_bytes(config, tokens, device="meta"):
    """Bytes that autograd keeps for the backward of one block op by op, parameters left out."""
    with torch.device(device):
        block = Transformer(config).blocks[0]
        cos, sin = rope_table(config, torch.arange(tokens)[None], torch.float32)
        x = torch.zeros(1, tokens, config.width, requires_grad=True)
    # left out: its parameters, and what all blocks share
    own = {t.untyped_storage()._cdata for t in (*block.parameters(), cos, sin)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = block.body(x, cos, sin, Kernel.apply)  # alive: so no storage is counted twice
    return sum(kept.values()) if y.requires_grad else 0


class Kernel(torch.autograd.Function):
    """Stands for a fused attention kernel, which keeps q, k, v, its output and a log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v):
        y, logsumexp = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, y, logsumexp)
        return y


def rows(shapes, tokens):
    """{shape: [bytes that a forward leaves behind, the same with recomputed blocks]}."""
    return {name: [grown(two_layers(name), tokens, r) for r in (False, True)] for name in shapes}


def grown(config, tokens, recompute):
    """Bytes that a row's forward leaves behind while its graph is alive."""
    with torch.device("meta"):
        model = Transformer(config)
        model.attend = chains.attend
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    for block in model.blocks:
        block.recompute = recompute
    ids = torch.randint(0, config.vocab, (tokens,), dtype=torch.int32).numpy()
    row = build_row([lay_out([([ids[:10], ids[10:]], tokens - 10)])], [0], 1)
    gc.collect()
    before = smaps()["Anonymous"]
    out = model(row)
    return smaps()["Anonymous"] - before if out.requires_grad else 0


# ----------------------------------------------------------------------------- loading


class Peak:
    """Largest private and resident memory of this process while the block runs, and its seconds."""

    def __enter__(self):
        self.private = self.resident = 0
        self.done, self.start = threading.Event(), time.time()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.wait(0.1):
            now = smaps()
            self.private = max(self.private, now["Anonymous"] / 1e9)
            self.resident = max(self.resident, now["Rss"] / 1e9)

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()
        self.seconds = time.time() - self.start

    def figures(self, name):
        """{figure: GB or seconds}, named after what was done."""
        return {f"{name} {k}": getattr(self, k) for k in ("private", "resident", "seconds")}


COLUMNS = ("idle", "load seconds", "load private", "load resident")
COLUMNS += ("export seconds", "export private", "but rank 0")


def loading(s):
    """Loads and exports with every number of processes -> (figures, table)."""
    figures = {}
    with tempfile.TemporaryDirectory(dir=s.tmp) as folder:
        directory = write_noise(Path(folder) / "model", published(s.shape))
        for n in whole_numbers(s.processes):
            env = {"OMP_NUM_THREADS": "1"}
            ranks = fresh("memory.load_and_export", n, env, directory=directory)
            most = {k: max(rank[k] for rank in ranks) for k in ranks[0]}
            most["but rank 0"] = max((rank["export private"] for rank in ranks[1:]), default=None)
            figures[f"{n} process{'es' * (n > 1)}"] = most
            shutil.rmtree(directory.with_name("export"))
    lines = [(name, *(found[column] for column in COLUMNS)) for name, found in figures.items()]
    return figures, table(("", *COLUMNS), lines)


def load_and_export(directory):
    """What a rank of a run does with its weights, as train.py does it -> the figures of all."""
    ranks, directory = Ranks("cpu"), Path(directory)
    flags = TrainFlags(dtype="fp32", attention="sdpa", compile=False, model=str(directory))
    idle = smaps()["Anonymous"] / 1e9
    torch.set_default_dtype(torch.bfloat16)  # of the parameters that build_model makes
    with Peak() as load:
        model = build_model(flags, ranks, directory, "logps")
        dist.barrier()
    with Peak() as writing:
        tensors = whole_tensors(model, torch.bfloat16)
        if ranks.first:
            out, options = directory.with_name("export"), {"shard_bytes": 10**9}
            export(out, model.config, tensors, directory, torch.bfloat16, **options)
        else:
            list(tensors)
        dist.barrier()
    lines = [None] * ranks.world
    own = {"idle": idle} | load.figures("load") | writing.figures("export")
    dist.all_gather_object(lines, own)
    dist.destroy_process_group()
    return lines


# ----------------------------------------------------------------------------- the command

COMMANDS = {"activations": activations, "loading": loading}


def main():
    s = parse(MemoryFlags, __doc__.splitlines()[0])
    if len(s.what) != 1 or s.what[0] not in COMMANDS:
        raise UserError(f"what is measured: {' or '.join(COMMANDS)}")
    measuring.tell(s, *COMMANDS[s.what[0]](s))


if __name__ == "__main__":
    run(main)
