"""From `--data` to tokenised training and validation sets: read, clean, hold out, tokenise, cache.

One function, `prepare`, for every command that trains or reports; what happened to the pairs is
told in lines, and comes out the same when all of it is mapped from the cache.
"""

import dataclasses

import tokens
from cleaning import Rules, clean
from data import Dataset, Limits
from pairs import Drops, hold_out, read_pairs
from sources import parse_sources

CHOICES = ("data", "eval_data", "eval_pairs", "limit", "bad_rows", "max_len", "draft_cap",
           "score_eos", "instruction", "sep", "seed")  # fmt: skip


def prepare(s, template, rule, ranks=None):
    """({name: Dataset} of train and, where there are pairs for it, validation; report lines).

    s: settings with the fields of CHOICES and cleaning.Rules. rule: losses.Recipe. ranks: rank 0
    does the work and the others map its cache. Sets s.eval_pairs where it was None.
    """
    sources = parse_sources(s.data, s.data_revision)
    sources += parse_sources(s.eval_data) if s.eval_data else []
    files = [file for source in sources for file in source.files]
    choices = {name: getattr(s, name) for name in CHOICES} | dataclasses.asdict(Rules.of(s))
    decides = [rule.paths, rule.bridge, rule.objective.head, rule.objective.answers]
    choices |= {"recipe": str(decides)}
    key = tokens.key_of(files, template, choices)

    def make():
        if tokens.read(key) is None:
            tokens.write(key, *build(s, template, rule, shown=True))

    ranks.share(make) if ranks else make()
    found = tokens.read(key)
    if found is None:  # another machine, without rank 0's disk
        make()
        found = tokens.read(key)
    stored, lines = found
    if not s.eval_data and s.eval_pairs is None:
        _, dropped, _ = parts = stored.get("validation", ((), Drops(), {}))
        s.eval_pairs = len(parts[0]) + dropped.total
    limits = Limits(s.max_len, s.draft_cap, s.score_eos)
    options = (template, rule, limits, s.instruction, s.sep)
    sets = {name: Dataset((), *options, stored=parts) for name, parts in stored.items()}
    return sets, lines


def build(s, template, rule, shown=False):
    """The same, without cache."""
    both = rule.objective.answers == ("chosen", "rejected")
    both = both or any(path.context in ("chosen", "rejected") for path in rule.paths)
    drops = Drops()
    pairs = read_pairs(s.data, drops, s.limit, both, s.bad_rows, s.data_revision)
    lines = [f"read {len(pairs)} pairs from {s.data}; dropped: {drops}"]
    rules, cleaned = Rules.of(s), Drops()
    if rules != Rules():
        pairs = clean(pairs, rules, template, cleaned, s.device)
        lines.append(f"cleaned: {len(pairs)} pairs; dropped: {cleaned}")
    if s.eval_data:
        held = read_pairs(s.eval_data, drops, s.eval_pairs, both, s.bad_rows)
    else:
        n = min(1000, len(pairs) // 10) if s.eval_pairs is None else s.eval_pairs
        pairs, held = hold_out(pairs, n, s.seed)
    limits = Limits(s.max_len, s.draft_cap, s.score_eos)
    options = (template, rule, limits, s.instruction, s.sep)
    sets = {"train": Dataset(pairs, *options, shown=shown)}
    if held:
        sets["validation"] = Dataset(held, *options)
    return sets, [*lines, *(f"{name}: {data.report()}" for name, data in sets.items())]
