"""The transformer: attention over rows, and scored heads.

Its blocks are Llama's (layers.py) or the family's own (variants.py), its shape comes from
families.py, its weights from weights.py; nothing here knows about ranks: train.py shards from
outside.

Legend: B batch, T tokens, S scored tokens, D width, H heads, K key/value heads, C head width,
V vocabulary.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from heads import REWARDS
from layers import Block, rope_table
from rows import visible
from variants import BLOCKS
from weights import load_weights, read_config, resolve


class Transformer(nn.Module):
    """forward(row) gives one fp32 value per scored token; logits(tokens) is the plain causal model.

    attention: "sdpa" (anywhere) or "flex" (CUDA: FlexAttention over the row's block mask).
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.attention = "sdpa"
        block = BLOCKS.get(c.family, Block)
        self.embed = block.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(block(c) for _ in range(c.n_layers))
        self.norm = block.Norm(c.width, c.eps)
        if c.head == "reward":
            self.score = REWARDS[c.score](c)
        elif not c.tied:
            self.head = nn.Linear(c.width, c.vocab, bias=False)

    @property
    def head_weight(self):
        return self.embed.weight if self.config.tied else self.head.weight  # (V, D)

    def hidden(self, tokens, positions, attend):
        """Residual stream after the last block, before the final norm.

        tokens, positions: (B, T); attend: one callable per layer, (q, k, v) -> y, all
        (B, heads, T, C). Returns (B, T, D).
        """
        x = self.embed(tokens)  # (B, T, D)
        c = self.config
        cos, sin = rope_table(c.rope, c.rotary or c.head_width, positions, x.dtype)
        for block, rule in zip(self.blocks, attend, strict=True):
            x = block(x, cos, sin, rule)
        return x

    def forward(self, row):
        """Row -> (S,) fp32: log-probabilities of the labels, or scalar rewards."""
        attend = row_attention(row, self.config, self.attention)
        x = self.hidden(row.tokens[None], row.positions[None], attend)[0]  # (T, D)
        if self.config.head == "reward":
            return self.score(self.norm(x), row)
        x = self.norm(x[row.source])  # (S, D)
        return ScoredLogps.apply(x, self.head_weight, row.label, self.config.logit_cap)

    def to_logits(self, x):
        """Residual stream after the last block (…, D) -> (…, V)."""
        return soft_cap(F.linear(self.norm(x), self.head_weight), self.config.logit_cap)

    def logits(self, tokens):
        """(B, T) ids -> (B, T, V): plain causal language model."""
        c = self.config
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        until = torch.full_like(positions[0], tokens.shape[1])
        masks = {w: visible(until, positions[0], w) for w in set(c.windows)}
        attend = [Dense(masks[w], c.scale, c.attn_cap) for w in c.windows]
        return self.to_logits(self.hidden(tokens, positions, attend))


def load(directory, dtype=torch.float32, device="cpu"):
    """HF directory -> Transformer in eval mode on one device."""
    directory = resolve(directory)
    _, config = read_config(directory)
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device)
    load_weights(model, directory)
    return model.eval().requires_grad_(False)


# ----------------------------------------------------------------------------- attention over rows


def soft_cap(x, cap):
    """cap * tanh(x / cap), which keeps x within (-cap, cap); x itself where there is no cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


@dataclass
class Dense:
    """Attention under one boolean mask (…, T query, T key)."""

    mask: torch.Tensor
    scale: float | None = None  # None: 1 / sqrt(C)
    cap: float | None = None  # soft cap of the scores

    def __call__(self, q, k, v):
        return masked_attention(q, k, v, self.mask, self.scale, self.cap)


@dataclass
class PerTrie:
    """Attention trie by trie: no row-wide mask, and no work between tries."""

    spans: list
    masks: list
    scale: float | None = None
    cap: float | None = None

    def __call__(self, q, k, v):
        parts = [
            trie_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], mask, self.scale, self.cap)
            for (a, b), mask in zip(self.spans, self.masks, strict=True)
        ]
        rest = q.shape[2] - self.spans[-1][1]  # padding: its values reach nobody
        return torch.cat([*parts, q[:, :, q.shape[2] - rest :]], 2)


def trie_attention(q, k, v, mask, scale=None, cap=None):
    """Attention, spelt out where that is twice as fast: short tries in bf16 on a CPU.

    q: (B, H, T, C), k, v: (B, K, T, C), mask: (T, T) -> (B, H, T, C).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and len(mask) <= 1024:
        return spelt_out(q, k, v, mask, scale, cap)
    return masked_attention(q, k, v, mask, scale, cap)


def masked_attention(q, k, v, mask, scale=None, cap=None):
    """SDPA, which knows no soft cap: with one, the same spelt out. Shapes as in `spelt_out`."""
    if cap is not None:
        return spelt_out(q, k, v, mask, scale, cap)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def spelt_out(q, k, v, mask, scale=None, cap=None):
    """softmax(cap tanh(q k^T scale / cap)) v, where the (H, T, U) probabilities are kept.

    q: (B, H, T, C), k, v: (B, K, U, C), mask: (T, U) or (B, 1, T, U) -> (B, H, T, C). The heads
    that share a key head are the rows of one matrix product.
    """
    (batch, heads, size, width), groups = q.shape, k.shape[1]
    scale = width**-0.5 if scale is None else scale
    grouped = (q * scale).reshape(batch, groups, -1, width)  # (B, K, H/K T, C)
    scores = soft_cap(grouped @ k.mT, cap).view(batch, heads, size, -1)  # (B, H, T, U)
    hidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    weights = (scores + hidden).softmax(-1).view(batch, groups, -1, k.shape[2])
    return (weights @ v).view(batch, heads, size, v.shape[-1])


@dataclass
class Flex:
    """FlexAttention under a block mask; compiled, so that CUDA never sees a T x T matrix."""

    block_mask: object
    scale: float | None = None
    cap: float | None = None

    def __call__(self, q, k, v):
        kernel = compiled_flex() if q.is_cuda else flex_attention
        options = {"block_mask": self.block_mask, "scale": self.scale, "enable_gqa": True}
        return kernel(q, k, v, score_mod=_capped(self.cap), **options)


@cache
def compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


@cache
def _capped(cap):
    """FlexAttention's score_mod for a soft cap: one function per cap, so one compilation."""
    return None if cap is None else lambda score, b, h, q, k: soft_cap(score, cap)


def row_attention(row, c, kind):
    """One attention rule per layer of Config c; layers of the same window share it."""
    rules = {}
    for window in set(c.windows):
        if kind == "flex":
            rules[window] = Flex(_block_mask(row, window), c.scale, c.attn_cap)
        else:
            parts = ((row.until[a:b] - a, row.positions[a:b]) for a, b in row.spans)
            masks = [visible(u, p, window) for u, p in parts]
            rules[window] = PerTrie(row.spans, masks, c.scale, c.attn_cap)
    return [rules[window] for window in c.windows]


def _block_mask(row, window):
    """The attention rule as a FlexAttention block mask over the whole row."""
    until, positions, size = row.until, row.positions, len(row.tokens)

    def sees(b, h, q, k):
        inside = (k <= q) & (q < until[k])
        return inside if window is None else inside & (positions[q] - positions[k] < window)

    return create_block_mask(sees, None, None, size, size, device=row.tokens.device)


# ----------------------------------------------------------------------------- scored head


class ScoredLogps(torch.autograd.Function):
    """log softmax(soft_cap(x W^T))[label] per scored token, a chunk of logits at a time.

    x: (S, D), weight: (V, D), label: (S,), cap: number or None -> (S,) fp32. The (S, V) matrix
    never exists: logits of a chunk are made in forward, dropped, and made again in backward.
    """

    LOGITS = 2**26  # of one chunk

    @staticmethod
    def forward(ctx, x, weight, label, cap=None):
        logps = torch.empty(len(x), device=x.device)
        logsumexp = torch.empty_like(logps)
        for part in ScoredLogps._chunks(x, weight):
            logits = soft_cap((x[part] @ weight.T).float(), cap)  # (chunk, V)
            logsumexp[part] = logits.logsumexp(-1)
            logps[part] = logits.gather(-1, label[part, None]).squeeze(-1) - logsumexp[part]
        ctx.save_for_backward(x, weight, label, logsumexp)
        ctx.cap = cap
        return logps

    @staticmethod
    def backward(ctx, grad):
        """d logp / d logits = onehot(label) - softmax; and of the cap, 1 - (capped / cap)^2."""
        x, weight, label, logsumexp = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        for part in ScoredLogps._chunks(x, weight):
            d = soft_cap((x[part] @ weight.T).float(), ctx.cap)  # (chunk, V)
            slope = None if ctx.cap is None else 1 - (d / ctx.cap) ** 2
            d.sub_(logsumexp[part, None]).exp_().mul_(-grad[part, None])
            d.scatter_add_(-1, label[part, None], grad[part, None])
            d = (d if slope is None else d.mul_(slope)).to(x.dtype)
            grad_x[part] = d @ weight
            grad_weight.addmm_(d.T, x[part])
        return grad_x, grad_weight, None, None

    @staticmethod
    def _chunks(x, weight):
        size = max(1, ScoredLogps.LOGITS // len(weight))
        return [slice(start, start + size) for start in range(0, len(x), size)]
