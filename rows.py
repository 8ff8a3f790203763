"""Paths -> trie -> rows: compute each prefix once; and the plan of which pairs make up which step.

The paths of one pair share long prefixes. They are inserted into a trie of segments, the trie is
laid out in pre-order, and many tries are concatenated into one row of T tokens:

    x -+- w* - turn - l*          tokens     x  w  turn l  l  turn w
       |                          until      7  4  4    4  7  7    7
       +- l* - turn - w*          positions  0  1  2    3  1  2    3

(The averaged objective with the dialogue-turn bridge, one token per segment; * is scored.)
Attention needs one rule, which is causality, document boundaries and branch isolation at once:

    q sees k  iff  k <= q < until[k]

Legend: T row tokens, S scored tokens, B pairs of the row, P paths per pair.
"""

import heapq
from dataclasses import dataclass, field, fields
from functools import lru_cache

import numpy as np
import torch


@dataclass
class Trie:
    """The paths of one pair, laid out in pre-order; integer vectors as described in `Row`."""

    tokens: list = field(default_factory=list)
    positions: list = field(default_factory=list)
    until: list = field(default_factory=list)
    source: list = field(default_factory=list)
    label: list = field(default_factory=list)
    path: list = field(default_factory=list)

    def __len__(self):
        return len(self.tokens)


def lay_out(paths, score="tokens"):
    """Insert paths into a trie of segments and lay it out in pre-order.

    paths: list of (segments, n): segments are int arrays from the root on, and the first n tokens
    of the last one are scored. score="last" scores each path once, at its last token (for a
    reward head). Equal prefixes, compared segment by segment, are stored once. The first segment
    must not be empty: every scored token needs a token before it.
    """
    trie, children = Trie(), {}
    for p, (segments, n) in enumerate(paths):
        branches = children
        for segment in segments:
            if len(segment):
                _, branches, ends = branches.setdefault(segment.tobytes(), (segment, {}, []))
        ends.append((p, n))
    _walk(trie, children, depth=0, parent=-1, score=score)
    return trie


def _walk(trie, children, depth, parent, score):
    """Append the subtrees of one node, whose last token stands at `parent`, in pre-order."""
    for segment, branches, ends in children.values():
        start, size = len(trie), len(segment)
        trie.tokens.extend(segment.tolist())
        trie.positions.extend(range(depth, depth + size))
        trie.until.extend([0] * size)  # known once the subtree is written
        for p, n in ends:
            if score == "last":
                trie.source.append(start + size - 1)
                trie.label.append(0)
                trie.path.append(p)
            else:
                trie.source.extend([parent, *range(start, start + n - 1)][:n])
                trie.label.extend(segment[:n].tolist())
                trie.path.extend([p] * n)
        _walk(trie, branches, depth + size, start + size - 1, score)
        trie.until[start : start + size] = [len(trie)] * size


def trie_size(paths):
    """Tokens of the trie that `lay_out(paths)` would make."""
    sizes = {}
    for segments, _ in paths:
        key = ()
        for segment in segments:
            if len(segment):
                key = (*key, segment.tobytes())
                sizes[key] = len(segment)
    return sum(sizes.values())


@dataclass
class Row:
    """Several tries in one sequence.

    tokens     (T,)  ids
    positions  (T,)  distance from the root along the token's own path (for RoPE)
    until      (T,)  the index just past the token's subtree
    source     (S,)  the row index whose hidden state predicts the scored token
    label      (S,)  the id to be predicted
    path       (S,)  which conditional log-probability it adds to: pair of the row * P + path
    spans      list of (start, end), one per trie
    pairs      list of B dataset indices
    n_paths    P
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    until: torch.Tensor
    source: torch.Tensor
    label: torch.Tensor
    path: torch.Tensor
    spans: list
    pairs: list
    n_paths: int

    def to(self, device):
        """The same row with its vectors on `device`."""
        values = (getattr(self, f.name) for f in fields(self))
        return Row(*(v.to(device) if torch.is_tensor(v) else v for v in values))

    def sums(self, values):
        """(S,) values of the scored tokens -> (B, P) sums per pair and path."""
        total = values.new_zeros(len(self.pairs) * self.n_paths)
        return total.index_add(0, self.path, values).view(len(self.pairs), self.n_paths)

    def counts(self):
        """(B, P) number of scored tokens."""
        return self.sums(torch.ones_like(self.path, dtype=torch.float32))


def build_row(tries, pairs, n_paths, pad_to=0):
    """Concatenate tries; fill up to `pad_to` tokens with padding that sees only itself.

    A row without tries gets one padding token: ranks must run equally many rows (FSDP).
    """
    columns = {f.name: [] for f in fields(Trie)}
    spans, start = [], 0
    for i, trie in enumerate(tries):
        columns["tokens"] += trie.tokens
        columns["positions"] += trie.positions
        columns["until"] += [start + u for u in trie.until]
        columns["source"] += [start + s for s in trie.source]
        columns["label"] += trie.label
        columns["path"] += [i * n_paths + p for p in trie.path]
        spans.append((start, start + len(trie)))
        start += len(trie)
    padding = range(start, max(pad_to, start, 1))
    columns["tokens"] += [0] * len(padding)
    columns["positions"] += [0] * len(padding)
    columns["until"] += [k + 1 for k in padding]
    spans += [(k, k + 1) for k in padding[:1]] if not tries else []
    tensors = {name: torch.tensor(column, dtype=torch.long) for name, column in columns.items()}
    return Row(**tensors, spans=spans, pairs=list(pairs), n_paths=n_paths)


# ----------------------------------------------------------------------------- the batch plan


def pack(sizes, row_tokens, multiple=1):
    """Distribute items over as few rows as hold them, evenly: longest first, to the emptiest row.

    sizes: tokens per item. Returns a list of rows (lists of item numbers); their number is a
    multiple of `multiple` (the ranks), and no row is over `row_tokens`.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    n_rows = max(1, -(-sum(sizes) // row_tokens))
    n_rows = -(-n_rows // multiple) * multiple
    while True:
        rows = [[] for _ in range(n_rows)]
        heap = [(0, r) for r in range(n_rows)]
        for i in order:
            filled, r = heapq.heappop(heap)
            rows[r].append(i)
            heapq.heappush(heap, (filled + sizes[i], r))
        if max(filled for filled, _ in heap) <= row_tokens:
            return rows
        if n_rows >= len(sizes):
            raise ValueError(f"an item of {max(sizes)} tokens does not fit {row_tokens}")
        n_rows += multiple


@dataclass(frozen=True)
class Plan:
    """Which pairs make up step t: a pure function of (n_pairs, batch, seed, t).

    The stream of pairs is one random permutation of the dataset per epoch, end to end; step t
    takes the next `batch` of it. A last step may be smaller, so that no pair is left out.
    """

    n_pairs: int
    batch: int
    seed: int
    epochs: float
    max_steps: int | None = None

    @property
    def total(self):
        """Pairs of the whole run."""
        if self.max_steps is not None:
            return self.max_steps * self.batch
        return round(self.epochs * self.n_pairs)

    @property
    def steps(self):
        return -(-self.total // self.batch)

    def pairs(self, step):
        """Dataset indices of the pairs of this step, counted from 0."""
        stream = range(step * self.batch, min((step + 1) * self.batch, self.total))
        epochs = ((k // self.n_pairs, k % self.n_pairs) for k in stream)
        return [int(permutation(self.n_pairs, self.seed, epoch)[k]) for epoch, k in epochs]

    def epoch(self, step):
        """Passes over the dataset completed after this step, as a fraction."""
        return min((step + 1) * self.batch, self.total) / self.n_pairs


@lru_cache(maxsize=4)
def permutation(n, seed, epoch):
    """The order of the dataset in one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)
