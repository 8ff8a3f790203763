"""Computes a row's attention chain by chain: what model.plain_attention does, without a T x T mask.

A chain is a run of tokens of a trie without a branching. Its tokens see the chains above it whole
and their own chain up to themselves, so its queries need the keys of one path alone:

    x -+- w -- l         chains x, w l, l w; the queries of chain (l w) meet the keys of (x, l w)
       +- l -- w

So no mask is as large as a row, and no score is computed between the branches of a long trie.

Legend: B batch, T queries, U keys, H heads, K key/value heads, C head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import masked_attention, sees

SHORT = 256  # tokens; a shorter trie is computed whole, which costs less than several small calls


def attend(row, config, asking=None, stored=None):
    """One attention rule per layer; layers of the same window share their masks.

    asking: (T,) bool, the tokens of the row whose queries come (default: all); their keys and
    values lie behind those of the `stored` tokens, if there are any (kernels/detached.py).
    """
    asking = torch.ones_like(row.tokens, dtype=torch.bool) if asking is None else asking
    found = {window: _pieces(row, window, asking, stored) for window in set(config.windows)}
    return [Chains(*found[window], config.scale, config.attn_cap) for window in config.windows]


@dataclass
class Chains:
    """Attention of one layer, chain by chain.

    pieces  (parts, mask) per chain of queries, in the row's order: which parts of the keys its
            path consists of, and (T, U) bool, what it sees of them
    sizes   tokens of each part of the keys
    """

    pieces: list
    sizes: list
    scale: float | None = None
    cap: float | None = None

    @torch.compiler.disable  # chains differ from row to row: each would be compiled anew
    def __call__(self, q, k, v):
        """(B, H, T, C) queries, (B, K, U, C) keys and values -> (B, H, T, C)."""
        lengths = [len(mask) for _, mask in self.pieces]
        *queries, padding = q.split([*lengths, q.shape[2] - sum(lengths)], 2)
        # keys are split once: a slice per chain would bring each a gradient as long as the row
        keys, values = k.split(self.sizes, 2), v.split(self.sizes, 2)
        out = []
        for x, (parts, mask) in zip(queries, self.pieces, strict=True):
            seen = (_joined([y[part] for part in parts]) for y in (keys, values))
            out.append(fast_attention(x, *seen, mask, self.scale, self.cap))
        return torch.cat([*out, padding], 2)  # what padding gets reaches nobody


def _joined(parts):
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def fast_attention(q, k, v, mask, scale=None, cap=None):
    """masked_attention by torch's own kernel, where it has one that is not slow."""
    # its bf16 backward on a CPU is slow up to 1,024 keys (docs/performance.md)
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and mask.shape[-1] <= 1024
    if cap is not None or (slow and q.requires_grad):
        return masked_attention(q, k, v, mask, scale, cap)
    if q.is_cuda:  # there, with fewer key heads only the kernel that keeps all scores would run
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


# ----------------------------------------------------------------------------- the chains of a row


def _pieces(row, window, asking, stored):
    """The `pieces` and `sizes` of Chains.

    Keys come in parts: of each of the n chains its stored tokens, then of each its asking ones,
    then padding. A part holds places in the row, (tokens of the part,).
    """
    chains, parts = row_chains(row), []
    for kind in (asking,) if stored is None else (stored, asking):
        places = kind.nonzero()[:, 0]
        before = F.pad(kind.cumsum(0), (1, 0)).tolist()  # how many of this kind before a token
        parts += [places[before[start] : before[end]] for (start, end), _ in chains]
    padding = places[before[row.spans[-1][1]] :]  # asking, behind the last trie
    n, number = len(chains), {chain: i for i, (chain, _) in enumerate(chains)}
    pieces = []
    for i, (chain, above) in enumerate(chains):
        if len(queries := parts[i - n]):  # the last n are of the asking tokens
            path = [number[c] for c in (*above, chain)]
            seen = [first + j for first in range(0, len(parts), n) for j in path]
            seen = [j for j in seen if len(parts[j])]
            keys = torch.cat([parts[j] for j in seen])
            pieces.append((seen, sees(queries[:, None], keys, row.until, row.positions, window)))
    return pieces, [len(part) for part in (*parts, padding)]


def row_chains(row):
    """[((start, end) of a chain, the chains above it)] of all tries of a row, in its order."""
    until, found = row.until.tolist(), []
    for start, end in row.spans:
        short = end - start <= SHORT
        found += [((start, end), ())] if short else _chains(until, start, end)
    return found


def _chains(until, start, end, above=()):
    """Yield the chains of the subtrie that lies at start:end of the row, in pre-order."""
    stop = next((i for i in range(start, end) if until[i] != end), end)  # where it branches
    yield (start, stop), above
    above = (*above, (start, stop))
    while stop < end:
        yield from _chains(until, stop, until[stop], above)
        stop = until[stop]
