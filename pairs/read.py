"""Preference pairs of all sources, read as they lie: nothing is dropped without a count.

Where data lies is sources.py, what its columns mean layouts.py.
"""

import sys
from collections import defaultdict

import numpy as np

from jobs.cli import UserError
from pairs.layouts import Dropped, make_pair, recognise
from pairs.layouts import Pair as Pair
from pairs.sources import parse_sources, records

HOLD_OUT = 2**32 - 1  # the seed's stream for the hold-out, apart from those of the epochs


class Drops:
    """Records that gave no pair, by rule, with where they stand; and how many were `read`.

    After read_pairs: read = kept + dropped, always; the copies that a weight makes count once.
    """

    def __init__(self):
        self.rules = defaultdict(list)
        self.read = 0

    def add(self, rule, where):
        self.rules[rule].append(where)

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
    """All pairs of the sources in `source` (sources.py has the grammar), in their order.

    limit: stop after that many. bad_rows: a row that is broken or of no known layout raises
    UserError ("stop") or is counted in `drops` ("drop"). revision: branch, tag or commit of hub
    datasets. UserError for a missing or damaged file, and where no pair is left.
    """
    pairs, drops = [], Drops() if drops is None else drops
    for part in parse_sources(source, revision):
        rest = sys.maxsize if limit is None else max(0, limit - len(pairs))
        found = Reader(drops, need_rejected, bad_rows).pairs(part.files, rest)
        pairs += weighted(found, part.weight, drops)
    if not pairs:
        raise UserError(f"{source}: no usable pairs; dropped: {drops}")
    return pairs[:limit]


class Reader:
    """Reads the files of one source. Layouts that need all records come last, in one piece."""

    def __init__(self, drops, need_rejected, bad_rows):
        self.drops, self.need_rejected, self.bad_rows = drops, need_rejected, bad_rows
        self.gathered = defaultdict(list)  # layout -> (where, what its `read` gave)

    def pairs(self, files, limit):
        """The pairs of these files, at most `limit` of them; no row is read beyond those."""
        pairs, rows = [], self._rows(files)
        while len(pairs) < limit and (row := next(rows, None)):
            self.drops.read += 1
            pairs += self._kept(*row, self._one)
        for layout, group in self.gathered.items():
            for where, found in layout.gather(group):
                pairs += self._kept(where, found, self._made)
        for pair in pairs[limit:]:
            self.drops.add("beyond --limit", pair.where)
        return pairs[:limit]

    def _rows(self, files):
        for file in files:
            yield from records(file, self._bad if self.bad_rows == "drop" else None)

    def _bad(self, where):
        self.drops.read += 1
        self.drops.add("broken row", where)

    def _kept(self, where, what, make):
        """make(what, where) as a list of one, or empty: dropped and counted, or gathered."""
        try:
            pair = make(what, where)
        except Dropped as rule:
            self.drops.add(str(rule), where)
        except UserError:
            if self.bad_rows == "stop":
                raise
            self.drops.add("broken row", where)
        else:
            return [pair] if pair else []
        return []

    def _one(self, record, where):
        layout = recognise(record, where, self.need_rejected)
        found = layout.read(record, where)
        if layout.gather:
            return self.gathered[layout].append((where, found))
        return self._made(found, where)

    def _made(self, found, where):
        """found: Fields, or the rule why there are none."""
        if isinstance(found, str):
            raise Dropped(found)
        pair = make_pair(found, where, self.need_rejected)
        if pair.chosen == pair.rejected:  # prefers nothing; an evaluation may still count the tie
            raise Dropped("identical answers")
        return pair


def weighted(pairs, weight, drops):
    """Whole parts of the weight repeat all pairs, its fraction adds a random share, in order.

    Pairs of which no copy is left are added to `drops`.
    """
    whole, share = divmod(weight, 1)
    n = round(share * len(pairs))
    drawn = np.random.default_rng((0, len(pairs))).permutation(len(pairs))[:n]
    if not whole:
        for i in sorted(set(range(len(pairs))).difference(drawn.tolist())):
            drops.add("left out by the weight", pairs[i].where)
    return pairs * int(whole) + [pairs[i] for i in sorted(drawn)]


def hold_out(pairs, n, seed):
    """Split off n random pairs for validation -> (train, held out); copies of a pair stay together.

    Raises UserError where that would leave nothing to train on.
    """
    first = {}
    for i, pair in enumerate(pairs):
        first.setdefault(pair.where, i)
    first = list(first.values())
    if n >= len(first):
        raise UserError(f"--eval_pairs {n} leaves nothing of {len(first)} pairs to train on")
    order = np.random.default_rng((seed, HOLD_OUT)).permutation(len(first))
    held = sorted(first[i] for i in order[:n].tolist())
    places = {pairs[i].where for i in held}
    train = [pair for pair in pairs if pair.where not in places]
    return train, [pairs[i] for i in held]
