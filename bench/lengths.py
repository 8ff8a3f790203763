"""Synthetic preference pairs of a given length mix: lengths as in real data, words without sense.

python bench/lengths.py --model DIR --mix ultrafeedback --pairs 128 --out pairs.jsonl
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hub.template import Template  # noqa: E402
from jobs.cli import flag, parse, require, run  # noqa: E402


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

WORDS = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work number night"""


def words(template):
    """Texts that stay one token each, whatever stands beside them."""
    candidates = [f" {word}" for word in WORDS.split()]
    ids = template.encode(candidates)
    whole = [text for text, tokens in zip(candidates, ids, strict=True) if len(tokens) == 1]
    return whole or list("etaoinshrdlu")  # of a tokenizer with one token per byte


def pairs_of(mix, n, template, spread=0.3, seed=0):
    """n rows {prompt, chosen, rejected}; lengths are normal around the mix's, none below a third.

    spread: standard deviation of a length over its mean; 0 makes all pairs equally long.
    """
    rng, known = random.Random(seed), words(template)
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


@dataclass
class Settings:
    """Flags."""

    model: str | None = flag(None, "directory with the tokenizer")
    mix: str = flag("ultrafeedback", "length mix", tuple(MIXES))
    pairs: int = flag(128, "how many")
    seed: int = flag(0, "of lengths and words")
    out: str = flag("bench/out/pairs.jsonl", "the file")


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    require(s, "model")
    Path(s.out).parent.mkdir(parents=True, exist_ok=True)
    print(write_pairs(s.out, MIXES[s.mix], s.pairs, s.model, seed=s.seed))


if __name__ == "__main__":
    run(main)
