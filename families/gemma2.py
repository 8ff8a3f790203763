"""Gemma 2: soft caps, four norms per block, a tanh GELU, and every other layer slides."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from model import FAMILIES, LLAMA_NAMES, MLP, Block, Family, layer_windows, read_llama


class Gemma2Norm(nn.RMSNorm):
    """RMSNorm whose weight is a distance from 1, computed in fp32."""

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), self.eps).to(x.dtype)


class ScaledEmbedding(nn.Embedding):
    """Token embeddings times the square root of their width (rounded to their dtype)."""

    def forward(self, tokens):
        x = super().forward(tokens)
        return x * torch.tensor(self.embedding_dim**0.5, dtype=x.dtype, device=x.device)


class GELUMLP(MLP):
    activation = staticmethod(partial(F.gelu, approximate="tanh"))


class Gemma2Block(Block):
    """Norms before and after attention and feed-forward."""

    Norm, MLP, Embedding = Gemma2Norm, GELUMLP, ScaledEmbedding

    def __init__(self, c):
        super().__init__(c)
        self.attn_post, self.mlp_post = (self.Norm(c.width, c.eps) for _ in range(2))

    def body(self, x, cos, sin, rule):
        x = x + self.attn_post(self.attn(self.attn_norm(x), cos, sin, rule))
        return x + self.mlp_post(self.mlp(self.mlp_norm(x)))


def read_gemma2(raw):
    """The first layer slides; caps, scale and head width have defaults of their own."""
    raw.get("hidden_act")  # an older spelling, which nobody reads
    return read_llama(raw, "hidden_activation", "gelu_pytorch_tanh") | {
        "head_width": raw.get("head_dim", 256),
        "windows": layer_windows(raw, lambda layer: layer % 2 == 0),
        "scale": raw.get("query_pre_attn_scalar", 256) ** -0.5,
        "attn_cap": raw.get("attn_logit_softcapping", 50.0),
        "logit_cap": raw.get("final_logit_softcapping", 30.0),
        "tied": bool(raw.get("tie_word_embeddings", True)),
    }


GEMMA2_NAMES = LLAMA_NAMES | {
    "blocks.#.attn_post": "model.layers.#.post_attention_layernorm",
    "blocks.#.mlp_norm": "model.layers.#.pre_feedforward_layernorm",
    "blocks.#.mlp_post": "model.layers.#.post_feedforward_layernorm",
}
FAMILIES["gemma2"] = Family("Gemma2", read_gemma2, GEMMA2_NAMES, Gemma2Block)
