"""The layers of a Llama: rotary positions, RMSNorm, attention, SwiGLU, and the block of them.

The other families are what variants.py changes here; who reads Llama need not read that.

Legend: B batch, T tokens, D width, H heads, K key/value heads, C head width, F feed-forward width.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def rope_table(rope, width, positions, dtype):
    """cos and sin of every position, (…, T, C/2).

    width: the C dimensions of a head that rotate. Llama 3.1 (rope_type "llama3"): slow frequencies
    are divided by `factor`, fast ones kept, those between blended, so that 8k of pre-training
    reach 128k.
    """
    exponent = torch.arange(0, width, 2, device=positions.device).float() / width
    freq = 1.0 / rope["rope_theta"] ** exponent  # (C/2,)
    if rope["rope_type"] == "linear":
        freq = freq / rope["factor"]
    elif rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / rope["factor"]
    angles = positions[..., None].float() * freq  # (…, T, C/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotary position embedding. x: (B, H, T, C); cos, sin: (B, T, C/2).

    The pairs that turn are, as in transformers, one number of the first half of a head and the one
    at its place in the second.
    """
    (a, b), cos, sin = x.chunk(2, -1), cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


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

    def project(self, x):
        """(B, T, D) -> q, k, v, each (B, H or K, T, C)."""
        return (
            proj(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for proj in (self.q, self.k, self.v)
        )

    def place(self, x, cos, sin):
        """Queries or keys with their positions in them."""
        return rotate(x, cos, sin)

    def forward(self, x, cos, sin, attend):
        q, k, v = self.project(x)
        y = attend(self.place(q, cos, sin), self.place(k, cos, sin), v)  # (B, H, T, C)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU, or the same with another activation."""

    def __init__(self, c):
        super().__init__()
        self.act = ACTIVATIONS[c.act]
        self.gate = nn.Linear(c.width, c.ffn, bias=False)
        self.up = nn.Linear(c.width, c.ffn, bias=False)
        self.down = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm attention and feed-forward; `recompute` saves only its input for backward."""

    Norm, Attention, MLP, Embedding = RMSNorm, Attention, MLP, nn.Embedding  # a family's parts

    def __init__(self, c):
        super().__init__()
        self.attn_norm, self.attn = self.Norm(c.width, c.eps), self.Attention(c)
        self.mlp_norm, self.mlp = self.Norm(c.width, c.eps), self.MLP(c)
        self.recompute = False

    def forward(self, x, cos, sin, attend):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.body, x, cos, sin, attend, use_reentrant=False)
        return self.body(x, cos, sin, attend)

    def body(self, x, cos, sin, attend):
        x = x + self.attn(self.attn_norm(x), cos, sin, attend)
        return x + self.mlp(self.mlp_norm(x))
