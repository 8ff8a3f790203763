"""Same numbers however split: `python tests/tools/splits.py` measures for docs/guarantees.md.

50 steps of the embedded model in fp32, split in every way below, beside one process with long rows:
the largest relative deviation of the loss of a step, and of a weight tensor at the end (norm of the
difference over norm), read from the fp32 checkpoints.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from runs import ROOT, argv, losses, start_words  # noqa: E402

FLAGS = {"model": ROOT / "assets" / "start", "data": ROOT / "assets" / "world" / "pairs.jsonl",
         "loss": "ins_dpo", "batch": 8, "limit": 200, "eval_pairs": 4, "eval_every": 50,
         "save_every": 25, "max_len": 256, "lr": 3e-4, "row_tokens": 2048}  # fmt: skip
SPLITS = {  # name: (processes, flags); the processes of a tuple change at a resume half-way
    "2 x 1 processes, two launchers that meet as nodes do": ("2 x 1", {}),
    "1 process, rows of 256 (several a step, uneven)": (1, {"row_tokens": 256}),
    "1 process, activation checkpointing": (1, {"checkpoint_activations": True}),
    "2 processes": (2, {}),
    "2 processes, rows of 256": (2, {"row_tokens": 256}),
    "4 processes, rows of 128": (4, {"row_tokens": 128}),
    "4 processes, activation checkpointing": (4, {"checkpoint_activations": True}),
    "4 processes, --shard_group 2": (4, {"row_tokens": 256, "shard_group": 2}),
    "1, resumed by 2": ((1, 2), {}),
    "2, resumed by 4": ((2, 4), {"row_tokens": 256}),
    "4, resumed by 1": ((4, 1), {}),
}


def train(out, processes, flags):
    """One run; where its processes change, the second half is forgotten and done again."""
    first, *then = processes if isinstance(processes, tuple) else (processes,)
    launch(first, flags | {"out": out})
    if then:
        for left in ("final", "best", "checkpoints/step-50"):
            subprocess.run(["rm", "-rf", str(Path(out) / left)], check=True)
        launch(then[0], flags | {"out": out, "resume": True})


def launch(processes, flags):
    nodes = 1
    if isinstance(processes, str):  # "2 x 1": nodes x processes of each
        nodes, processes = map(int, processes.split(" x "))
    words = start_words(processes, nodes) + argv(flags)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launchers = [subprocess.Popen(words, **pipes) for _ in range(nodes)]
    try:
        for launcher in launchers:
            _, err = launcher.communicate(timeout=600)
            assert launcher.returncode == 0, err[-2000:]
    finally:
        for launcher in launchers:
            launcher.kill()  # where another has failed


def weights(out, step):
    """{name: fp32 tensor} of a checkpoint, joined over its files."""
    files = Path(out, "checkpoints", f"step-{step}").glob("rank-*.safetensors")
    parts = [load_file(file) for file in sorted(files, key=lambda f: int(f.stem.split("-")[1]))]
    return {n: torch.cat([p[n] for p in parts]) for n in parts[0] if n.startswith("weight/")}


def deviation(out, base, step):
    """(of the loss of any step, of any weight tensor at the end), both relative."""
    a, b = losses(base), losses(out)
    assert len(a) == len(b) == step
    x, y = weights(base, step), weights(out, step)
    of_weights = max(((x[n] - y[n]).norm() / x[n].norm()).item() for n in x)
    return ((a - b).abs() / a.abs()).max().item(), of_weights


def main(steps=50):
    flags = FLAGS | {"steps": steps}
    print("| split | loss of any step | any weight tensor |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory:
        train(base := f"{directory}/base", 1, flags)
        for n, (name, (processes, change)) in enumerate(SPLITS.items()):
            train(out := f"{directory}/{n}", processes, flags | change)
            cells = " | ".join(f"{x:.1e}" for x in deviation(out, base, steps))
            print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
