"""What all measurements share: the machine, fresh processes, medians, memory, FLOPs, tables.

Model FLOPs are what an objective's log-probabilities need, counted by formula:

    forward of a trie = 2 N T + 4 H C sum_layers(visible pairs) + 2 V D S

    N   weights in the linear layers of all blocks (norms, embedding and head are not in it)
    T   tokens of the trie, S those scored, D width, V vocabulary, H heads of C dimensions
    visible pairs   (query, key) that the attention rule lets see each other: a token sees its own
                    path back to the root, positions + 1 tokens, or a sliding window of them

Training costs three forwards (6 N per token), a reference log-probability one. Recomputation,
padding and scores behind the mask are not useful and not counted: none can raise a utilisation.
"""

import ctypes
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from jobs.cli import UserError
from jobs.files import write_json
from model import Transformer

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DATASHEET = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}  # bf16, dense
SQUARE = {"cuda": 8192, "cpu": 2048}  # side of the big matrices

# ----------------------------------------------------------------------------- the machine


def machine():
    """What was measured on: processor, cores, GPU, versions, commit, and who else was busy."""
    packages = ("torch", "transformers", "trl")
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],  # far above the threads: others used the machine too
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "commit": commit(),
    }


def processor():
    """The processor's name; its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def version(package):
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit():
    """The commit that was measured, marked when the tree differs from it; None outside git."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


# ----------------------------------------------------------------------------- memory


def smaps():
    """{field: bytes} of this process, of /proc/self/smaps_rollup: Rss, Anonymous, …

    Anonymous is what no file backs; Rss counts the mapped pages of files too.
    """
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in map(str.split, lines)}


class Mallinfo2(ctypes.Structure):
    """glibc's malloc.h."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def kept_bytes():
    """Bytes that this process has freed and glibc has not given back; 0 where it cannot tell."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = Mallinfo2
    return libc.mallinfo2().fordblks


def held_gib(device):
    """GiB that this process holds now: of the GPU, else resident and not freed."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 2**30
    return (smaps()["Rss"] - kept_bytes()) / 2**30


# ----------------------------------------------------------------------------- taking figures


def fresh(function, processes=1, env=None, **arguments):
    """Calls a function of bench/, as "training.measure", in a process of its own -> its result.

    processes: of torchrun, where several. What comes and goes is JSON. UserError where it fails.
    """
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words += ["-m", "bench", function, json.dumps(arguments, default=str)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run(words, cwd=ROOT, env=os.environ | (env or {}), **pipes)
    if done.returncode:
        raise UserError(f"{function} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def chosen(text, names):
    """Those of the names that a flag's text, "a; b", lists, in their order; None: all."""
    wanted = [name.strip() for name in text.split(";")] if text else list(names)
    if unknown := set(wanted) - set(names):
        raise UserError(f"{'; '.join(sorted(unknown))}: choose from {'; '.join(names)}")
    return [name for name in names if name in wanted]


def whole_numbers(text):
    """ "1,2,3" -> [1, 2, 3]."""
    return [int(number) for number in text.split(",")]


def in_turn(contenders, repeat):
    """{name: measure()} -> {name: [figures of each run]}, one contender at a time, in turn."""
    runs = {name: [] for name in contenders}
    for turn in range(repeat):
        for name, measure in contenders.items():
            runs[name].append(measure())
            print(f"{turn + 1}/{repeat} {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    return runs


def median(runs):
    """[{key: number or None}] -> {key: median}; None where a run has none."""
    columns = {key: [run[key] for run in runs] for key in runs[0]}
    return {k: None if None in v else statistics.median(v) for k, v in columns.items()}


def synchronize(device):
    """Wait for what a device has still to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------- FLOPs, and rates


class Flops:
    """The formula at the head, for one Config. shapes: (out, in) of one block's linear weights."""

    def __init__(self, config):
        self.config = config
        with torch.device("meta"):
            blocks = Transformer(config).blocks
        self.shapes = [tuple(p.shape) for p in blocks[0].parameters() if p.ndim == 2]
        self.linear = len(blocks) * sum(n * k for n, k in self.shapes)  # N

    def visible(self, trie):
        """(query, key) pairs of one trie that see each other, summed over layers."""
        path = torch.as_tensor(trie.positions) + 1  # tokens from the root to each token
        windows = self.config.windows
        seen = {w: int((path if w is None else path.clamp(max=w)).sum()) for w in set(windows)}
        return sum(seen[w] for w in windows)

    def forward(self, trie):
        """FLOPs of one forward of one trie."""
        c = self.config
        scores = 4 * c.heads * c.head_width * self.visible(trie)
        head = 2 * c.vocab * c.width * len(trie.source)
        return 2 * self.linear * len(trie.tokens) + scores + head

    def of_pairs(self, dataset, pairs, recipe):
        """(training, reference) FLOPs of these pairs of a data.Dataset, each done once."""
        passes = ((3, recipe.paths), (1, recipe.reference_paths))
        return tuple(
            sum(n * self.forward(dataset.trie(i, paths)) for i in pairs) if paths else 0
            for n, paths in passes
        )


def ceilings(shapes, rows, dtype, device="cpu", repeat=5):
    """Matmul rates at the shapes of a model's own linear layers, and at a big square."""
    side = SQUARE[torch.device(device).type]
    square = matmul_rate([(side, side)], side, dtype, device, repeat)
    return {"model": matmul_rate(shapes, rows, dtype, device, repeat), "square": square}


def matmul_rate(shapes, rows, dtype, device="cpu", repeat=5):
    """FLOP/s of the plain matrix products of linear layers, which is a training step's ceiling.

    shapes: (out, in) of the weights; rows: tokens. Each layer is its forward product and the two
    of its backward; the rate is of all of them together.
    """
    products = [p for n, k in shapes for p in ((rows, k, n), (rows, n, k), (n, rows, k))]
    seconds = {p: product_seconds(*p, dtype, device, repeat) for p in set(products)}
    return sum(2 * m * k * n for m, k, n in products) / sum(seconds[p] for p in products)


def product_seconds(m, k, n, dtype, device, repeat):
    """Median seconds of an (m, k) @ (k, n) product, in the fastest layout of its operands."""
    calls, best = 10 if torch.device(device).type == "cuda" else 1, math.inf
    a, b = (torch.randn(shape, dtype=dtype, device=device) for shape in ((m, k), (k, n)))
    layouts = [(x, y) for x in (a, a.mT.contiguous().mT) for y in (b, b.mT.contiguous().mT)]
    for x, y in layouts:
        product = partial(torch.matmul, x, y)
        if median_seconds(product, device, 1, calls) < 2 * best:  # else not worth repeating
            best = min(best, median_seconds(product, device, repeat, calls))
    return best


def median_seconds(function, device="cpu", repeat=5, calls=1):
    """Median seconds of a call over `repeat` timings of `calls` calls each, after a warm-up."""

    def timed():
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    timed()
    return statistics.median(timed() for _ in range(repeat))


def datasheet_rate():
    """bf16 FLOP/s that the GPU's maker states (dense), or None for a device not known here."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rate for part, rate in DATASHEET.items() if part in name), None)


# ----------------------------------------------------------------------------- telling them


def put_between(marks, part, file):
    """Replace what stands between two marks of a page."""
    text = file.read_text(encoding="utf-8")
    head, tail = text.split(marks[0])[0], text.split(marks[1])[1]
    file.write_text(f"{head}{marks[0]}\n{part}\n{marks[1]}{tail}", encoding="utf-8")


def gap(mean, low, high):
    """A difference with its interval as text, bold where the interval leaves out 0."""
    text = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def table(headers, rows):
    """Markdown. Cells: text, or numbers, of which three digits are shown; None is a dash."""
    lines = [list(headers), ["---"] * len(headers)]
    lines += [[cell(value) for value in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value):
    """One value as text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def percent(part, whole):
    """A share as text; None where there is nothing to divide by."""
    return f"{100 * part / whole:.0f}%" if whole else None


def times(part, whole):
    """A ratio as text, "1.25x"; None where one of the two is missing."""
    return f"{part / whole:.2f}x" if part and whole else None


def tell(flags, figures, *tables):
    """Print the tables and write everything to flags.out."""
    content = {"machine": machine(), "settings": asdict(flags), "figures": figures}
    Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(flags.out, content)
    print("\n\n".join(tables))
