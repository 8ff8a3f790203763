"""How fast, large and costly are `dpo` and its conditioned forms here, and TRL's plain DPO?

    python -m bench.pairs_per_second --dtype fp32 --pairs 32 --batch 16 --repeat 3
    python -m bench.pairs_per_second --device cuda --dtype bf16 --shape llama-3.2-1b \
        --mix ultrafeedback --pairs 128 --batch 32 --micro 8 --only "ins_dpo; TRL dpo, bf16 weights"
    python -m bench.pairs_per_second --shape small --mix hh --pairs 16 --batch 8 --max_len 8192 \
        --only "dpo; ins_dpo; one_sided"                       what conditioning costs over dpo
    python -m bench.pairs_per_second --no-train --mix hh       the arithmetic of it alone

Speed: one run, one machine, one contender at a time, in turn: same model, pairs, dtype, batch and
length limit, each in a process of its own. A pair costs its share of the reference pass and of the
steps; imports, loading, tokenising and the first `--uncounted` steps are not counted. Peak memory
is that of the GPU or the resident set. Without TRL its rows are left out, and it says so.

Utilisation is the model FLOPs of a pair (bench/measuring.py) per second over the rate of plain
matrix products of the model's own shapes, measured between the contenders. TRL's is held against
the FLOPs of `dpo` here, that is, of what plain DPO needs; that of `--context_grad false` against
the exact gradient's.

Work: a pair costs the tokens of its trie three times (forward and backward), and those of its
reference trie once. *Alone* is the same for an engine that runs every path by itself. FLOPs are
those of Llama-3-8B's shape. InSPO's Table 7 has 1.18 to 1.25 times the time of DPO and 1.15 to 1.20
times its memory.

Start: seconds until a run trains. *Template* compiles the chat template; *data* reads, renders and
tokenises, or maps the cache of the contender before; the *reference* pass comes once per run; the
*first step* allocates, and on CUDA compiles, what the later ones find there.
"""

import importlib.util
from dataclasses import dataclass

import losses
from bench import measuring, training
from bench.inputs import WorkloadFlags, published
from bench.measuring import DTYPES, Flops, median, percent, table, times
from data import Dataset, Limits
from hub.template import Template
from jobs.cli import flag, parse, run
from model import config_of, read_config
from pairs.read import Drops, read_pairs


@dataclass(frozen=True)
class SpeedFlags(WorkloadFlags):
    """Flags of the comparison."""

    only: str | None = flag(None, 'contenders, as "dpo; ins_dpo"; default: all')
    train: bool = flag(True, "train and take time; no: the arithmetic alone")
    batch: int = flag(16, "pairs per optimizer step")
    micro: int = flag(4, "TRL: pairs per forward")
    uncounted: int = flag(1, "first steps, that are not counted")
    row_tokens: int | None = flag(None, "here: tokens per row; default: train.py's")
    repeat: int = flag(3, "runs of each contender, in turn")
    out: str = flag("bench/out/pairs_per_second.json", "where the figures go")


HERE = training.CONTENDERS | training.SAVERS
PEER = {
    "TRL dpo, reference precomputed": {"precompute": True},
    "TRL dpo, compiled": {"precompute": True, "compile": True},
    "TRL dpo, reference in each step": {"precompute": False},
    "TRL dpo, its defaults": {"precompute": False, "tuned": False},
    "TRL dpo, bf16 weights": {"precompute": True, "dtype": "bf16_pure"},
}


def names_of(s):
    """The contenders that are asked for and installed."""
    peers = [n for n in PEER if s.dtype == "bf16" or "bf16" not in n]
    savers = training.SAVERS if s.only else {}  # only where they are named
    names = measuring.chosen(s.only, [*training.CONTENDERS, *savers, *peers])
    if not importlib.util.find_spec("trl") and set(names) & set(PEER):
        print("TRL is not installed (requirements-dev.txt): its rows are left out")
        names = [name for name in names if name not in PEER]
    return names


# ----------------------------------------------------------------------------- speed


def measure(s, model, data, name):
    """Figures of one contender in a process of its own."""
    common = {"batch": s.batch, "steps": max(1, s.pairs // s.batch), "uncounted": s.uncounted}
    if name in HERE:
        flags = HERE[name] | s.train_flags(model, data) | common
        return measuring.fresh("training.measure", **flags, row_tokens=s.row_tokens)
    flags = {"model": model, "data": data, "pairs": s.pairs, "micro": s.micro, "dtype": s.dtype}
    flags |= common | {"max_len": s.max_len, "device": s.device} | PEER[name]
    return measuring.fresh("trl_dpo.measure", **flags) | {"flops_per_pair": None}


SPEED = ("contender", "pairs/s", "against TRL's best", "time over dpo", "reference pass, ms/pair")
SPEED += ("tokens/pair", "GFLOP/pair", "of matmul rate", "peak GiB", "memory over dpo")


def speed_rows(runs, rate):
    """Lines of the table: medians, ratios to TRL's fastest run and to dpo here, utilisation."""
    middle = {name: median(figures) for name, figures in runs.items()}
    best = max((m["pairs_per_second"] for name, m in middle.items() if name in PEER), default=None)
    dpo = middle.get("dpo", dict.fromkeys(("pairs_per_second", "flops_per_pair", "peak_gib")))
    for name, m in middle.items():
        speed, memory = m["pairs_per_second"], m["peak_gib"]
        flops = m["flops_per_pair"] or dpo["flops_per_pair"]
        ratios = times(speed, best), times(dpo["pairs_per_second"], speed)
        gflops = m["flops_per_pair"] / 1e9 if m["flops_per_pair"] else None
        used = percent(flops * speed, rate) if flops else None
        reference = 1e3 * m["reference_seconds_per_pair"]
        yield [name, speed, *ratios, reference, m["tokens_per_pair"], gflops, used, memory,
               times(memory, dpo["peak_gib"])]  # fmt: skip


def start_rows(runs):
    """A line per stage: the seconds of each contender here."""
    middle = [median(figures) for name, figures in runs.items() if name not in PEER]
    return [[stage, *(m[f"{stage} seconds"] for m in middle)] for stage in training.STAGES]


# ----------------------------------------------------------------------------- work

# flags that change what a token costs, not which there are
CHEAPER = {"context_grad", "compile", "checkpoint_activations", "offload"}
WORK = ("contender", "tokens/pair", "reference tokens", "over dpo", "FLOPs over dpo, 8B")
WORK += ("alone over dpo",)


def work(s, model, data, flags):
    """Tokens per pair of policy and reference trie, and what these cost over an epoch."""
    recipe = losses.recipe(flags["loss"], flags.get("condition"), flags.get("bridge"))
    instruction = s.train_flags(model, data).get("instruction", "better")
    pairs, limits = read_pairs(data, Drops(), s.pairs), Limits(s.max_len, 0.4)
    dataset = Dataset(pairs, Template(model), recipe, limits, instruction)
    every, trained = range(len(dataset)), (recipe.paths, recipe.reference_paths)

    def alone(paths):
        return sum(sum(map(len, dataset.path(i, path)[0])) for i in every for path in paths)

    tokens, reference = (sum(dataset.size(i, paths) for i in every) for paths in trained)
    flops = Flops(config_of(published("llama-3-8b"))).of_pairs(dataset, every, recipe)
    return {
        "tokens": tokens / len(every),
        "reference_tokens": reference / len(every),
        "work": (3 * tokens + reference) / len(every),
        "flops": sum(flops) / len(every),
        "alone": (3 * alone(recipe.paths) + alone(recipe.reference_paths)) / len(every),
    }


def work_rows(counts):
    """Lines of the table; counts: {contender: work()}."""
    dpo = counts.get("dpo", {})
    for name, c in counts.items():
        ratios = [times(c[kind], dpo.get(kind)) for kind in ("work", "flops", "alone")]
        yield [name, round(c["tokens"]), round(c["reference_tokens"]), *ratios]


# ----------------------------------------------------------------------------- the command


def main():
    s = parse(SpeedFlags, __doc__.splitlines()[0])
    names = names_of(s)
    here = {n: HERE[n] for n in names if n in HERE}
    with s.ready() as (model, data):
        counts = {n: work(s, model, data, f) for n, f in here.items() if not f.keys() & CHEAPER}
        tables, runs = [table(WORK, work_rows(counts))], {}
        if s.train:
            runs, speed = trained(s, names, model, data)
            tables = [*speed, *tables]
    measuring.tell(s, {"work": counts, "runs": runs}, *tables)


def trained(s, names, model, data):
    """(runs, tables) of every contender, and of plain matrix products between them."""
    shapes = Flops(read_config(model)[1]).shapes
    size = s.row_tokens or (8192 if s.device == "cuda" else 2048)
    measures = {"matmul rate": lambda: measuring.ceilings(shapes, size, DTYPES[s.dtype], s.device)}
    measures |= {name: lambda name=name: measure(s, model, data, name) for name in names}
    runs = measuring.in_turn(measures, s.repeat)
    rate = median(runs["matmul rate"])
    only = {name: figures for name, figures in runs.items() if name in names}
    headers = ("matrix products", "model's shapes, TFLOP/s", f"square, TFLOP/s ({s.dtype})")
    tables = [table(SPEED, speed_rows(only, rate["model"]))]
    tables.append(table(headers, [("", rate["model"] / 1e12, rate["square"] / 1e12)]))
    here = [name for name in names if name not in PEER]
    return runs, [*tables, table(("start, seconds", *here), start_rows(only))]


if __name__ == "__main__":
    run(main)
