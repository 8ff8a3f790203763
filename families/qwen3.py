"""Qwen3: queries and keys are normalised per head before they rotate."""

from torch import nn

from model import FAMILIES, LLAMA_NAMES, Attention, Block, Family, biases, read_qwen


class Qwen3Attention(Attention):
    def __init__(self, c):
        super().__init__(c)
        self.q_norm, self.k_norm = (nn.RMSNorm(c.head_width, c.eps) for _ in range(2))

    def project(self, x):
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v


class Qwen3Block(Block):
    Attention = Qwen3Attention


def read_qwen3(raw):
    return read_qwen(raw) | biases(raw) | {"head_width": raw.get("head_dim") or 128}


OWN_NAMES = {f"blocks.#.attn.{p}_norm": f"model.layers.#.self_attn.{p}_norm" for p in "qk"}
FAMILIES["qwen3"] = Family("Qwen3", read_qwen3, LLAMA_NAMES | OWN_NAMES, Qwen3Block)
