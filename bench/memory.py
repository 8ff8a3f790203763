"""Memory of a process: what a row's activations take, and what loading and exporting take.

    python -m bench.memory activations      evals/plan.py's bytes per row against what is measured
    python -m bench.memory loading          bf16 noise in the shape of Llama-3.2-1B: 2.5 GB of disk
    python -m bench.memory loading --shape llama-3-8b      16 GB of disk, 17 GB of memory

Activations: two layers of published shapes run one row forward in fp32 on the CPU, with and without
recomputed blocks; the growth of the process's private memory, with the graph alive, is theirs.

Loading: a checkpoint of noise is written shard by shard, loaded with 1, 2 and 4 processes straight
into FSDP2 shards, exported from them, and removed. A process's memory is sampled while it works:
*private* is what nobody shares and no file backs, *resident* adds the pages of the mapped files,
which the kernel takes back when it needs them. bf16 shards instead of fp32 masters, so that 8B
parameters fit 24 GB.

Figures are in GB and seconds, the largest of all processes.
"""

import dataclasses
import gc
import json
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from bench import measuring
from bench.inputs import published, write_noise
from bench.measuring import ROOT, smaps, table, whole_numbers
from data import build_row, lay_out
from evals.plan import measure as planned
from jobs.cli import UserError, arguments, flag, parse, run
from jobs.processes import Ranks, whole_tensors
from kernels import chains
from model import Transformer, export, read_config
from train import TrainFlags, build_model

SHAPES = ("llama-3.2-1b", "pythia-2.8b", "gemma-2-9b")


@dataclass(frozen=True)
class MemoryFlags:
    """Flags."""

    what: list = arguments("activations, or loading")
    tokens: int = flag(512, "activations: of a row")
    shape: str = flag("llama-3.2-1b", "loading: a folder of bench/shapes, or small")
    processes: str = flag("1,2,4", "loading: how many load")
    tmp: str | None = flag(None, "loading: where the checkpoint goes")
    model: str | None = flag(None, "internal: the checkpoint that this process loads")
    out: str = flag("bench/out/memory.json", "where the figures go")


# ----------------------------------------------------------------------------- activations


def activations(s):
    """Measures every shape, each way in a process of its own -> (figures, table)."""
    # every large tensor is its own mapping, so that what is freed is seen as free
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    figures, lines = {}, []
    for shape in SHAPES:
        sizes = planned(two_layers(shape), s.tokens, torch.float32)
        forward = sizes.recomputed - sizes.block  # the one block exists in backward only
        line = [shape]
        for kind, plan in (("kept", sizes.activations), ("recomputed", forward)):
            words = [kind, f"--shape={shape}", f"--tokens={s.tokens}"]
            grown = measuring.worker([*measuring.python("memory"), *words], **env)
            figures[f"{shape} {kind}"] = {"plan": plan, "measured": grown}
            line += [plan / 1e9, grown / 1e9]
        lines.append(line)
    headers = ("two layers of", "kept: plan", "measured", "recomputed: plan", "measured")
    return figures, table(headers, lines)


def two_layers(shape):
    """The Config of a published shape with two layers and a small vocabulary, to fit a laptop."""
    _, config = read_config(ROOT / "bench" / "shapes" / shape)
    return dataclasses.replace(config, n_layers=2, windows=config.windows[:2], vocab=1024)


def grown(s, recompute):
    """Bytes that a row's forward leaves behind while its graph is alive."""
    config = two_layers(s.shape)
    with torch.device("meta"):
        model = Transformer(config)
        model.attend = chains.attend
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    for block in model.blocks:
        block.recompute = recompute
    ids = torch.randint(0, config.vocab, (s.tokens,), dtype=torch.int32).numpy()
    row = build_row([lay_out([([ids[:10], ids[10:]], s.tokens - 10)])], [0], 1)
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
            command = [*measuring.python("memory", n), "rank", f"--model={directory}"]
            ranks = measuring.worker(command, OMP_NUM_THREADS="1")
            others = [rank["export private"] for rank in ranks[1:]]
            most = {k: max(rank[k] for rank in ranks) for k in ranks[0]}
            figures[f"{n} processes"] = most | {"but rank 0": max(others, default=None)}
            shutil.rmtree(directory.with_name("export"))
    lines = [(name, *(found[column] for column in COLUMNS)) for name, found in figures.items()]
    return figures, table(("", *COLUMNS), lines)


def load_and_export(s):
    """What a rank of a run does with its weights, as train.py does it -> the figures of all."""
    ranks = Ranks("cpu")
    words = ["--dtype", "fp32", "--attention", "sdpa", "--no-compile", "--model", s.model]
    flags = parse(TrainFlags, "", words)
    idle = smaps()["Anonymous"] / 1e9
    torch.set_default_dtype(torch.bfloat16)  # of the parameters that build_model makes
    with Peak() as load:
        model = build_model(flags, ranks, Path(s.model), "logps")
        dist.barrier()
    with Peak() as writing:
        tensors = whole_tensors(model, torch.bfloat16)
        if ranks.first:
            out, options = Path(s.model).with_name("export"), {"shard_bytes": 10**9}
            export(out, model.config, tensors, s.model, torch.bfloat16, **options)
        else:
            list(tensors)
        dist.barrier()
    lines = [None] * ranks.world
    own = {"idle": idle} | load.figures("load") | writing.figures("export")
    dist.all_gather_object(lines, own)
    dist.destroy_process_group()
    return lines if ranks.first else None


# ----------------------------------------------------------------------------- the command

COMMANDS = {"activations": activations, "loading": loading}
WORKERS = {  # internal: what the processes do that these start
    "kept": lambda s: grown(s, recompute=False),
    "recomputed": lambda s: grown(s, recompute=True),
    "rank": load_and_export,
}


def main():
    s = parse(MemoryFlags, __doc__.splitlines()[0])
    what = s.what[0] if len(s.what) == 1 else None
    if what in WORKERS:
        if (found := WORKERS[what](s)) is not None:
            print(json.dumps(found))
    elif what in COMMANDS:
        measuring.tell(s, *COMMANDS[what](s))
    else:
        raise UserError(f"what is measured: {' or '.join(COMMANDS)}")


if __name__ == "__main__":
    run(main)
