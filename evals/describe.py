"""Describes preference pairs as a run would train on them: `python evaluate.py describe`.

Reads, cleans and tokenises as train.py does, and tells what every rule dropped, how long prompts
and answers are, what the limits cut, how full rows get, what the trie saves, and how each path
reads. As a table, as JSON (`--out FILE.json`) and as a picture (`FILE.png`).
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import PARTS, Dataset, Limits, pack
from families.llama_guard import Guard
from hub.template import Template
from hub.weights import resolve
from jobs.cli import UserError, as_user_error, flag, require
from jobs.flags import CheckpointFlags, PathFlags
from losses import CONDITIONS, recipe
from pairs.cleaning import CleaningFlags, clean
from pairs.read import Drops, read_pairs

QUANTILES = (0, 5, 25, 50, 75, 95, 99, 100)
SAMPLE = 1000  # pairs whose path sets are laid out


@dataclass
class DescribeFlags(CheckpointFlags, PathFlags, CleaningFlags):
    """Every flag of `evaluate.py describe`; those that train.py has too mean the same."""

    data: str | None = flag(None, "file, glob, folder or hub id[:split], with @weight; commas")
    loss: str = flag("ins_dpo", "objective whose paths are laid out")
    condition: str | None = flag(None, "what each answer is conditioned on", tuple(CONDITIONS))
    limit: int | None = flag(None, "only the first N pairs")
    row_tokens: int = flag(8192, "tokens per row")
    batch: int = flag(128, "pairs per optimizer step")
    bad_rows: str = flag("stop", "at a broken row: stop, or drop and count it", ("stop", "drop"))
    device: str = flag("auto", "where the guard runs", ("auto", "cpu", "cuda"))
    out: str | None = flag(None, "FILE.json for the figures; the picture goes to FILE.png")


# ----------------------------------------------------------------------------- the figures


def figures_of(s):
    """(figures as a JSON-ready dict, {part: lengths}) of these settings."""
    template, drops = Template(resolve(s.model)), Drops()
    with as_user_error():
        rule = recipe(s.loss, s.condition, s.bridge)
    pairs = read_pairs(s.data, drops, s.limit, bad_rows=s.bad_rows)
    n_read = len(pairs)
    if (rules := CleaningFlags.of(s)) != CleaningFlags():
        guard = Guard(s.guard, s.device) if s.guard else None
        pairs = clean(pairs, rules, template, drops, guard)
    options = (template, rule, Limits(s.max_len, s.draft_cap), s.instruction, s.sep)
    data = Dataset(pairs, *options, shown=True)
    lengths = lengths_of(data, pairs)
    dropped = drops.rules | data.drops.rules
    figures = {
        "settings": dataclasses.asdict(s),
        "records_read": drops.read,
        "pairs_read": n_read,
        "pairs_kept": len(data),
        "dropped": {k: {"pairs": len(v), "rows": v[:2]} for k, v in dropped.items()},
        "tokens": {name: quantiles(values) for name, values in lengths.items()},
        "cut": {what: n / len(data) for what, n in data.cuts.items()},
        "row_fill": row_fill(data, rule.paths, s),
        "path_sets": path_sets(s, pairs[:SAMPLE], template, rule.bridge),
        "examples": decoded(data, rule, template),
    }
    return figures, lengths


def lengths_of(data, pairs):
    """{part: (N,) tokens} as they lie: where the limits of `data` cut, the pairs without any."""
    if data.cuts:
        whole = Limits(10**9, 1.0)
        data = Dataset(pairs, data.template, data.recipe, whole, data.instruction)
    sizes = np.asarray(data.examples.lengths)
    return {name: sizes[:, PARTS.index(name)] for name in ("prompt", "chosen", "rejected")}


def quantiles(values):
    """{"mean", "0%", "5%", …} in tokens."""
    spread = np.percentile(values, QUANTILES)
    marks = {f"{q}%": round(float(v), 1) for q, v in zip(QUANTILES, spread, strict=True)}
    return {"mean": round(float(values.mean()), 1)} | marks


def row_fill(data, paths, s):
    """Share of a row's tokens that are not padding, over the batches of one epoch in file order."""
    sizes = [data.size(i, paths) for i in range(len(data))]
    row_tokens = max(s.row_tokens, max(sizes))
    batches = [sizes[i : i + s.batch] for i in range(0, len(sizes), s.batch)]
    rows = sum(len(pack(batch, row_tokens)) for batch in batches)
    return {"rows": rows, "row_tokens": row_tokens, "fill": sum(sizes) / (rows * row_tokens)}


def path_sets(s, pairs, template, bridge):
    """Tokens of these pairs in separate sequences and in tries, per condition."""
    sets, limits = {}, Limits(s.max_len, s.draft_cap)
    for condition in CONDITIONS:
        rule = recipe("dpo", condition, bridge)
        data = Dataset(pairs, template, rule, limits, s.instruction, s.sep)
        paths = [data.path(i, path) for i in range(len(data)) for path in rule.paths]
        apart = sum(len(segment) for segments, _ in paths for segment in segments)
        trie = sum(data.size(i, rule.paths) for i in range(len(data)))
        sets[condition] = {"separate": apart, "trie": trie, "saved": 1 - trie / apart}
    return {"of_the_first_pairs": len(pairs), "bridge": bridge, "conditions": sets}


def decoded(data, rule, template, i=0):
    """{path: text} of one pair, `[[…]]` around what is scored."""
    texts = {}
    for path in dict.fromkeys([*rule.paths, *rule.kl_paths, *rule.reference_paths]):
        segments, n = data.path(i, path)
        *context, target = segments
        told = "".join(template.decode(ids, skip_special=False) for ids in context)
        scored, rest = (
            template.decode(ids, skip_special=False) for ids in (target[:n], target[n:])
        )
        texts[str(path)] = f"{told}[[{scored}]]{rest}"
    return texts


# ----------------------------------------------------------------------------- how it is shown


def summary(figures):
    """The figures as text for a terminal."""
    f = figures
    lost = sum(rule["pairs"] for rule in f["dropped"].values())
    yield f"read {f['records_read']} records: kept {f['pairs_kept']}, dropped {lost}"
    for rule, told in f["dropped"].items():
        yield f"  {told['pairs']:7} {rule}  ({', '.join(told['rows'])})"
    names = list(next(iter(f["tokens"].values())))
    yield f"\n{'tokens':10}" + "".join(f"{name:>8}" for name in names)
    for part, values in f["tokens"].items():
        yield f"{part:10}" + "".join(f"{v:8.0f}" for v in values.values())
    yield "\ncut by the limits: " + (
        ", ".join(f"{share:.1%} {what}" for what, share in f["cut"].items()) or "none"
    )
    fill = f["row_fill"]
    yield f"rows of {fill['row_tokens']} tokens: {fill['rows']} per epoch, {fill['fill']:.1%} full"
    sets = f["path_sets"]
    yield (f"\ntokens of the path sets of the first {sets['of_the_first_pairs']} pairs, "
           f"bridge {sets['bridge']}")  # fmt: skip
    yield f"{'path set':12}{'separate':>10}{'trie':>10}{'saved':>8}"
    for name, told in sets["conditions"].items():
        yield f"{name:12}{told['separate']:10}{told['trie']:10}{told['saved']:8.1%}"
    for path, text in f["examples"].items():
        yield f"\n--- {path} ([[scored]])\n{text}"


def picture(lengths, file, max_len):
    """Histograms of prompt, chosen and rejected lengths in tokens, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    top = max(values.max() for values in lengths.values())
    bins = np.unique(np.geomspace(1, max(top, 2) + 1, 41).round()) - 0.5  # whole tokens
    styles = {"prompt": ("0.55", "-"), "chosen": ("tab:blue", "-"), "rejected": ("tab:red", "--")}
    for name, values in lengths.items():
        colour, line = styles[name]
        label = f"{name}: median {np.median(values):.0f}, 95% {np.percentile(values, 95):.0f}"
        axis.hist(values, bins, histtype="step", color=colour, linestyle=line, label=label, lw=1.6)
    if max_len <= top * 2:
        axis.axvline(max_len, color="black", lw=0.8, linestyle=":", label=f"max_len {max_len}")
    axis.set(xscale="log", xlabel="tokens", ylabel="pairs", title="Lengths of prompts and answers")
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def describe(s):
    """Tell what a training run would make of its data, before it costs a GPU."""
    require(s, "model", "data")
    figures, lengths = figures_of(s)
    print("\n".join(summary(figures)))
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    if s.out is None:
        print(f"\n{text}")
        return
    try:
        Path(s.out).parent.mkdir(parents=True, exist_ok=True)
        Path(s.out).write_text(text + "\n", encoding="utf-8")
        picture(lengths, Path(s.out).with_suffix(".png"), s.max_len)
    except OSError as error:
        raise UserError(f"--out {s.out}: {error.strerror}") from error
    print(f"\nsaved: {s.out}, {Path(s.out).with_suffix('.png')}")
