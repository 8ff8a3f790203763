"""Computes a row's attention by FlexAttention: one fused CUDA kernel under a block mask.

Blocks of the row in which nobody sees anybody are skipped, and no T x T matrix comes to be. It
wants rows of one length, has no backward on a CPU, and gives model.plain_attention's values.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from model import sees, soft_cap


def attend(row, config):
    """One attention rule per layer; layers of the same window share their block mask."""
    masks = {window: _block_mask(row, window) for window in set(config.windows)}
    capped = _capped(config.attn_cap)
    return [Flex(masks[window], config.scale, capped) for window in config.windows]


@dataclass
class Flex:
    """Attention of one layer: q (B, H, T, C), k and v (B, K, T, C) -> (B, H, T, C)."""

    block_mask: object
    scale: float | None
    score_mod: object

    def __call__(self, q, k, v):
        kernel = _compiled() if q.is_cuda else flex_attention
        options = {"block_mask": self.block_mask, "scale": self.scale, "enable_gqa": True}
        return kernel(q, k, v, score_mod=self.score_mod, **options)


@cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False)


@cache
def _capped(cap):
    """FlexAttention's score_mod for a soft cap: one function per cap, so one compilation."""
    return None if cap is None else lambda score, b, h, q, k: soft_cap(score, cap)


def _block_mask(row, window):
    until, positions, size = row.until, row.positions, len(row.tokens)

    def rule(b, h, q, k):
        return sees(q, k, until, positions, window)

    return create_block_mask(rule, None, None, size, size, device=row.tokens.device)
