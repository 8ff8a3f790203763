"""What is measured on: models of noise in published shapes, synthetic pairs, and flags for both.

A noise checkpoint is a Hugging Face directory in any shape, without a download. Its tokenizer is
the tests' (one token per byte); its weights are bf16, normal with deviation 0.02, norms are 1:
outputs are those of a model before training, times and memory those of any other.

Synthetic pairs have the lengths of real data and words without sense.
"""

import json
import random
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from smollm2 import smollm2_dir

from bench.measuring import DTYPES, ROOT
from hub.template import Template
from jobs.cli import UserError, flag
from jobs.files import write_json
from model import Transformer, config_of, export

# ----------------------------------------------------------------------------- models of noise

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


def write_noise(directory, raw, shard_bytes=10**9):
    """A HF directory of this config.json (a dict); one shard at a time is in memory."""
    with tempfile.TemporaryDirectory() as source:
        tiny.write_tokenizer(Path(source))
        write_json(Path(source) / "config.json", raw)
        config = config_of(raw)
        options = {"dtype": torch.bfloat16, "shard_bytes": shard_bytes}
        export(directory, config, noise(config), source, **options)
    return Path(directory)


def noise(config, seed=0):
    """(our name, bf16 tensor) of every parameter of a model of this Config."""
    with torch.device("meta"):
        model = Transformer(config)
    size = 2**22  # numbers drawn; every part of a tensor is a slice of them that starts elsewhere
    drawn = (0.02 * torch.randn(2 * size, generator=torch.Generator().manual_seed(seed))).bfloat16()
    start = 0
    for name, parameter in model.named_parameters():
        tensor = torch.ones(parameter.shape, dtype=torch.bfloat16)
        for part in tensor.view(-1).split(size) if parameter.ndim > 1 else ():
            start = (start + 1_368_787) % size
            part.copy_(drawn[start : start + len(part)])
        yield name, tensor


# ----------------------------------------------------------------------------- synthetic pairs


@dataclass(frozen=True)
class Mix:
    """Mean tokens of a rendered prompt and of the answers, end token included."""

    prompt: int
    chosen: int
    rejected: int


MIXES = {
    "ultrafeedback": Mix(180, 280, 280),
    "hh": Mix(120, 40, 50),
    "long_prompt": Mix(1500, 200, 200),
}
TRIE = 1350  # tokens of ins_dpo's trie of an UltraFeedback-like pair, a little more than the mean

WORDS = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work number night"""


def filling(length):
    """(pairs of a row, their Mix): UltraFeedback-like pairs whose tries fill `length` tokens."""
    pairs = max(1, length // TRIE)
    room = length // pairs - 16  # separators and end tokens
    answer = room * 280 // (180 + 4 * 280)
    return pairs, Mix(room - 4 * answer, answer, answer)


def words(template):
    """Texts that stay one token each, whatever stands beside them."""
    candidates = [f" {word}" for word in WORDS.split()]
    ids = template.encode(candidates)
    whole = [text for text, tokens in zip(candidates, ids, strict=True) if len(tokens) == 1]
    return whole or list("etaoinshrdlu")  # of a tokenizer with one token per byte


def pairs_of(mix, n, template, spread=0.3):
    """n rows {prompt, chosen, rejected}; lengths are normal around the mix's, none below a third.

    spread: standard deviation of a length over its mean; 0 makes all pairs equally long.
    """
    rng, known = random.Random(0), words(template)
    empty = template.render([{"role": "user", "content": known[0]}], generation=True)
    around = len(template.encode([empty])[0]) - 1  # the template's own tokens
    fixed = {"prompt": around, "chosen": len(template.end_ids), "rejected": len(template.end_ids)}

    def text(part):
        mean = getattr(mix, part)
        length = round(max(mean / 3, rng.gauss(mean, spread * mean)))
        return "".join(rng.choice(known) for _ in range(max(1, length - fixed[part])))

    return [{part: text(part) for part in fixed} for _ in range(n)]


def write_pairs(file, mix, n, model, **options):
    """The same as a jsonl file for the tokenizer of a model directory; returns its name."""
    rows = pairs_of(mix, n, Template(model), **options)
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


# ----------------------------------------------------------------------------- flags


@dataclass(frozen=True)
class WorkloadFlags:
    """A model, pairs, their limits and the device; commands inherit these."""

    model: str | None = flag(None, "HF directory; default: SmolLM2-135M of tests/tools/smollm2.py")
    shape: str | None = flag(None, "instead: noise in a shape of bench/shapes, or small")
    data: str = flag("../shared/data/hh-harmless-test.jsonl.gz", "preference pairs")
    mix: str | None = flag(None, "instead: synthetic pairs of this length mix", tuple(MIXES))
    pairs: int = flag(32, "pairs of the dataset")
    max_len: int = flag(1024, "tokens of a path")
    dtype: str = flag("fp32", "of the computation", tuple(DTYPES))
    device: str = flag("cpu", "where", ("cpu", "cuda"))

    @contextmanager
    def ready(self):
        """(model directory, pairs file), written where --shape or --mix ask for noise."""
        with tempfile.TemporaryDirectory() as scratch:
            model, data = self.model, self.data
            if model is None and self.shape:
                model = write_noise(Path(scratch) / "model", published(self.shape))
            model = model or smollm2_dir(build=True)
            if self.mix:
                data = write_pairs(Path(scratch) / "p.jsonl", MIXES[self.mix], self.pairs, model)
            yield str(model), str(data)

    def train_flags(self, model, data):
        """What train.py is told of all this."""
        limits = {"limit": self.pairs, "max_len": self.max_len}
        # noise reads text byte by byte: two letters make its turn as long as a real tokenizer's
        words = {"instruction": "go"} if self.shape else {}
        given = {"model": model, "data": data, "dtype": self.dtype, "device": self.device}
        return limits | words | given
