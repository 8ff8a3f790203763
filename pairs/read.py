"""Reads the preference pairs of all sources; whatever gives no pair is counted, by reason.

sources.py knows where data lies, layouts.py what its columns mean.
"""

import contextlib
import sys
from collections import defaultdict

import numpy as np

from jobs.cli import UserError
from pairs.layouts import Dropped, make_pair, recognise
from pairs.layouts import Pair as Pair
from pairs.sources import parse_sources, records

HOLD_OUT = 2**32 - 1  # the seed's stream for the hold-out, apart from those of the epochs


class Drops:
    """Counts records that gave no pair: {rule: ["file:row", …]}, and how many were `read`.

    After read_pairs: read = kept + dropped, always; the copies that a weight makes count once.
    """

    def __init__(self, rules=(), read=0):
        self.rules, self.read = defaultdict(list, rules), read

    def add(self, rule, where):
        self.rules[rule].append(where)

    def sift(self, pairs, reasons):
        """The pairs whose reason is None; the others are added by theirs."""
        kept = []
        for pair, reason in zip(pairs, reasons, strict=True):
            if reason is None:
                kept.append(pair)
            else:
                self.add(reason, pair.where)
        return kept

    @property
    def total(self):
        return sum(map(len, self.rules.values()))

    def __str__(self):
        rules = (
            f"{len(where)} {rule} ({', '.join(where[:2])}{', …' if len(where) > 2 else ''})"
            for rule, where in self.rules.items()
        )
        return "; ".join(rules) or "none"


def read_pairs(source, drops=None, limit=None, need_rejected=True, bad_rows="stop", revision=None):
    """Reads all pairs of the sources in `source` (sources.py has the grammar) -> list of Pair.

    limit: stop after that many. need_rejected: False takes rows without a rejected answer too, for
    supervised training. bad_rows: a row that is broken or of no known layout raises UserError
    ("stop") or is counted in `drops` ("drop"). revision: branch, tag or commit of hub datasets.
    UserError for a missing or damaged file, and where no pair is left.
    """
    pairs, drops = [], Drops() if drops is None else drops
    for files, weight in parse_sources(source, revision):
        rest = sys.maxsize if limit is None else max(0, limit - len(pairs))
        pairs += weighted(pairs_of(files, rest, drops, need_rejected, bad_rows), weight, drops)
    if not pairs:
        raise UserError(f"{source}: no usable pairs; dropped: {drops}")
    return pairs[:limit]


def pairs_of(files, limit, drops, need_rejected, bad_rows):
    """The pairs of these files, at most `limit` of them; no row is read beyond those.

    Layouts whose pairs depend on other rows come last, in one piece.
    """
    pairs, gathered = [], defaultdict(list)  # gathered: layout -> what its `read` gave

    @contextlib.contextmanager
    def counted(where):
        """Counts a row that gives no pair."""
        try:
            yield
        except Dropped as reason:
            drops.add(str(reason), where)
        except UserError:
            if bad_rows == "stop":
                raise
            drops.add("broken row", where)

    rows = (row for file in files for row in records(file, broken=True))
    while len(pairs) < limit and (row := next(rows, None)):
        drops.read += 1
        where, record = row
        with counted(where):
            if isinstance(record, UserError):  # a line that is no JSON
                raise record
            layout = recognise(record, where, need_rejected)
            found = layout.read(record, where)
            if layout.gather:
                gathered[layout].append(found)
            else:
                pairs.append(make_pair(found, need_rejected, ties=False))
    for layout, group in gathered.items():
        for raw in layout.gather(group, drops):
            with counted(raw.where):
                pairs.append(make_pair(raw, need_rejected, ties=False))
    for pair in pairs[limit:]:
        drops.add("beyond --limit", pair.where)
    return pairs[:limit]


def weighted(pairs, weight, drops):
    """Takes each pair `weight` times: whole parts repeat all, the fraction adds a random share.

    Pairs of which no copy is left are added to `drops`.
    """
    whole, share = divmod(weight, 1)
    order = np.random.default_rng((0, len(pairs))).permutation(len(pairs)).tolist()
    drawn = set(order[: round(share * len(pairs))])
    if whole:
        return pairs * int(whole) + [pairs[i] for i in sorted(drawn)]
    places = range(len(pairs))
    return drops.sift(pairs, (None if i in drawn else "left out by the weight" for i in places))


def hold_out(pairs, n, seed):
    """Splits off n random pairs for validation -> (train, held out); copies stay together.

    Raises UserError where that would leave nothing to train on.
    """
    places = list(dict.fromkeys(pair.where for pair in pairs))
    if n >= len(places):
        raise UserError(f"--eval_pairs {n} leaves nothing of {len(places)} pairs to train on")
    order = np.random.default_rng((seed, HOLD_OUT)).permutation(len(places))
    held, firsts = {places[i] for i in order[:n]}, {pair.where: pair for pair in reversed(pairs)}
    train = [pair for pair in pairs if pair.where not in held]
    return train, [firsts[where] for where in places if where in held]
