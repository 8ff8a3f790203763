"""Cleans preference pairs and holds some out, once for all runs of an experiment.

    python -m recipes.prepare --data HUB_ID --model DIR --dedup --eval_pairs 1000 --out DIR

leaves DIR/train.jsonl and DIR/validation.jsonl: rows of prompt, chosen, rejected. train.py does the
same by itself for one run; here the validation pairs are a file, so that answers to their prompts
can be compared, and a guard model judges once.

    python -m recipes.prepare --data HUB_ID:test --model DIR --prompts 2000 --out DIR

leaves DIR/test.jsonl: what is asked, each prompt once, with the first of its pairs.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from families.llama_guard import Guard
from hub.template import open_template
from hub.weights import resolve
from jobs.cli import CheckpointFlags, DataFlags, flag, parse, require, run
from jobs.files import out_file, replace, to_line
from kernels import chains
from pairs.cleaning import CleaningFlags, clean
from pairs.read import Drops, hold_out, read_pairs


@dataclass(frozen=True)
class PrepareFlags(CleaningFlags, DataFlags, CheckpointFlags):
    model: str | None = flag(None, "its tokenizer counts the tokens of answers")
    eval_pairs: int = flag(1000, "pairs held out for validation")
    prompts: int | None = flag(None, "instead: the first N prompts, for test.jsonl", least=1)
    max_prompt: int | None = flag(None, "tokens; of --prompts longer ones are left out", least=1)
    seed: int = flag(0, "of the hold-out")
    device: str = flag("auto", "where the guard runs", ("auto", "cpu", "cuda"))
    out: str | None = flag(None, "directory of the files")


def main():
    s = parse(PrepareFlags, __doc__.splitlines()[0])
    require(s, "model", "data", "out")
    drops, cleaned, rules = Drops(), Drops(), CleaningFlags.of(s)
    pairs = read_pairs(s.data, drops, s.limit, bad_rows=s.bad_rows, revision=s.data_revision)
    print(f"read {len(pairs)} pairs from {s.data}; dropped: {drops}")
    guard = Guard(s.guard, s.device, chains.attend) if s.guard else None
    template = open_template(resolve(s.model))
    pairs = clean(pairs, rules, template, cleaned, guard)
    print(f"cleaned: {len(pairs)} pairs; dropped: {cleaned}")
    if s.prompts:
        parts = {"test": first_pairs(pairs, template, s.prompts, s.max_prompt)}
    else:
        train, validation = hold_out(pairs, s.eval_pairs, s.seed)
        parts = {"train": train, "validation": validation}
    for name, part in parts.items():
        rows = ({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in part)
        with out_file(Path(s.out) / f"{name}.jsonl") as file:
            replace(file, map(to_line, rows))
        print(f"{name}: {len(part)} pairs, {file}")


def first_pairs(pairs, template, n, max_prompt=None):
    """The first pair of each of the first n prompts, of those with at most max_prompt tokens."""
    first, drops = {}, Drops()
    for pair in pairs:
        if len(first) == n:
            break
        (text,) = template.encode([template.render(pair.prompt, generation=True)])
        if max_prompt and len(text) > max_prompt:
            drops.add(f"prompt over {max_prompt} tokens", pair.where)
        else:
            first.setdefault(json.dumps(pair.prompt), pair)
    print(f"{len(first)} prompts; dropped: {drops}")
    return list(first.values())


if __name__ == "__main__":
    run(main)
