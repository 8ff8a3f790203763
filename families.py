"""Model families as data: how a config.json becomes a `Config`, and what the weights are called.

A family (Llama, Mistral, Qwen2) is one row of FAMILIES: a map from our parameter names to those of
its checkpoints, and the few things it does its own way. What is not supported is an error.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from cli import UserError


@dataclass(frozen=True)
class Config:
    """The shape of a model, whatever its family."""

    family: str
    vocab: int
    width: int
    n_layers: int
    heads: int
    kv_heads: int
    head_width: int
    ffn: int
    eps: float
    rope: dict  # rope_type, rope_theta, and the scaling's own numbers
    windows: tuple  # per layer: sliding window in tokens, or None
    qkv_bias: bool
    out_bias: bool
    tied: bool
    head: str  # "logps": a language model; "reward": a scalar score

    @classmethod
    def from_hf(cls, raw, where="config.json"):
        """Hugging Face's config.json (as a dict) -> Config; UserError names what is unsupported."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise UserError(f"{where}: model_type {family!r} is not supported (known: {known})")
        if raw.get("hidden_act", "silu") != "silu" or raw.get("mlp_bias"):
            found = f"hidden_act {raw.get('hidden_act')!r}, mlp_bias {raw.get('mlp_bias')!r}"
            raise UserError(f"{where}: {found}; only SwiGLU layers without bias are supported")
        heads, layers = raw["num_attention_heads"], raw["num_hidden_layers"]
        biased = bool(raw.get("attention_bias"))
        architecture = (raw.get("architectures") or ["ForCausalLM"])[0]
        return cls(
            family=family,
            vocab=raw["vocab_size"],
            width=raw["hidden_size"],
            n_layers=layers,
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_width=raw.get("head_dim") or raw["hidden_size"] // heads,
            ffn=raw["intermediate_size"],
            eps=raw["rms_norm_eps"],
            rope=_rope_settings(raw, where),
            windows=FAMILIES[family].windows(raw, layers),
            qkv_bias=biased or FAMILIES[family].qkv_bias,
            out_bias=biased,
            tied=bool(raw.get("tie_word_embeddings", False)),
            head="reward" if architecture.endswith("ForSequenceClassification") else "logps",
        )


def _rope_settings(raw, where):
    """Both spellings: rope_theta + rope_scaling, and the newer rope_parameters."""
    rope = dict(raw.get("rope_parameters") or {}) or dict(raw.get("rope_scaling") or {})
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise UserError(f"{where}: rope_type {rope['rope_type']!r} is not supported")
    return rope


def _no_windows(raw, layers):
    return (None,) * layers


def _mistral_windows(raw, layers):
    """v0.1 slides over 4,096 tokens, which is also the default; v0.2 and later carry null."""
    return (raw.get("sliding_window", 4096),) * layers


def _qwen2_windows(raw, layers):
    """Only with use_sliding_window, and then from layer max_window_layers on."""
    if not raw.get("use_sliding_window"):
        return _no_windows(raw, layers)
    first, window = raw.get("max_window_layers", 28), raw.get("sliding_window", 4096)
    return tuple(window if i >= first else None for i in range(layers))


LLAMA_NAMES = {  # ours -> theirs; # stands for the layer
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "score": "score",
    "blocks.#.attn_norm": "model.layers.#.input_layernorm",
    "blocks.#.mlp_norm": "model.layers.#.post_attention_layernorm",
    **{f"blocks.#.attn.{p}": f"model.layers.#.self_attn.{p}_proj" for p in "qkvo"},
    **{f"blocks.#.mlp.{p}": f"model.layers.#.mlp.{p}_proj" for p in ("gate", "up", "down")},
}


@dataclass(frozen=True)
class Family:
    """What one family does its own way."""

    names: dict
    windows: Callable
    qkv_bias: bool = False


FAMILIES = {
    "llama": Family(LLAMA_NAMES, _no_windows),
    "mistral": Family(LLAMA_NAMES, _mistral_windows),
    "qwen2": Family(LLAMA_NAMES, _qwen2_windows, qkv_bias=True),
}


def hf_name(family, name):
    """Our parameter name -> the name in the family's checkpoints."""
    module, _, kind = name.rpartition(".")
    layer = re.search(r"\d+", module)
    theirs = FAMILIES[family].names[re.sub(r"\d+", "#", module)]
    return f"{theirs.replace('#', layer.group() if layer else '')}.{kind}"
