"""What the other families do differently from Llama (layers.py), part by part.

`Block.Norm`, `.Attention`, `.MLP` and `.Embedding` are the parts that a family may swap; `BLOCKS`
names the block of each family that has its own.
"""

import torch
import torch.nn.functional as F
from torch import nn

from layers import ACTIVATIONS, MLP, Attention, Block, RMSNorm, rotate

# ----------------------------------------------------------------------------- Qwen3


class Qwen3Attention(Attention):
    """Queries and keys are normalised per head before they rotate."""

    def __init__(self, c):
        super().__init__(c)
        self.q_norm, self.k_norm = (RMSNorm(c.head_width, c.eps) for _ in range(2))

    def project(self, x):
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v


class Qwen3Block(Block):
    Attention = Qwen3Attention


# ----------------------------------------------------------------------------- Gemma 2


class Gemma2Norm(RMSNorm):
    """RMSNorm whose weight is a distance from 1, computed in fp32."""

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), self.eps).to(x.dtype)


class ScaledEmbedding(nn.Embedding):
    """Token embeddings times the square root of their width (rounded to their dtype)."""

    def forward(self, tokens):
        x = super().forward(tokens)
        return x * torch.tensor(self.embedding_dim**0.5, dtype=x.dtype, device=x.device)


class Gemma2Block(Block):
    """Norms before and after attention and feed-forward (which is gated by a tanh GELU)."""

    Norm, Embedding = Gemma2Norm, ScaledEmbedding

    def __init__(self, c):
        super().__init__(c)
        self.attn_post, self.mlp_post = (self.Norm(c.width, c.eps) for _ in range(2))

    def body(self, x, cos, sin, attend):
        x = x + self.attn_post(self.attn(self.attn_norm(x), cos, sin, attend))
        return x + self.mlp_post(self.mlp(self.mlp_norm(x)))


# ----------------------------------------------------------------------------- GPT-NeoX, Pythia


class NeoXAttention(Attention):
    """One fused projection, (q, k, v) of a head side by side; only part of a head rotates."""

    def __init__(self, c):
        nn.Module.__init__(self)
        self.head_width, self.rotary = c.head_width, c.rotary
        self.qkv = nn.Linear(c.width, 3 * c.heads * c.head_width, bias=c.qkv_bias)
        self.o = nn.Linear(c.heads * c.head_width, c.width, bias=c.out_bias)

    def project(self, x):
        qkv = self.qkv(x).unflatten(-1, (-1, 3, self.head_width))  # (B, T, H, 3, C)
        return qkv.permute(3, 0, 2, 1, 4).unbind(0)  # each (B, H, T, C)

    def place(self, x, cos, sin):
        turning, still = x[..., : self.rotary], x[..., self.rotary :]
        return torch.cat([rotate(turning, cos, sin), still], -1)


class NeoXMLP(MLP):
    """Two projections with biases and no gate."""

    def __init__(self, c):
        nn.Module.__init__(self)
        self.act = ACTIVATIONS[c.act]
        self.up, self.down = nn.Linear(c.width, c.ffn), nn.Linear(c.ffn, c.width)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class NeoXBlock(Block):
    """LayerNorm; attention and feed-forward side by side, where use_parallel_residual says so."""

    Norm, Attention, MLP = nn.LayerNorm, NeoXAttention, NeoXMLP

    def __init__(self, c):
        super().__init__(c)
        self.parallel = c.parallel

    def body(self, x, cos, sin, attend):
        if not self.parallel:
            return super().body(x, cos, sin, attend)
        return x + self.attn(self.attn_norm(x), cos, sin, attend) + self.mlp(self.mlp_norm(x))


BLOCKS = {
    "qwen3": Qwen3Block,
    "gemma2": Gemma2Block,
    "gpt_neox": NeoXBlock,
    "gpt_neox_reward_model": NeoXBlock,
}
