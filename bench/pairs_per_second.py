"""How fast are `dpo`, `ins_dpo` and the averaged objective here, and TRL's plain DPO beside them?

    python bench/pairs_per_second.py --dtype fp32 --pairs 32 --batch 16 --repeat 3
    python bench/pairs_per_second.py --device cuda --dtype bf16 --shape llama-3.2-1b \
        --mix ultrafeedback --pairs 128 --batch 32 --micro 8 --only "ins_dpo; TRL dpo, bf16 weights"

One run, one machine, one contender at a time, in turn: same model, pairs, dtype, batch and length
limit, each in a process of its own. A pair costs its share of the reference pass and of the steps;
imports, loading, tokenising and the first `--warmup` steps are not counted. Peak memory is that of
the GPU or the resident set. Without TRL its rows are left out, and it says so.

Utilisation is the model FLOPs of a pair (bench/flops.py: 6 N per trained token, 2 N per reference
token, visible scores, scored tokens' head) per second over the rate of plain matrix products of
the model's own shapes, measured between the contenders. TRL's is held against the FLOPs of `dpo`
here, that is, of what plain DPO needs; that of `--context_grad false` against the exact gradient's.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import measuring, training  # noqa: E402
from bench.flops import Flops  # noqa: E402
from bench.measuring import DTYPES, median, percent, table  # noqa: E402
from bench.workload import Workload  # noqa: E402
from hub.weights import read_config  # noqa: E402
from jobs.cli import flag, parse, run  # noqa: E402


@dataclass
class Settings(Workload):
    """Flags of the comparison."""

    only: str | None = flag(None, 'contenders, as "dpo; ins_dpo"; default: all')
    batch: int = flag(16, "pairs per optimizer step")
    micro: int = flag(4, "TRL: pairs per forward")
    warmup: int = flag(1, "steps that are not counted")
    row_tokens: int | None = flag(None, "here: tokens per row; default: train.py's")
    repeat: int = flag(3, "runs of each contender, in turn")
    out: str = flag("bench/out/pairs_per_second.json", "where the figures go")


PEER = {
    "TRL dpo, reference precomputed": ["--precompute"],
    "TRL dpo, compiled": ["--precompute", "--compile"],
    "TRL dpo, reference in each step": ["--no-precompute"],
    "TRL dpo, its defaults": ["--no-precompute", "--no-tuned"],
    "TRL dpo, bf16 weights": ["--precompute", "--dtype", "bf16_pure"],
}


def steps(s):
    return max(1, s.pairs // s.batch)


def measure_here(s, model, data, flags):
    """Figures of bench/training.py with these flags of train.py."""
    flags = flags | s.train_flags(model, data) | {"batch": s.batch, "steps": steps(s)}
    found = training.in_fresh_process(flags | {"warmup": s.warmup, "row_tokens": s.row_tokens})
    kept = ("pairs_per_second", "reference_seconds_per_pair", "tokens_per_pair")
    return {name: found[name] for name in (*kept, "flops_per_pair", "peak_gib")}


def measure_peer(s, model, data, flags):
    """Pairs per second of TRL's DPOTrainer, from bench/trl_dpo.py."""
    command = [sys.executable, measuring.ROOT / "bench" / "trl_dpo.py", "--dtype", s.dtype, *flags]
    command += ["--model", model, "--data", data, "--pairs", s.pairs, "--batch", s.batch]
    command += ["--micro", s.micro, "--max_len", s.max_len, "--device", s.device]
    command += ["--steps", steps(s), "--warmup", s.warmup]
    found = measuring.last_json(measuring.execute(command)[0])
    kept = ("pairs_per_second", "reference_seconds_per_pair", "peak_gib")
    return {k: found[k] for k in kept} | {"tokens_per_pair": None, "flops_per_pair": None}


def contenders(s, model, data):
    """{name: measure()} of what is asked for and installed."""
    here = training.CONTENDERS
    peers = PEER if s.dtype == "bf16" else {n: f for n, f in PEER.items() if "bf16" not in n}
    names = measuring.chosen(s.only, [*here, *peers])
    if not importlib.util.find_spec("trl") and set(names) & set(peers):
        print("TRL is not installed (requirements-dev.txt): its rows are left out")
        names = [name for name in names if name in here]

    def measured(name):
        if name in here:
            return lambda: measure_here(s, model, data, here[name])
        return lambda: measure_peer(s, model, data, peers[name])

    return {name: measured(name) for name in names}


HEADERS = ("contender", "pairs/s", "against TRL's best", "reference pass, ms/pair", "tokens/pair")
HEADERS += ("GFLOP/pair", "of matmul rate", "peak GiB")


def rows(runs):
    """Lines of the table: medians, the ratio to the fastest run of the peer, utilisation."""
    middle = {name: median(figures) for name, figures in runs.items()}
    rates = middle.pop("matmul rate")["model"]
    best = max((m["pairs_per_second"] for name, m in middle.items() if name in PEER), default=None)
    needed = middle["dpo"]["flops_per_pair"] if "dpo" in middle else None
    for name, m in middle.items():
        speed, flops = m["pairs_per_second"], m["flops_per_pair"] or needed
        ratio = f"{speed / best:.2f}x" if best else None
        used = percent(flops * speed, rates) if flops else None
        reference, per_pair = 1e3 * m["reference_seconds_per_pair"], m["flops_per_pair"]
        gflops = per_pair / 1e9 if per_pair else None
        yield name, speed, ratio, reference, m["tokens_per_pair"], gflops, used, m["peak_gib"]


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    with s.ready() as (model, data):
        shapes = Flops(read_config(model)[1]).shapes
        size = s.row_tokens or (8192 if s.device == "cuda" else 2048)
        measures = {
            "matmul rate": lambda: measuring.ceilings(shapes, size, DTYPES[s.dtype], s.device)
        }
        runs = measuring.in_turn(measures | contenders(s, model, data), s.repeat)
    rate = median(runs["matmul rate"])
    headers = ("matrix products", "model's shapes, TFLOP/s", f"square, TFLOP/s ({s.dtype})")
    ceiling = table(headers, [("", rate["model"] / 1e12, rate["square"] / 1e12)])
    measuring.tell(s, runs, table(HEADERS, rows(runs)), ceiling)


if __name__ == "__main__":
    run(main)
