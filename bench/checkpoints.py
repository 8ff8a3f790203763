"""Checkpoints of noise in any shape: Hugging Face directories to measure on without a download.

    python bench/checkpoints.py --shape llama-3-8b --layers 4 --out DIR

The tokenizer is the tests' (one token per byte); the weights are bf16, normal with deviation 0.02,
norms are 1: outputs are those of a model before training, times and memory those of any other.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
import torch  # noqa: E402

from families import Config  # noqa: E402
from hub import weights  # noqa: E402
from jobs.cli import UserError, flag, parse, require, run  # noqa: E402
from jobs.files import write_json  # noqa: E402
from model import Transformer  # noqa: E402

# Llama-3-8B in small: the same share of the FLOPs in attention, feed-forward and head.
SMALL = tiny.LLAMA | {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 131072,
}


def published(name):
    """config.json of a folder of bench/shapes as a dict; "small" is SMALL."""
    if name == "small":
        return SMALL
    file = ROOT / "bench" / "shapes" / name / "config.json"
    if not file.exists():
        known = ", ".join(sorted(path.name for path in file.parents[1].iterdir()))
        raise UserError(f"--shape {name}: unknown; choose from small, {known}")
    return json.loads(file.read_text(encoding="utf-8"))


def noise(raw, seed=0):
    """(our name, bf16 tensor) of every parameter of a model of this config.json."""
    with torch.device("meta"):
        model = Transformer(Config.from_hf(raw))
    size = 2**22  # numbers drawn; every part of a tensor is a slice of them that starts elsewhere
    drawn = (0.02 * torch.randn(2 * size, generator=torch.Generator().manual_seed(seed))).bfloat16()
    start = 0
    for name, parameter in model.named_parameters():
        tensor = torch.ones(parameter.shape, dtype=torch.bfloat16)
        for part in tensor.view(-1).split(size) if parameter.ndim > 1 else ():
            start = (start + 1_368_787) % size
            part.copy_(drawn[start : start + len(part)])
        yield name, tensor


def write_noise(directory, raw, shard_bytes=10**9):
    """A HF directory of this config.json (a dict); one shard at a time is in memory."""
    with tempfile.TemporaryDirectory() as source:
        tiny.write_tokenizer(Path(source))
        write_json(Path(source) / "config.json", raw)
        config = Config.from_hf(raw)
        weights.save(directory, config, noise(raw), source, torch.bfloat16, shard_bytes=shard_bytes)
    return Path(directory)


def resized(raw, layers=None, width=None, vocab=None):
    """The same shape with other numbers of layers, of width (all of it in proportion) or words."""
    raw = dict(raw)
    if layers:
        raw["num_hidden_layers"] = layers
    if width:
        share = width / raw["hidden_size"]
        for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
            raw[name] = max(1, round(raw[name] * share))
        raw["num_key_value_heads"] = max(1, round(raw["num_key_value_heads"] * share))
    if vocab:
        raw["vocab_size"] = vocab
    return raw


@dataclass
class Settings:
    """Flags."""

    shape: str = flag("small", "a folder of bench/shapes, or small")
    layers: int | None = flag(None, "how many; default: the shape's")
    width: int | None = flag(None, "of the residual stream; heads and feed-forward follow")
    vocab: int | None = flag(None, "vocabulary; default: the shape's")
    out: str | None = flag(None, "directory")


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    require(s, "out")
    raw = resized(published(s.shape), s.layers, s.width, s.vocab)
    print(write_noise(s.out, raw))


if __name__ == "__main__":
    run(main)
