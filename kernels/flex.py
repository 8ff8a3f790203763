"""Computes a row's attention by FlexAttention: one fused CUDA kernel under a block mask.

Blocks of the row in which nobody sees anybody are skipped, and no T x T matrix comes to be. It is
compiled for each length of rows, so these come in few (`pack_alike`). It has no backward on a CPU,
and gives model.plain_attention's values.
"""

from functools import cache, partial

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from data import pack, spread_items
from model import sees, soft_cap


def attend(row, config):
    """One attention rule per layer; layers of the same window share their block mask."""
    kernel = _kernel(row.tokens.is_cuda, config.attn_cap)
    masks = {window: _block_mask(row, window) for window in set(config.windows)}
    return [partial(kernel, block_mask=masks[w], scale=config.scale) for w in config.windows]


@cache
def _kernel(cuda, cap):
    """FlexAttention under a soft cap: one function per cap, so one compilation."""
    torch._dynamo.config.recompile_limit = 128  # over 8, its default, all would run op by op
    kernel = torch.compile(flex_attention, dynamic=False) if cuda else flex_attention
    capped = None if cap is None else lambda score, b, h, q, k: soft_cap(score, cap)
    return partial(kernel, score_mod=capped, enable_gqa=True)


def _block_mask(row, window):
    until, positions, size = row.until, row.positions, len(row.tokens)

    def rule(b, h, q, k):
        return sees(q, k, until, positions, window)

    return create_block_mask(rule, None, None, size, size, device=row.tokens.device)


def pack_alike(sizes, row_tokens, multiple=1):
    """As data.pack, for rows of one length -> (rows, the length to which all are to be padded).

    There are 8 lengths per power of two, multiples of 128. Up to two more rows per rank (of
    `multiple`) are taken where fewer tokens are padding then.
    """
    fewest, options = len(pack(sizes, row_tokens, multiple)), []
    for n_rows in range(fewest, fewest + 3 * multiple, multiple):
        rows, longest = spread_items(sizes, n_rows)
        step = max(128, 2 ** (max(longest - 1, 0).bit_length() - 4))
        length = min(-(-max(longest, 1) // step) * step, row_tokens)
        options.append((n_rows * length, rows, length))
    _, rows, length = min(options, key=lambda option: option[0])
    return rows, length
