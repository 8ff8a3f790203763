"""How a measurement is taken and told: fresh processes, medians, the machine and its matmul rate.

Every file of bench/ writes one JSON file (`tell`): machine with versions and commit, settings, the
figures of every single run; and prints Markdown tables of their medians.
"""

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

from jobs.cli import UserError  # noqa: E402
from jobs.files import write_json  # noqa: E402

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


def datasheet_rate():
    """bf16 FLOP/s that the GPU's maker states (dense), or None for a device not known here."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rate for part, rate in DATASHEET.items() if part in name), None)


# ----------------------------------------------------------------------------- taking figures


def execute(command):
    """Run a command in the project's folder -> (stdout, peak resident memory in GiB)."""
    command = [str(part) for part in command]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=errors, text=True)
        _, status, usage = os.wait4(process.pid, 0)
        for stream in (output, errors):
            stream.seek(0)
        if status != 0:
            raise UserError(f"{' '.join(command)} failed:\n{errors.read()[-2000:]}")
        return output.read(), usage.ru_maxrss / 2**20  # Linux counts KiB


def last_json(output):
    """The JSON object that a worker printed as its last line."""
    return json.loads(output.strip().splitlines()[-1])


def chosen(text, names):
    """Those of the names that a flag's text, "a; b", lists, in their order; None: all."""
    wanted = [name.strip() for name in text.split(";")] if text else list(names)
    if unknown := set(wanted) - set(names):
        raise UserError(f"{'; '.join(sorted(unknown))}: choose from {'; '.join(names)}")
    return [name for name in names if name in wanted]


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


def synchronize(device):
    """Wait for what a device has still to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


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


def ceilings(shapes, rows, dtype, device="cpu", repeat=5):
    """Matmul rates at the shapes of a model's own linear layers, and at a big square."""
    side = SQUARE[torch.device(device).type]
    square = matmul_rate([(side, side)], side, dtype, device, repeat)
    return {"model": matmul_rate(shapes, rows, dtype, device, repeat), "square": square}


# ----------------------------------------------------------------------------- telling them


def table(headers, rows):
    """Markdown. Cells: text, or numbers, of which three digits are shown; None is a dash."""
    lines = [list(headers), ["---"] * len(headers)]
    lines += [[cell(value) for value in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value):
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def percent(part, whole):
    """A share as text; None where there is nothing to divide by."""
    return f"{100 * part / whole:.0f}%" if whole else None


def tell(settings, figures, *tables):
    """Print the tables and write everything to settings.out."""
    content = {"machine": machine(), "settings": asdict(settings), "figures": figures}
    Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(settings.out, content)
    print("\n\n".join(tables))
