"""From `--data` to tokenised training and validation sets: read, clean, hold out, tokenise, cache.

One function, `prepare`, for every command that trains; what happened to the pairs is told in lines,
and comes out the same when all of it is mapped from the cache.
"""

import dataclasses

from data import Dataset, Limits
from pairs import token_cache as tokens
from pairs.cleaning import Rules, clean
from pairs.read import Drops, hold_out, read_pairs
from pairs.sources import parse_sources

CHOICES = ("data", "eval_data", "eval_pairs", "limit", "bad_rows", "max_len", "draft_cap",
           "score_eos", "instruction", "sep", "seed")  # fmt: skip


def prepare(s, template, rule, ranks=None):
    """({name: Dataset} of train and, where there are pairs for it, validation; report lines).

    s: settings with the fields of CHOICES and cleaning.Rules. rule: losses.Recipe. ranks: rank 0
    does the work and the others map its cache; where they cannot, each does it. Sets s.eval_pairs
    where it was None.
    """
    built = []

    def make():
        """(the cache's key, lines about the cache); what could not be kept stays in `built`."""
        key = key_of(s, template, rule)
        if tokens.read(key):
            return key, []
        damaged = (tokens.folder() / key).exists()
        built.append(build(s, template, rule, shown=True))
        try:
            tokens.write(key, *built[0])
        except OSError as error:
            return key, [f"no token cache in {tokens.folder()}: {error.strerror or error}"]
        built.clear()  # its pages are mapped from now on, and shared
        return key, ["the token cache was damaged: made again"] * damaged

    key, notes = ranks.share(make) if ranks else make()
    # the first rank has just checked the sums; another machine's disk may not have the folder
    found = None if built else tokens.read(key, check=False)
    if found:
        stored, lines = found
        sets = {name: dataset(s, template, rule, stored=parts) for name, parts in stored.items()}
    else:
        sets, lines = built[0] if built else build(s, template, rule)
    if not s.eval_data and s.eval_pairs is None:
        held = sets.get("validation")
        s.eval_pairs = len(held) + held.drops.total if held else 0
    return sets, [*lines, *notes]


def key_of(s, template, rule):
    """The cache's key: all that decides the tokens. A guard counts by its weights, not its path."""
    sources = parse_sources(s.data, s.data_revision)
    sources += parse_sources(s.eval_data, eval_revision(s)) if s.eval_data else []
    choices = {name: getattr(s, name) for name in CHOICES} | dataclasses.asdict(Rules.of(s))
    if s.guard:
        from pairs.guard import identity

        choices["guard"] = identity(s.guard)
    decides = [rule.paths, rule.bridge, rule.objective.head, rule.objective.answers]
    choices |= {"recipe": str(decides)}
    return tokens.key_of([file for source in sources for file in source.files], template, choices)


def dataset(s, template, rule, pairs=(), **options):
    """The Dataset of these pairs under these settings."""
    limits = Limits(s.max_len, s.draft_cap, s.score_eos)
    return Dataset(pairs, template, rule, limits, s.instruction, s.sep, **options)


def build(s, template, rule, shown=False):
    """The same without a cache: ({name: Dataset}, lines). shown: with a progress bar."""
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
        held = read_pairs(s.eval_data, drops, s.eval_pairs, both, s.bad_rows, eval_revision(s))
    else:
        n = min(1000, len(pairs) // 10) if s.eval_pairs is None else s.eval_pairs
        pairs, held = hold_out(pairs, n, s.seed)
    sets = {"train": dataset(s, template, rule, pairs, shown=shown)}
    if held:
        sets["validation"] = dataset(s, template, rule, held)
    return sets, [*lines, *(f"{name}: {data.report()}" for name, data in sets.items())]


def eval_revision(s):
    """The hub revision of --eval_data: its own flag's, else that of --data."""
    return s.eval_revision or s.data_revision
