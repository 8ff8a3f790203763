"""A Llama-style transformer: blocks, attention over rows, scored heads.

Its shape comes from families.py, its weights from weights.py; nothing here knows about ranks:
train.py shards from outside.

Legend: B batch, T tokens, S scored tokens, D width, H heads, K key/value heads, C head width,
F feed-forward width, V vocabulary.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from rows import visible
from weights import load_weights, read_config, resolve

# ----------------------------------------------------------------------------- layers


def rope_table(rope, head_width, positions, dtype):
    """cos and sin of every position, (…, T, C), in transformers' half-split layout.

    Llama 3.1 (rope_type "llama3"): slow frequencies are divided by `factor`, fast ones kept, those
    between blended, so that 8k of pre-training reach 128k.
    """
    exponent = torch.arange(0, head_width, 2, device=positions.device).float() / head_width
    freq = 1.0 / rope["rope_theta"] ** exponent  # (C/2,)
    if rope["rope_type"] == "linear":
        freq = freq / rope["factor"]
    elif rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / rope["factor"]
    angles = positions[..., None].float() * freq  # (…, T, C/2)
    angles = torch.cat([angles, angles], -1)  # (…, T, C)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotary position embedding. x: (B, H, T, C); cos, sin: (B, T, C)."""
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention; who sees whom is decided by `attend`, handed in from outside."""

    def __init__(self, c):
        super().__init__()
        self.head_width = c.head_width
        self.q = nn.Linear(c.width, c.heads * c.head_width, bias=c.qkv_bias)
        self.k = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.qkv_bias)
        self.v = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.qkv_bias)
        self.o = nn.Linear(c.heads * c.head_width, c.width, bias=c.out_bias)

    def forward(self, x, cos, sin, attend):
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (B, H or K, T, C)
            for proj in (self.q, self.k, self.v)
        )
        y = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)  # (B, H, T, C)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c):
        super().__init__()
        self.gate = nn.Linear(c.width, c.ffn, bias=False)
        self.up = nn.Linear(c.width, c.ffn, bias=False)
        self.down = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm attention and feed-forward; `recompute` saves only its input for backward."""

    def __init__(self, c):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(c.width, c.eps), Attention(c)
        self.mlp_norm, self.mlp = RMSNorm(c.width, c.eps), MLP(c)
        self.recompute = False

    def forward(self, x, cos, sin, attend):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.body, x, cos, sin, attend, use_reentrant=False)
        return self.body(x, cos, sin, attend)

    def body(self, x, cos, sin, attend):
        x = x + self.attn(self.attn_norm(x), cos, sin, attend)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """forward(row) gives one fp32 value per scored token; logits(tokens) is the plain causal model.

    attention: "sdpa" (anywhere) or "flex" (CUDA: FlexAttention over the row's block mask).
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.attention = "sdpa"
        self.embed = nn.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = RMSNorm(c.width, c.eps)
        if c.head == "reward":
            self.score = nn.Linear(c.width, 1, bias=False)
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
        cos, sin = rope_table(self.config.rope, self.config.head_width, positions, x.dtype)
        for block, rule in zip(self.blocks, attend, strict=True):
            x = block(x, cos, sin, rule)
        return x

    def forward(self, row):
        """Row -> (S,) fp32: log-probabilities of the labels, or scalar rewards."""
        attend = row_attention(row, self.config.windows, self.attention)
        x = self.hidden(row.tokens[None], row.positions[None], attend)[0]  # (T, D)
        x = self.norm(x[row.source])  # (S, D)
        if self.config.head == "reward":
            return F.linear(x.float(), self.score.weight.float()).squeeze(-1)  # bf16 would tie
        return ScoredLogps.apply(x, self.head_weight, row.label)

    def logits(self, tokens):
        """(B, T) ids -> (B, T, V): plain causal language model."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        until = torch.full_like(positions[0], tokens.shape[1])
        masks = {w: visible(until, positions[0], w) for w in set(self.config.windows)}
        attend = [Dense(masks[w]) for w in self.config.windows]
        return F.linear(self.norm(self.hidden(tokens, positions, attend)), self.head_weight)


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


class Dense:
    """SDPA under one boolean mask (…, T query, T key)."""

    def __init__(self, mask):
        self.mask = mask

    def __call__(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)


class PerTrie:
    """Attention trie by trie: no row-wide mask, and no work between tries."""

    def __init__(self, spans, masks):
        self.spans, self.masks = spans, masks

    def __call__(self, q, k, v):
        parts = [
            trie_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], mask)
            for (a, b), mask in zip(self.spans, self.masks, strict=True)
        ]
        rest = q.shape[2] - self.spans[-1][1]  # padding: its values reach nobody
        return torch.cat([*parts, q[:, :, q.shape[2] - rest :]], 2)


def trie_attention(q, k, v, mask):
    """SDPA, or the same spelt out where that is twice as fast: short tries in bf16 on a CPU.

    q: (1, H, T, C), k, v: (1, K, T, C), mask: (T, T). Spelt out, the heads that share a key head
    are the rows of one matrix product, and the (H, T, T) probabilities are kept for backward.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or len(mask) > 1024:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    (_, heads, size, width), groups = q.shape, k.shape[1]
    grouped = (q * width**-0.5).reshape(groups, -1, width)  # (K, H/K T, C)
    scores = (grouped @ k[0].mT).view(groups, -1, size, size)  # (K, H/K, T, T)
    hidden = torch.zeros(size, size, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    weights = (scores + hidden).softmax(-1).view(groups, -1, size)  # (K, H/K T, T)
    return (weights @ v[0]).view(1, heads, size, width)


class Flex:
    """FlexAttention under a block mask; compiled, so that CUDA never sees a T x T matrix."""

    def __init__(self, block_mask):
        self.block_mask = block_mask

    def __call__(self, q, k, v):
        kernel = compiled_flex() if q.is_cuda else flex_attention
        return kernel(q, k, v, block_mask=self.block_mask, enable_gqa=True)


@cache
def compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def row_attention(row, windows, kind):
    """One attention rule per layer; layers of the same window share it."""
    rules = {}
    for window in set(windows):
        if kind == "flex":
            rules[window] = Flex(_block_mask(row, window))
        else:
            parts = ((row.until[a:b] - a, row.positions[a:b]) for a, b in row.spans)
            rules[window] = PerTrie(row.spans, [visible(u, p, window) for u, p in parts])
    return [rules[window] for window in windows]


def _block_mask(row, window):
    """The attention rule as a FlexAttention block mask over the whole row."""
    until, positions, size = row.until, row.positions, len(row.tokens)

    def sees(b, h, q, k):
        inside = (k <= q) & (q < until[k])
        return inside if window is None else inside & (positions[q] - positions[k] < window)

    return create_block_mask(sees, None, None, size, size, device=row.tokens.device)


# ----------------------------------------------------------------------------- scored head


class ScoredLogps(torch.autograd.Function):
    """log softmax(x W^T)[label] per scored token, a chunk of logits at a time.

    x: (S, D), weight: (V, D), label: (S,) -> (S,) fp32. The (S, V) matrix never exists: logits of
    a chunk are made in forward, dropped, and made again in backward.
    """

    LOGITS = 2**26  # of one chunk

    @staticmethod
    def forward(ctx, x, weight, label):
        logps = torch.empty(len(x), device=x.device)
        logsumexp = torch.empty_like(logps)
        for part in ScoredLogps._chunks(x, weight):
            logits = (x[part] @ weight.T).float()  # (chunk, V)
            logsumexp[part] = logits.logsumexp(-1)
            logps[part] = logits.gather(-1, label[part, None]).squeeze(-1) - logsumexp[part]
        ctx.save_for_backward(x, weight, label, logsumexp)
        return logps

    @staticmethod
    def backward(ctx, grad):
        """d logp / d logits = onehot(label) - softmax."""
        x, weight, label, logsumexp = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        for part in ScoredLogps._chunks(x, weight):
            d = (x[part] @ weight.T).float()  # (chunk, V)
            d.sub_(logsumexp[part, None]).exp_().mul_(-grad[part, None])
            d.scatter_add_(-1, label[part, None], grad[part, None])
            d = d.to(x.dtype)
            grad_x[part] = d @ weight
            grad_weight.addmm_(d.T, x[part])
        return grad_x, grad_weight, None

    @staticmethod
    def _chunks(x, weight):
        size = max(1, ScoredLogps.LOGITS // len(weight))
        return [slice(start, start + size) for start in range(0, len(x), size)]
