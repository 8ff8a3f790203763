"""Preference pairs of all sources, read as they lie: nothing is dropped without a count.

Where data lies is sources.py, what its columns mean layouts.py.
"""

from collections import defaultdict

import numpy as np

from cli import UserError
from layouts import Dropped, make_pair, recognise, to_pair
from layouts import Pair as Pair
from sources import parse_sources, records

HOLD_OUT = 2**32 - 1  # the seed's stream for the hold-out, apart from those of the epochs


class Drops:
    """Records that gave no pair, by rule, with where they stand; and how many were `read`.

    After read_pairs of sources without weights: read = kept + dropped, always.
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


def read_pairs(source, drops, limit=None, need_rejected=True, bad_rows="stop", revision=None):
    """All pairs of the sources in `source` (sources.py has the grammar), in their order.

    limit: stop after that many. bad_rows: a row that is broken or of no known layout raises
    UserError ("stop") or is counted in `drops` ("drop"). revision: branch, tag or commit of hub
    datasets. UserError for a missing or broken file,
    and where no pair is left.
    """
    pairs = []
    for part in parse_sources(source, revision):
        rest = None if limit is None else limit - len(pairs)
        found = Reader(drops, need_rejected, bad_rows).pairs(part.files, rest)
        pairs += weighted(found, part.weight)
    if not pairs:
        raise UserError(f"{source}: no usable pairs; dropped: {drops}")
    return pairs[:limit]


class Reader:
    """Reads the files of one source. Layouts that need all records come last, in one piece."""

    def __init__(self, drops, need_rejected, bad_rows):
        self.drops, self.need_rejected, self.bad_rows = drops, need_rejected, bad_rows
        self.gathered = defaultdict(list)  # layout -> rows

    def pairs(self, files, limit):
        """The pairs of these files, at most `limit` of them."""
        pairs = []
        for where, record in self._rows(files):
            if limit is not None and len(pairs) >= limit:
                return pairs
            self.drops.read += 1
            pair = self._guarded(where, lambda: self._one(record, where))  # noqa: B023
            pairs += [pair] if pair else []
        for layout, rows in self.gathered.items():
            pairs += self._many(layout, rows)
        return pairs[:limit] if limit is not None else pairs

    def _rows(self, files):
        for file in files:
            yield from records(file, self._bad if self.bad_rows == "drop" else None)

    def _bad(self, where):
        self.drops.read += 1
        self.drops.add("broken row", where)

    def _one(self, record, where):
        layout = recognise(record, where)
        if layout.gather:
            self.gathered[layout].append((where, record))
            return None
        return to_pair(record, where, self.drops, self.need_rejected)

    def _many(self, layout, rows):
        """Pairs of a layout that sees all its rows at once."""
        for where, found in layout.gather(rows):
            if isinstance(found, str):
                self.drops.add(found, where)
                continue
            pair = self._guarded(where, lambda: self._made(found, where))  # noqa: B023
            if pair:
                yield pair

    def _made(self, fields, where):
        try:
            return make_pair(fields, where, self.need_rejected)
        except Dropped as rule:
            return self.drops.add(str(rule), where)

    def _guarded(self, where, make):
        """make(), or None for a bad row that --bad_rows drop counts."""
        try:
            return make()
        except UserError:
            if self.bad_rows == "stop":
                raise
            return self.drops.add("broken row", where)


def weighted(pairs, weight):
    """Whole parts of the weight repeat all pairs, its fraction adds a random share, in order."""
    whole, share = divmod(weight, 1)
    n = round(share * len(pairs))
    drawn = np.random.default_rng((0, len(pairs))).permutation(len(pairs))[:n]
    return pairs * int(whole) + [pairs[i] for i in sorted(drawn)]


def hold_out(pairs, n, seed):
    """Split off n random pairs for validation -> (train, held out); copies of a pair stay together.

    Raises UserError where that would leave nothing to train on.
    """
    first = list({pair.where: i for i, pair in reversed(list(enumerate(pairs)))}.values())[::-1]
    if n >= len(first):
        raise UserError(f"--eval_pairs {n} leaves nothing of {len(first)} pairs to train on")
    order = np.random.default_rng((seed, HOLD_OUT)).permutation(len(first))
    held = sorted(first[i] for i in order[:n].tolist())
    places = {pairs[i].where for i in held}
    train = [pair for pair in pairs if pair.where not in places]
    return train, [pairs[i] for i in held]
