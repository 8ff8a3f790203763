"""What do the conditioned objectives cost over `dpo` on this engine? In tokens, time and memory.

    python bench/overhead.py                       # arithmetic, and a small model on the CPU
    python bench/overhead.py --no-time             # arithmetic alone
    python bench/overhead.py --device cuda --dtype bf16 --shape llama-3.2-1b --pairs 64 --batch 16

The papers' figure beside it: InSPO's Table 7 reports 1.18 to 1.25 times the time of DPO and 1.15
to 1.20 times its memory. The arithmetic bounds what to expect: a pair costs the tokens of its trie
three times (forward and backward) and those of its reference trie once in `--epochs` passes over
the data. *Alone* is the same for an engine that runs every path by itself. Lengths are those of
three kinds of data (bench/lengths.py): the longer the prompt, the more there is to share. FLOPs are
those of bench/flops.py at the shape of Llama-3-8B.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import measuring, training  # noqa: E402
from bench.checkpoints import published, write_noise  # noqa: E402
from bench.flops import Flops  # noqa: E402
from bench.lengths import MIXES, write_pairs  # noqa: E402
from bench.measuring import median, table  # noqa: E402
from data import Dataset, Limits  # noqa: E402
from families import Config  # noqa: E402
from hub.template import Template  # noqa: E402
from jobs.cli import flag, parse, run  # noqa: E402
from losses import recipe  # noqa: E402
from pairs.read import Drops, read_pairs  # noqa: E402

BIG = Config.from_hf(published("llama-3-8b"))
PRICES = {"context_grad", "compile"}  # flags that change what a token costs, not which there are
LIMITS = Limits(max_len=8192, draft_cap=0.4)


@dataclass
class Settings:
    """Flags."""

    model: str | None = flag(None, "HF directory; default: noise in --shape")
    shape: str = flag("small", "small, or a folder of bench/shapes")
    mixes: str | None = flag(None, 'length mixes, as "hh; long_prompt"; default: all')
    only: str | None = flag(None, 'contenders beside dpo, as "ins_dpo; one_sided"; default: all')
    time: bool = flag(True, "also train, and take time and memory")
    pairs: int = flag(16, "pairs of a mix")
    batch: int = flag(8, "pairs per optimizer step")
    epochs: float = flag(1.0, "passes over the data that share one reference pass")
    dtype: str = flag("fp32", "compute dtype", tuple(measuring.DTYPES))
    device: str = flag("cpu", "where", ("cpu", "cuda"))
    repeat: int = flag(3, "runs of each contender, in turn")
    out: str = flag("bench/out/overhead.json", "where the figures go")


def common(s):
    """Flags of train.py that all contenders share. A noise checkpoint reads text byte by byte:
    two letters make its turn as long as a real tokenizer's."""
    words = {} if s.model else {"instruction": "go"}
    return {"max_len": LIMITS.max_len, "dtype": s.dtype, "device": s.device} | words


def tokens(data, model, flags, instruction):
    """Tokens and FLOPs per pair of one contender: policy trie, reference trie, each path alone."""
    rule = recipe(flags["loss"], flags.get("condition"), flags.get("bridge"))
    dataset = Dataset(read_pairs(data, Drops()), Template(model), rule, LIMITS, instruction)
    pairs, mean = range(len(dataset)), len(dataset)

    def alone(paths):
        return sum(sum(map(len, dataset.path(i, path)[0])) for i in pairs for path in paths) / mean

    training_flops, reference_flops = Flops(BIG).of_pairs(dataset, pairs, rule)
    return {
        "tokens": sum(dataset.size(i, rule.paths) for i in pairs) / mean,
        "reference_tokens": sum(dataset.size(i, rule.reference_paths) for i in pairs) / mean,
        "alone": alone(rule.paths),
        "reference_alone": alone(rule.reference_paths),
        "training_flops": training_flops / mean,
        "reference_flops": reference_flops / mean,
    }


def timed(s, data, model, flags):
    """Seconds per pair and peak memory of one contender, in a process of its own."""
    flags = flags | common(s) | {"model": model, "data": data, "batch": s.batch}
    found = training.in_fresh_process(flags | {"steps": max(1, s.pairs // s.batch)})
    kept = ("step_seconds_per_pair", "reference_seconds_per_pair", "peak_gib", "row_fill")
    return {name: found[name] for name in kept}


HEADERS = (
    "",
    "tokens",
    "reference tokens",
    "work over dpo",
    "FLOPs over dpo, 8B",
    "alone over dpo",
)
TIMED = ("step, ms/pair", "reference, ms/pair", "time over dpo", "peak GiB", "memory over dpo")


WORK = (("tokens", "reference_tokens", 3), ("training_flops", "reference_flops", 1))
WORK += (("alone", "reference_alone", 3),)


def work(counts, trained, reference, times, epochs):
    """What a pair costs in one epoch: its training `times`, and its share of the reference pass."""
    return times * counts[trained] + counts[reference] / epochs


def rows(counts, runs, epochs):
    """Lines of one mix's table. counts, runs: {contender: figures, or its list of runs}."""
    base = counts["dpo"]
    for name, c in counts.items():
        ratios = (work(c, *keys, epochs) / work(base, *keys, epochs) for keys in WORK)
        line = [name, round(c["tokens"]), round(c["reference_tokens"])]
        line += [f"{ratio:.2f}x" for ratio in ratios]
        if runs:
            line += measured(median(runs[name]), median(runs["dpo"]), epochs)
        yield line


def measured(m, base, epochs):
    """The columns of TIMED."""
    step, reference = m["step_seconds_per_pair"], m["reference_seconds_per_pair"]
    baseline = base["step_seconds_per_pair"] + base["reference_seconds_per_pair"] / epochs
    ratios = (step + reference / epochs) / baseline, m["peak_gib"] / base["peak_gib"]
    slower, larger = (f"{ratio:.2f}x" for ratio in ratios)
    return [1e3 * step, 1e3 * reference, slower, m["peak_gib"], larger]


def one_mix(s, mix, model, scratch):
    """(figures, table) of one length mix."""
    data = write_pairs(Path(scratch) / f"{mix}.jsonl", MIXES[mix], s.pairs, model)
    # what trains the same tokens at another price shows in timing only
    known = [n for n, f in training.CONTENDERS.items() if s.time or not f.keys() & PRICES]
    names = ["dpo", *measuring.chosen(s.only, known[1:])]
    flags = {name: training.CONTENDERS[name] for name in names}
    instruction = common(s).get("instruction", "better")
    counts = {name: tokens(data, model, f, instruction) for name, f in flags.items()}
    runs = {}
    if s.time:
        measures = {n: lambda f=f: timed(s, data, model, f) for n, f in flags.items()}
        runs = measuring.in_turn(measures, s.repeat)
    headers = (mix, *HEADERS[1:], *(TIMED if runs else ()))
    return {"arithmetic": counts, "runs": runs}, table(headers, rows(counts, runs, s.epochs))


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    with tempfile.TemporaryDirectory() as scratch:
        model = s.model or write_noise(Path(scratch) / "model", published(s.shape))
        mixes = measuring.chosen(s.mixes, MIXES)
        found = {mix: one_mix(s, mix, model, scratch) for mix in mixes}
    papers = "InSPO, Table 7: time 1.18x to 1.25x of DPO's, memory 1.15x to 1.20x."
    tables = [text for _, text in found.values()]
    measuring.tell(s, {mix: figures for mix, (figures, _) in found.items()}, *tables, papers)


if __name__ == "__main__":
    run(main)
