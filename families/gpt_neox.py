"""GPT-NeoX and Pythia: LayerNorm, biases everywhere, a plain MLP, and part of a head rotates."""

from functools import partial

import torch.nn.functional as F
from torch import nn

from model import FAMILIES, MLP, Attention, Block, Family, biases

TANH = partial(F.gelu, approximate="tanh")  # configs have three names for it
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": TANH, "gelu_fast": TANH, "gelu_pytorch_tanh": TANH}


class NeoXAttention(Attention):
    """One fused projection, (q, k, v) of a head side by side."""

    def __init__(self, c):
        nn.Module.__init__(self)
        self.head_width = c.head_width
        self.qkv = nn.Linear(c.width, 3 * c.heads * c.head_width, bias=c.qkv_bias)
        self.o = nn.Linear(c.heads * c.head_width, c.width, bias=c.out_bias)

    def project(self, x):
        qkv = self.qkv(x).unflatten(-1, (-1, 3, self.head_width))  # (B, T, H, 3, C)
        return qkv.permute(3, 0, 2, 1, 4).unbind(0)  # each (B, H, T, C)


class NeoXMLP(MLP):
    """Two projections with biases and no gate."""

    def __init__(self, c):
        nn.Module.__init__(self)
        self.activation = ACTIVATIONS[c.own["act"]]
        self.up, self.down = nn.Linear(c.width, c.ffn), nn.Linear(c.ffn, c.width)

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class NeoXBlock(Block):
    """Attention and feed-forward side by side, where use_parallel_residual says so."""

    Norm, Attention, MLP = nn.LayerNorm, NeoXAttention, NeoXMLP

    def __init__(self, c):
        super().__init__(c)
        self.parallel = c.own["parallel"]

    def body(self, x, cos, sin, rule):
        if not self.parallel:
            return super().body(x, cos, sin, rule)
        return x + self.attn(self.attn_norm(x), cos, sin, rule) + self.mlp(self.mlp_norm(x))


def read_neox(raw):
    """Its rotary settings and norms have names of their own."""
    parallel = bool(raw.get("use_parallel_residual", True))
    return biases(raw, True) | {
        "rope": raw.rope("rotary_emb_base", raw.get("rotary_pct", 0.25)),
        "eps": raw.get("layer_norm_eps", 1e-5),
        "head_width": raw.need("hidden_size") // raw.need("num_attention_heads"),
        "own": {"act": raw.one_of("hidden_act", *ACTIVATIONS), "parallel": parallel},
    }


NEOX_NAMES = {
    "embed": "gpt_neox.embed_in",
    "norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
    "score": "score",
    "blocks.#.attn_norm": "gpt_neox.layers.#.input_layernorm",
    "blocks.#.mlp_norm": "gpt_neox.layers.#.post_attention_layernorm",
    "blocks.#.attn.qkv": "gpt_neox.layers.#.attention.query_key_value",
    "blocks.#.attn.o": "gpt_neox.layers.#.attention.dense",
    "blocks.#.mlp.up": "gpt_neox.layers.#.mlp.dense_h_to_4h",
    "blocks.#.mlp.down": "gpt_neox.layers.#.mlp.dense_4h_to_h",
}
FAMILIES["gpt_neox"] = Family("GPTNeoX", read_neox, NEOX_NAMES, NeoXBlock)
