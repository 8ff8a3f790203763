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
    kernel = _kernel(row.tokens.is_cuda, config.attn_cap)
    masks = {window: _block_mask(row, window) for window in set(config.windows)}
    return [partial(kernel, block_mask=masks[w], scale=config.scale) for w in config.windows]


@cache
def _kernel(cuda, cap):
    """FlexAttention under a soft cap: one function per cap, so one compilation."""
    kernel = torch.compile(flex_attention, dynamic=False) if cuda else flex_attention
    capped = None if cap is None else lambda score, b, h, q, k: soft_cap(score, cap)
    return partial(kernel, score_mod=capped, enable_gqa=True)


def _block_mask(row, window):
    until, positions, size = row.until, row.positions, len(row.tokens)

    def rule(b, h, q, k):
        return sees(q, k, until, positions, window)

    return create_block_mask(rule, None, None, size, size, device=row.tokens.device)
