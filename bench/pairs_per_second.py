"""How fast are `dpo`, `ins_dpo` and the averaged objective here, and TRL's plain DPO beside them?

    python bench/pairs_per_second.py --dtype fp32 --pairs 32 --batch 16 --repeat 2

One run, one machine, one contender at a time, in turn: same model, pairs, dtype, batch and length
limit. Pairs per second cover the reference pass and the training steps, not imports, loading or
tokenising. Peak memory is the resident set of the whole process. Prints a Markdown table of
medians and writes it with all figures to --out. Without TRL its rows are left out, and it says so.
"""

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

from cli import UserError, flag, parse, run  # noqa: E402
from smollm2 import smollm2_dir  # noqa: E402
from weights import write_json  # noqa: E402


@dataclass
class Settings:
    """Flags of the comparison."""

    model: str | None = flag(None, "HF directory; default: SmolLM2-135M, built by tests/smollm2.py")
    data: str = flag("../shared/data/hh-harmless-test.jsonl.gz", "preference pairs")
    pairs: int = flag(32, "pairs, each seen once")
    batch: int = flag(16, "pairs per optimizer step")
    micro: int = flag(4, "TRL: pairs per forward")
    max_len: int = flag(1024, "tokens of a path")
    dtype: str = flag("fp32", "compute dtype of all contenders", ("fp32", "bf16"))
    row_tokens: int = flag(2048, "here: tokens per row")
    repeat: int = flag(2, "runs of each contender, in turn")
    out: str = flag("bench/pairs_per_second.json", "where the figures go")


HERE = {
    "dpo": ["--loss", "dpo"],
    "ins_dpo": ["--loss", "ins_dpo"],
    "ins_dpo, turn": ["--loss", "ins_dpo", "--bridge", "turn"],
    "ifsr_dpo": ["--loss", "ifsr_dpo"],
    "averaged, sep": ["--loss", "ins_dpo", "--condition", "averaged"],
    "averaged, turn": ["--loss", "ins_dpo", "--condition", "averaged", "--bridge", "turn"],
}
PEER = {
    "TRL dpo, reference precomputed": ["--precompute"],
    "TRL dpo, reference in each step": ["--no-precompute"],
}


def execute(command):
    """Run a command -> (stdout, peak resident memory in GB)."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=errors, text=True)
        _, status, usage = os.wait4(process.pid, 0)
        for stream in (output, errors):
            stream.seek(0)
        if status != 0:
            raise UserError(f"{' '.join(command)} failed:\n{errors.read()[-2000:]}")
        return output.read(), usage.ru_maxrss / 2**20  # Linux counts KiB


def measure_here(s, model, flags):
    """Pairs per second of train.py, from its own metrics."""
    steps = -(-s.pairs // s.batch)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        command = [sys.executable, "train.py", *flags, "--model", model, "--data", s.data]
        command += ["--limit", s.pairs, "--eval_pairs", 0, "--batch", s.batch, "--steps", steps]
        command += ["--max_len", s.max_len, "--row_tokens", s.row_tokens, "--dtype", s.dtype]
        command += ["--save_every", 10**9, "--out", out]
        _, peak = execute([str(part) for part in command])
        lines = [json.loads(line) for line in (out / "metrics.jsonl").open(encoding="utf-8")]
    reference = sum(line.get("reference_seconds", 0) for line in lines)
    steps = [line for line in lines if "seconds" in line]
    seconds = reference + sum(line["seconds"] for line in steps)
    tokens = sum(line["tokens"] for line in steps)
    return {
        "pairs_per_second": sum(line["pairs"] for line in steps) / seconds,
        "reference_seconds": reference,
        "tokens_per_pair": tokens / s.pairs,
        "peak_gb": peak,
    }


def measure_peer(s, model, flags):
    """Pairs per second of TRL's DPOTrainer, from bench/trl_dpo.py."""
    command = [sys.executable, "bench/trl_dpo.py", *flags, "--model", model, "--data", s.data]
    command += ["--pairs", s.pairs, "--batch", s.batch, "--micro", s.micro]
    command += ["--max_len", s.max_len, "--dtype", s.dtype]
    output, peak = execute([str(part) for part in command])
    figures = json.loads(output.strip().splitlines()[-1])
    return {
        "pairs_per_second": figures["pairs_per_second"],
        "reference_seconds": figures["reference_seconds"],
        "tokens_per_pair": None,
        "peak_gb": peak,
    }


def table(figures):
    """Markdown, medians over the repeats, and the ratio to the fastest run of the peer."""
    median = {
        name: {k: statistics.median(r[k] for r in runs) if runs[0][k] is not None else None
               for k in runs[0]}
        for name, runs in figures.items()
    }  # fmt: skip
    peers = [m["pairs_per_second"] for name, m in median.items() if name in PEER]
    lines = [
        "| contender | pairs/s | against TRL's best | reference pass, s | tokens/pair | peak GB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, m in median.items():
        ratio = f"{m['pairs_per_second'] / max(peers):.2f}x" if peers else "-"
        tokens = f"{m['tokens_per_pair']:.0f}" if m["tokens_per_pair"] else "-"
        lines.append(
            f"| {name} | {m['pairs_per_second']:.3f} | {ratio} | {m['reference_seconds']:.1f} "
            f"| {tokens} | {m['peak_gb']:.2f} |"
        )
    return "\n".join(lines)


def commit():
    """The commit that was measured, marked when the tree differs from it."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    model = s.model or str(smollm2_dir(build=True))
    contenders = {name: (measure_here, flags) for name, flags in HERE.items()}
    if importlib.util.find_spec("trl"):
        contenders |= {name: (measure_peer, flags) for name, flags in PEER.items()}
    else:
        print("TRL is not installed (requirements-dev.txt): its rows are left out")
    figures = {name: [] for name in contenders}
    for turn in range(s.repeat):
        for name, (measure, flags) in contenders.items():
            figures[name].append(measure(s, model, flags))
            print(f"{turn + 1}/{s.repeat} {name}: {figures[name][-1]}", file=sys.stderr, flush=True)
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    settings = asdict(s) | {"model": Path(model).name, "data": Path(s.data).name}
    content = {"machine": machine, "commit": commit(), "settings": settings, "runs": figures}
    write_json(s.out, content)
    print(table(figures))


if __name__ == "__main__":
    run(main)
