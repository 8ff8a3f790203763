"""How full rows are: the share of a step's tokens that are not padding, before and after.

    python -m bench.row_fill                six mixes, 8 and 16 GPUs
    python -m bench.row_fill --data FILE    the pairs of a file in place of one mix, by its bytes

Nothing is trained: tries are counted and packed as train.py does on CUDA, for FlexAttention.
*limit*: every row padded to --row_tokens; *alike*: to the step's own length (kernels/flex.py).
Lengths: of how many rows in the run, each a compilation.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import tiny

from bench import measuring
from bench.inputs import MIXES, pairs_of
from bench.measuring import table, whole_numbers
from data import Dataset, Limits, Plan, Template, pack, read_pairs
from jobs.cli import flag, parse, run
from jobs.files import to_line
from kernels.flex import pack_alike
from losses import recipe
from pairs.read import Drops


@dataclass(frozen=True)
class FillFlags:
    """Flags."""

    data: str | None = flag(None, "preference pairs, in place of the synthetic mixes")
    losses: str = flag("dpo,ins_dpo", "objectives")
    gpus: str = flag("8,16", "how many")
    pairs: int = flag(2560, "pairs of a mix")
    batch: int = flag(128, "pairs per step")
    row_tokens: int = flag(8192, "longest row")
    out: str = flag("bench/out/row_fill.json", "where the figures go")


def sizes_of(s, loss, mix, folder):
    """Tokens of the trie of every pair."""
    template, rule = Template(folder), recipe(loss)
    file = s.data or Path(folder) / "pairs.jsonl"
    if s.data is None:
        file.write_bytes(b"".join(map(to_line, pairs_of(MIXES[mix], s.pairs, template))))
    pairs = read_pairs(str(file), Drops(), s.pairs)
    data = Dataset(pairs, template, rule, Limits(s.row_tokens // 2, 0.4), "go")
    return [data.size(i, rule.paths) for i in range(len(data))]


def fill(s, sizes, gpus):
    """Figures of one epoch."""
    plan, tokens, limit, alike, lengths = Plan(len(sizes), s.batch, 0, 1.0), 0, 0, 0, set()
    for step in range(plan.steps):
        own = [sizes[i] for i in plan.pairs(step)]
        rows, length = pack_alike(own, s.row_tokens, gpus)
        tokens, alike = tokens + sum(own), alike + len(rows) * length
        limit += len(pack(own, s.row_tokens, gpus)) * s.row_tokens
        lengths.add(length)
    return {"limit": tokens / limit, "alike": tokens / alike, "lengths": len(lengths)}


def main():
    s = parse(FillFlags, __doc__.splitlines()[0])
    figures, lines = {}, []
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_tokenizer(Path(folder))
        for mix in [Path(s.data).name] if s.data else MIXES:
            for loss in s.losses.split(","):
                sizes = sizes_of(s, loss, mix, folder)
                for gpus in whole_numbers(s.gpus):
                    found = figures[f"{mix}, {loss}, {gpus}"] = fill(s, sizes, gpus)
                    lines.append((f"{mix}, {loss}", gpus, *found.values()))
    measuring.tell(s, figures, table(("", "GPUs", "limit", "alike", "lengths"), lines))


if __name__ == "__main__":
    run(main)
