"""Who sees whom: the attention rules of rows, one callable per layer, (q, k, v) -> y.

A row's one rule (rows.sees) is computed chain by chain: a chain of a trie is a run of tokens
without a branching, and sees the chains above it whole and itself causally. So no mask is as large
as a row, and nothing is computed between the branches of a long trie; a short one is computed
whole, which costs less than several small calls. On CUDA FlexAttention takes the rule as a block
mask over the row.

Legend: T tokens (queries), U keys, H heads, K key/value heads, C head width.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from rows import sees

# ----------------------------------------------------------------------------- kernels


def soft_cap(x, cap):
    """cap * tanh(x / cap), which keeps x within (-cap, cap); x itself where there is no cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


def attention(q, k, v, mask, scale=None, cap=None):
    """Attention; spelt out where SDPA cannot (soft cap) or has a slow backward: in bf16 on a CPU,
    up to 1,024 keys (docs/performance.md).

    q: (B, H, T, C), k, v: (B, K, U, C), mask: (T, U) or (B, 1, T, U) bool -> (B, H, T, C).
    """
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and mask.shape[-1] <= 1024
    if cap is not None or (slow and q.requires_grad):
        return spelt_out(q, k, v, mask, scale, cap)
    if q.is_cuda:  # there, no kernel but the one that keeps all scores takes fewer key heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def spelt_out(q, k, v, mask, scale=None, cap=None):
    """softmax(cap tanh(q k^T scale / cap)) v, where the (H, T, U) probabilities are kept.

    Shapes as in `attention`. The heads that share a key head are the rows of one matrix product.
    """
    (batch, heads, size, width), groups = q.shape, k.shape[1]
    scale = width**-0.5 if scale is None else scale
    grouped = (q * scale).reshape(batch, groups, -1, width)  # (B, K, H/K T, C)
    scores = soft_cap(grouped @ k.mT, cap).view(batch, heads, size, -1)  # (B, H, T, U)
    hidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    weights = (scores + hidden).softmax(-1).view(batch, groups, -1, k.shape[2])
    return (weights @ v).view(batch, heads, size, v.shape[-1])


# ----------------------------------------------------------------------------- rules

eager = torch.compiler.disable  # pieces are other ones in every row: each would be compiled anew


@dataclass
class Dense:
    """Attention under one boolean mask (…, T query, U key)."""

    mask: torch.Tensor
    scale: float | None = None  # None: 1 / sqrt(C)
    cap: float | None = None  # soft cap of the scores

    def __call__(self, q, k, v):
        return attention(q, k, v, self.mask, self.scale, self.cap)


class Piece(NamedTuple):
    """What some neighbouring queries see."""

    parts: list  # numbers of the parts of the keys
    mask: torch.Tensor  # (T, U) bool: and what of these


@dataclass
class Pieces:
    """Attention piece by piece.

    Pieces cover the queries in order, but for padding behind them. (Keys are split once: every
    slice of its own would bring a gradient as long as the row.)
    """

    pieces: list
    key_sizes: list  # tokens of each part of the keys
    scale: float | None = None
    cap: float | None = None

    @eager
    def __call__(self, q, k, v):
        sizes = [len(piece.mask) for piece in self.pieces]
        *queries, padding = q.split([*sizes, q.shape[2] - sum(sizes)], 2)
        keys, values = k.split(self.key_sizes, 2), v.split(self.key_sizes, 2)
        out = []
        for x, (parts, mask) in zip(queries, self.pieces, strict=True):
            seen = (joined([y[part] for part in parts]) for y in (keys, values))
            out.append(attention(x, *seen, mask, self.scale, self.cap))
        return torch.cat([*out, padding], 2)  # padding's own values reach nobody


def joined(parts):
    """Parts of (B, K, T, C) behind each other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


@dataclass
class Flex:
    """FlexAttention under a block mask; compiled, so that CUDA never sees a T x T matrix."""

    block_mask: object
    scale: float | None = None
    score_mod: object = None

    def __call__(self, q, k, v):
        kernel = compiled_flex() if q.is_cuda else flex_attention
        options = {"block_mask": self.block_mask, "scale": self.scale, "enable_gqa": True}
        return kernel(q, k, v, score_mod=self.score_mod, **options)


@cache
def compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


@cache
def _capped(cap):
    """FlexAttention's score_mod for a soft cap: one function per cap, so one compilation."""
    return None if cap is None else lambda score, b, h, q, k: soft_cap(score, cap)


@dataclass
class Recording:
    """A rule that also keeps the keys and values of some of the tokens."""

    rule: Pieces
    kept: torch.Tensor  # (T,) bool

    @eager
    def __call__(self, q, k, v):
        self.keys, self.values = k[:, :, self.kept], v[:, :, self.kept]
        return self.rule(q, k, v)


@dataclass
class Behind:
    """A rule whose tokens stand behind recorded keys and values."""

    rule: Pieces
    stored: Recording

    @eager
    def __call__(self, q, k, v):
        keys, values = ((self.stored.keys, k), (self.stored.values, v))
        return self.rule(q, torch.cat(keys, 2), torch.cat(values, 2))


# ----------------------------------------------------------------------------- rules of a row


def row_attention(row, c, kind):
    """One attention rule per layer of Config c; layers of the same window share it.

    kind: "flex" or "sdpa".
    """
    if kind == "flex":
        capped = _capped(c.attn_cap)
        rules = {w: Flex(_block_mask(row, w), c.scale, capped) for w in set(c.windows)}
        return [rules[window] for window in c.windows]
    return in_pieces(row, c, torch.ones_like(row.tokens, dtype=torch.bool))


def _block_mask(row, window):
    """The attention rule as a FlexAttention block mask over the whole row."""
    until, positions, size = row.until, row.positions, len(row.tokens)

    def rule(b, h, q, k):
        return sees(q, k, until, positions, window)

    return create_block_mask(rule, None, None, size, size, device=row.tokens.device)


def in_pieces(row, c, asking, stored=None):
    """One rule of Pieces per layer for the `asking` tokens of a row, (T,) bool.

    Keys are the `stored` tokens of the row, if any, and behind them the asking ones.
    """
    found = {window: _pieces(row, window, asking, stored) for window in set(c.windows)}
    return [Pieces(*found[window], c.scale, c.attn_cap) for window in c.windows]


def _pieces(row, window, asking, stored):
    """(one piece per chain that has asking tokens, sizes of the parts of the keys).

    Parts are what each of n chains has of the stored tokens, then what each has of the asking ones,
    then padding: all (tokens of the part,) places in the row.
    """
    chains, parts = row.chains, []
    for kind in (asking,) if stored is None else (stored, asking):
        places = kind.nonzero()[:, 0]
        before = F.pad(kind.cumsum(0), (1, 0)).tolist()  # how many of this kind before a token
        parts += [places[before[start] : before[end]] for (start, end), _ in chains]
    padding = places[before[row.spans[-1][1]] :]  # asking, behind the last trie
    n, number = len(chains), {chain: i for i, (chain, _) in enumerate(chains)}
    found = []
    for i, (chain, above) in enumerate(chains):
        if len(queries := parts[i - n]):  # the last n are of the asking tokens
            path = [number[c] for c in (*above, chain)]
            seen = [first + j for first in range(0, len(parts), n) for j in path]
            seen = [j for j in seen if len(parts[j])]
            keys = torch.cat([parts[j] for j in seen])
            mask = sees(queries[:, None], keys, row.until, row.positions, window)
            found.append(Piece(seen, mask))
    return found, [len(part) for part in (*parts, padding)]


# ----------------------------------------------------------------------------- detached contexts


def split(row):
    """(T,) bools: tokens that predict a scored one, tokens that are only context to these, and all
    that the context itself sees. Tokens that nothing scored depends on are in none of them."""
    predicts = torch.zeros_like(row.tokens, dtype=torch.bool)
    predicts[row.source if len(row.source) else 0] = True  # an empty row must reach all weights
    context = ~predicts & _above(predicts, row.until)
    return predicts, context, context | _above(context, row.until)


def _above(flags, until):
    """Whether a token has a flagged one below it in its subtree."""
    count = F.pad(flags.cumsum(0), (1, 0))
    return count[until] > count[1:]
