"""Memory and time of loading and exporting a big checkpoint: `python bench/load_memory.py`.

Writes a synthetic checkpoint of a published shape (bf16, shard by shard), then loads it with
1, 2 and 4 processes straight into FSDP2 shards, exports it from them, and removes it. Beside it a
plain read of the files and transformers' from_pretrained. A process's memory is sampled while it
works: *private* is what nobody shares and no file backs, *resident* adds the pages of the mapped
files, which the kernel takes back when it needs them.

    python bench/load_memory.py --shape llama-3-8b --dtype bf16     16 GB of disk, 17 GB of memory

bf16 shards instead of fp32 masters, so that 8B parameters fit a machine of 24 GB. Numbers of
docs/performance.md: --shape llama-3.2-1b.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from bench.checkpoints import published, write_noise  # noqa: E402
from bench.process_memory import smaps  # noqa: E402
from families import hf_name  # noqa: E402
from hub import weights  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
            self.private = max(self.private, now["Anonymous"])
            self.resident = max(self.resident, now["Rss"])

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()
        self.seconds = time.time() - self.start


def load_and_export(directory, dtype):
    """What a rank of a run does with its weights, as train.py does it; under torchrun."""
    from jobs.cli import parse
    from jobs.processes import Ranks, whole_tensors
    from train import TrainFlags, build_model

    ranks = Ranks("cpu")
    words = ["--dtype", "fp32", "--attention", "sdpa", "--no-compile", "--model", str(directory)]
    s = parse(TrainFlags, "", words)
    idle = smaps()["Anonymous"]
    torch.set_default_dtype(DTYPES[dtype])  # of the parameters that build_model makes
    with Peak() as loading:
        model = build_model(s, ranks, directory, "logps")
        dist.barrier()
    check(model, directory)
    out = Path(directory).with_name("export")
    with Peak() as exporting:
        tensors = whole_tensors(model, torch.bfloat16)
        if ranks.first:
            weights.save(out, model.config, tensors, directory, torch.bfloat16, shard_bytes=10**9)
        else:
            list(tensors)
        dist.barrier()
    line = {
        "rank": ranks.rank,
        "idle": idle,
        "load": vars_of(loading),
        "export": vars_of(exporting),
    }
    lines = [None] * ranks.world
    dist.all_gather_object(lines, line)
    if ranks.first:
        print(json.dumps(lines))
    dist.destroy_process_group()


def vars_of(peak):
    return {name: getattr(peak, name) for name in ("private", "resident", "seconds")}


def check(model, directory):
    """The last rows of a sharded parameter are those of the file."""
    stored, (name, parameter) = weights.Weights(directory), list(model.named_parameters())[-2]
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    theirs = stored.read(hf_name(model.config.family, name), parameter.shape)
    assert len(local) == 0 or any(torch.equal(part, local) for part in theirs.split(len(local)))


def load_with_transformers(directory):
    import transformers

    idle = smaps()["Anonymous"]
    with Peak() as loading:
        transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    print(json.dumps([{"idle": idle, "load": vars_of(loading)}]))


def plain_read(directory):
    """Seconds to read the files once, 16 MB at a time."""
    start = time.time()
    for file in sorted(Path(directory).glob("*.safetensors")):
        with open(file, "rb", buffering=0) as f:
            while f.read(2**24):
                pass
    return time.time() - start


def start(directory, dtype, processes):
    """The worker's lines; processes 0: transformers."""
    words = [sys.executable]
    if processes:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words += [str(Path(__file__)), "--worker", str(directory), "--dtype", dtype]
    words += [] if processes else ["--transformers"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(directory, dtype, counts):
    files = sorted(Path(directory).glob("*.safetensors"))
    total, seconds = sum(file.stat().st_size for file in files), plain_read(directory)
    print(f"{gb(total)} GB in {len(files)} files, read plainly in {seconds:.1f} s")
    print("| | idle, GB | load, s | private, GB | resident, GB | export, s | private, GB |")
    print("| --- " * 7 + "|")
    for n in counts:
        lines = start(directory, dtype, n)
        worst = {k: max(line["load"][k] for line in lines) for k in lines[0]["load"]}
        name = f"{n} process" + ("es" if n > 1 else "") if n else "from_pretrained"
        cells = [name, gb(lines[0]["idle"]), f"{worst['seconds']:.1f}"]
        cells += [gb(worst["private"]), gb(worst["resident"])]
        if n:
            exports = [line["export"] for line in lines]
            private = [gb(export["private"]) for export in exports[:2]]
            cells += [f"{exports[0]['seconds']:.1f}", " rank 0, ".join(private)]
        print("| " + " | ".join(cells) + " |", flush=True)
        shutil.rmtree(Path(directory).with_name("export"), ignore_errors=True)


def gb(size):
    return f"{size / 1e9:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.2-1b", help="a folder of bench/shapes")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of the shards in memory")
    parser.add_argument("--processes", default="1,2,4,0", help="0 is transformers")
    parser.add_argument("--tmp", default=None, help="where the checkpoint goes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--transformers", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.transformers:
        return load_with_transformers(args.worker)
    if args.worker:
        return load_and_export(args.worker, args.dtype)
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        directory = Path(folder) / "model"
        write_noise(directory, published(args.shape))
        table(directory, args.dtype, map(int, args.processes.split(",")))


if __name__ == "__main__":
    main()
