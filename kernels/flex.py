"""Computes a row's attention by FlexAttention: one fused CUDA kernel under a block mask.

Blocks of the row in which nobody sees anybody are skipped, and no T x T matrix comes to be. It
wants rows of one length, has no backward on a CPU, and gives model.plain_attention's values.
"""

from functools import cache, partial

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from model import sees, soft_cap


def attend(row, config):
    """One attention rule per layer; layers of the same window share their block mask."""
    kernel = _compiled() if row.tokens.is_cuda else flex_attention
    known = {"scale": config.scale, "score_mod": _capped(config.attn_cap), "enable_gqa": True}
    masks = {window: _block_mask(row, window) for window in set(config.windows)}
    return [partial(kernel, block_mask=masks[window], **known) for window in config.windows]


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
