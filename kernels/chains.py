"""Computes a row's attention chain by chain: what model.plain_attention does, without a T x T mask.

A chain is a run of tokens of a trie without a branching. Its tokens see the chains above it whole
and their own up to themselves, so its queries need the keys of one path alone:

    x -+- w -- l      three chains: x, (w l), (l w); the queries of (l w) meet the keys of x, (l w)
       +- l -- w

So no mask is as large as a row, and no score is computed between the branches of a long trie.

Legend: B batch, T queries, U keys, H heads, K key/value heads, C head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import masked_attention, sees

SHORT = 256  # tokens; a shorter trie is computed whole, which costs less than several small calls
# cuDNN's attention, which SDPA prefers on Hopper, plans 0.4 s for each new shape: here all are new
torch.backends.cuda.enable_cudnn_sdp(False)


def attend(row, config, *kinds):
    """One attention rule per layer; layers of the same window share their masks.

    kinds: (T,) bools, the tokens of the row whose keys and values come, one kind behind the other;
    queries come of the last (kernels/detached.py). Default: one kind, which is all tokens.
    """
    kinds = kinds or [torch.ones_like(row.tokens, dtype=torch.bool)]
    found = {window: _pieces(row, window, kinds) for window in set(config.windows)}
    return [Chains(*found[window], config.scale, config.attn_cap) for window in config.windows]


@dataclass
class Chains:
    """Attention of one layer, chain by chain.

    pieces  per chain, in the row's order: which parts of the keys make up its path, and the mask
            of its queries over these, (T, U) bool
    sizes   tokens of each part of the keys
    keep    (T,) bool, of which tokens a call leaves keys and values in `kept`
    before  keys and values that come before those of a call (both for kernels/detached.py)
    """

    pieces: list
    sizes: list
    scale: float | None = None
    cap: float | None = None
    keep: torch.Tensor | None = None
    before: tuple | None = None

    @torch.compiler.disable  # chains differ from row to row: each would be compiled anew
    def __call__(self, q, k, v):
        """(B, H, T, C) queries, (B, K, U, C) keys and values -> (B, H, T, C)."""
        if self.keep is not None:
            self.kept = k[:, :, self.keep], v[:, :, self.keep]
        if self.before is not None:
            k, v = (torch.cat(both, 2) for both in zip(self.before, (k, v), strict=True))
        lengths = [len(mask) for _, mask in self.pieces]
        *queries, padding = q.split([*lengths, q.shape[2] - sum(lengths)], 2)
        # keys are split once: a slice per chain would bring each a gradient as long as the row
        keys, values = k.split(self.sizes, 2), v.split(self.sizes, 2)
        out = []
        for x, (path, mask) in zip(queries, self.pieces, strict=True):
            seen = ([y[part] for part in path] for y in (keys, values))
            seen = (torch.cat(parts, 2) if len(parts) > 1 else parts[0] for parts in seen)
            out.append(fast_attention(x, *seen, mask, self.scale, self.cap))
        return torch.cat([*out, padding], 2)  # what padding gets reaches nobody


def fast_attention(q, k, v, mask, scale=None, cap=None):
    """masked_attention by torch's own kernel, where it has one that is not slow."""
    # its bf16 backward on a CPU is slow up to 1,024 keys (docs/performance.md)
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and mask.shape[-1] <= 1024
    if cap is not None or (slow and q.requires_grad):
        return masked_attention(q, k, v, mask, scale, cap)
    grouped = q.shape[1] != k.shape[1]
    if q.is_cuda and grouped:  # there only the kernel that keeps all scores would run
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)


def _pieces(row, window, kinds):
    """The `pieces` and `sizes` of Chains. kinds: as of `attend`; queries are of the last.

    Of keys there is one part per kind and chain, kind by kind, and last the padding. While they
    are put together a part is its places in the row, (tokens of the part,).
    """
    chains, parts = row_chains(row), []
    for kind in kinds:
        places = kind.nonzero()[:, 0]
        before = F.pad(kind.cumsum(0), (1, 0)).tolist()  # how many of this kind before a token
        parts += [places[before[start] : before[end]] for start, end in chains]
    padding = places[before[row.spans[-1][1]] :]  # of the last kind, behind the last trie
    until, n, pieces = row.until.tolist(), len(chains), []
    for i, (first, _) in enumerate(chains):
        if len(queries := parts[i - n]):  # the last n are of the last kind
            above = [j for j in range(i + 1) if until[chains[j][0]] > first]  # and itself
            path = [j + n * kind for kind in range(len(kinds)) for j in above]
            path = [part for part in path if len(parts[part])]
            keys = torch.cat([parts[j] for j in path])
            pieces.append((path, sees(queries[:, None], keys, row.until, row.positions, window)))
    return pieces, [len(part) for part in (*parts, padding)]


def row_chains(row):
    """[(start, end)] of the chains of all tries of a row, in its order; a short trie is one."""
    until, starts = row.until.tolist(), []
    for start, end in row.spans:
        inside = range(start + 1, end) if end - start > SHORT else ()
        # a token that does not end where the one before it does begins a branch
        starts += [start, *(i for i in inside if until[i] != until[i - 1])]
    return list(zip(starts, [*starts[1:], row.spans[-1][1]], strict=True))
