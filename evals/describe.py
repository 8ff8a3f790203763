"""Describes preference pairs as a run would train on them: `python evaluate.py describe`.

Reads, cleans and tokenises as train.py does, and tells what every rule dropped, how long prompts
and answers are, what the limits cut, how full rows get, what the trie saves, and how each path
reads. As a page for people, and with `--out FILE.json` as JSON and a picture (`FILE.png`) too.
"""

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from data import Dataset, pack
from evals.results import draw_lengths, figure_file, out_file, save_results, table
from families.llama_guard import Guard
from hub.template import Template
from hub.weights import resolve
from jobs.cli import CheckpointFlags, DataFlags, PathFlags, as_user_error, flag, require
from kernels import chains
from losses import CONDITIONS, recipe
from model import path_limit
from pairs.cleaning import CleaningFlags, clean
from pairs.examples import PARTS
from pairs.read import Drops, read_pairs

QUANTILES = (0, 5, 25, 50, 75, 95, 99, 100)
SAMPLE = 1000  # pairs whose path sets are laid out


@dataclass(frozen=True)
class DescribeFlags(CheckpointFlags, DataFlags, PathFlags, CleaningFlags):
    """Those that train.py has too mean the same."""

    loss: str = flag("ins_dpo", "objective whose paths are laid out")
    condition: str | None = flag(None, "what each answer is conditioned on", tuple(CONDITIONS))
    row_tokens: int = flag(8192, "tokens per row", least=1)
    batch: int = flag(128, "pairs per optimizer step", least=1)
    device: str = flag("auto", "where the guard runs", ("auto", "cpu", "cuda"))
    out: str | None = flag(None, "FILE.json for the figures; the picture goes to FILE.png")


def describe(s):
    """Tell what a training run would make of its data, before it costs a GPU."""
    require(s, "model", "data")
    picture = s.out and figure_file(s.out)
    s = dataclasses.replace(s, max_len=path_limit(s.max_len, resolve(s.model)))
    figures, lengths = figures_of(s)
    print(f"{s.data} as {s.loss} would train {s.model} on it\n")
    lost = sum(rule["pairs"] for rule in figures["dropped"].values())
    print(f"read {figures['records_read']} records: kept {figures['pairs_kept']}, dropped {lost}")
    for rule, told in figures["dropped"].items():
        print(f"  {told['pairs']:7} {rule}  ({', '.join(told['rows'])})")
    rows = [{"tokens": part} | told for part, told in figures["tokens"].items()]
    print("\n" + table(rows, ".0f"))
    cuts = ", ".join(f"{share:.1%} {what}" for what, share in figures["cut"].items())
    print(f"\ncut by the limits: {cuts or 'none'}")
    fill, sets = figures["row_fill"], figures["path_sets"]
    print("rows of {row_tokens} tokens: {rows} per epoch, {fill:.1%} full".format(**fill))
    told = "\ntokens of the path sets of the first {of_the_first_pairs} pairs, bridge {bridge}"
    print(told.format(**sets))
    rows = [{"path set": name} | told for name, told in sets["conditions"].items()]
    print(table(rows, ".1%"))
    print("\npaths of the first pair: an answer|what stands before it, scored tokens in [[ ]]")
    for path, text in figures["examples"].items():
        print(f"\n--- {path} ([[scored]])\n{text}")
    if s.out is None:
        return print("\n--out FILE.json keeps these figures, and a picture of the lengths")
    save_results(s.out, figures)
    longest = max(values.max() for values in lengths.values())
    limit = {"max_len": s.max_len} if s.max_len <= 2 * longest else {}
    with out_file(picture):
        draw_lengths(lengths, picture, "tokens", "pairs", limit)
    print(f"\nsaved: {s.out}, {picture}")


def figures_of(s):
    """(figures as a JSON-ready dict, {part: lengths}) of these settings."""
    template, drops = Template(resolve(s.model), s.fold_system), Drops()
    with as_user_error():
        rule = recipe(s.loss, s.condition, s.bridge)
    pairs = read_pairs(s.data, drops, s.limit, True, s.bad_rows, s.data_revision, s.ignore_columns)
    n_read = len(pairs)
    if (rules := CleaningFlags.of(s)) != CleaningFlags():
        guard = Guard(s.guard, s.device, chains.attend) if s.guard else None
        pairs = clean(pairs, rules, template, drops, guard)
    data = Dataset.of(s, pairs, template, rule, shown=True)
    # lengths are those of the pairs as they lie, without the limits
    uncut = dataclasses.replace(s, max_len=10**9, draft_cap=1.0)
    whole = Dataset.of(uncut, pairs, template, rule) if data.cuts else data
    lengths = dict(zip(PARTS, np.asarray(whole.examples.lengths).T, strict=True))  # (N,) each
    # an answer behind a bridge has other ids for some tokenizers only, and no length for the rest
    lengths = {k: n for k, n in lengths.items() if k != "instruct" and n.any()}
    # share of a row's tokens that are not padding, over the batches of one epoch in file order
    sizes = [data.size(i, rule.paths) for i in range(len(data))]
    row_tokens, steps = max(s.row_tokens, *sizes), range(0, len(sizes), s.batch)
    rows = sum(len(pack(sizes[i : i + s.batch], row_tokens)) for i in steps)
    fill = sum(sizes) / (rows * row_tokens)
    dropped, tokens = drops.rules | data.drops.rules, {}
    for name, of in lengths.items():
        spread = {"mean": of.mean()}
        spread |= zip((f"{q}%" for q in QUANTILES), np.percentile(of, QUANTILES), strict=True)
        tokens[name] = {mark: round(float(value), 1) for mark, value in spread.items()}
    # the first pair's paths, with [[…]] around what is scored
    examples, decode = {}, functools.partial(template.decode, skip_special=False)
    for path in dict.fromkeys([*rule.paths, *rule.kl_paths, *rule.reference_paths]):
        (*context, target), n = data.path(0, path)
        before = "".join(map(decode, context))
        examples[str(path)] = f"{before}[[{decode(target[:n])}]]{decode(target[n:])}"
    figures = {
        "settings": dataclasses.asdict(s),
        "records_read": drops.read,
        "pairs_read": n_read,
        "pairs_kept": len(data),
        "dropped": {k: {"pairs": len(v), "rows": v[:2]} for k, v in dropped.items()},
        "tokens": tokens,
        "cut": {what: n / (len(data) + data.drops.total) for what, n in data.cuts.items()},
        "row_fill": {"rows": rows, "row_tokens": row_tokens, "fill": fill},
        "path_sets": path_sets(s, pairs[:SAMPLE], template, rule.bridge),
        "examples": examples,
    }
    return figures, lengths


def path_sets(s, pairs, template, bridge):
    """Tokens of these pairs in separate sequences and in tries, per condition."""
    sets = {}
    for condition in CONDITIONS:
        rule = recipe("dpo", condition, bridge)
        data = Dataset.of(s, pairs, template, rule)
        paths = [data.path(i, path) for i in range(len(data)) for path in rule.paths]
        apart = sum(len(segment) for segments, _ in paths for segment in segments)
        trie = sum(data.size(i, rule.paths) for i in range(len(data)))
        sets[condition] = {"separate": apart, "trie": trie, "saved": 1 - trie / apart}
    return {"of_the_first_pairs": len(pairs), "bridge": bridge, "conditions": sets}
