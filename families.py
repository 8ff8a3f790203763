"""Model families as data: how a config.json becomes a `Config`, and what the weights are called.

A family is one row of FAMILIES: a map from our parameter names to those of its checkpoints, and a
reader of what its config.json spells or defaults its own way. Its layers, where they are not
Llama's, are in variants.py. What is not supported is an error that names it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from jobs.cli import UserError


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
    score: str = "linear"  # which reward head, of heads.REWARDS
    act: str = "silu"  # which activation, of layers.ACTIVATIONS
    rotary: int | None = None  # dimensions of a head that rotate; None: all
    scale: float | None = None  # of the attention scores; None: 1 / sqrt(head_width)
    attn_cap: float | None = None  # soft cap of the attention scores
    logit_cap: float | None = None  # soft cap of the logits
    parallel: bool = False  # attention and feed-forward side by side
    gate: dict | None = None  # shape of ArmoRM's gate

    @classmethod
    def from_hf(cls, raw, where="config.json"):
        """Hugging Face's config.json (as a dict) -> Config; UserError names what is unsupported."""
        raw = Fields(raw, where)
        family = raw.get("model_type")
        if str(family) not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise UserError(f"{where}: model_type {family!r} is not supported (known: {known})")
        try:
            values = _common(raw) | _head(raw) | FAMILIES[family].read(raw)
        except (TypeError, ValueError) as error:  # text or a list where a number is expected, …
            raise UserError(f"{where}: a field is of the wrong kind: {error}") from error
        raw.refuse_rest()
        return cls(family=family, **values)


class Fields:
    """A config.json that remembers what was read of it, so that nothing is passed over in silence.

    raw: the parsed file; where: its name, for error messages.
    """

    # fields that change no logits of ours: bookkeeping, initialisation, dropout, generation
    HARMLESS = re.compile(
        r"_.*|transformers_version|(torch_)?dtype|use_cache|(pad|bos|eos|unk|sep|cls)_token(_id)?"
        r"|initializer_range|initializer_factor|max_position_embeddings|pretraining_tp"
        r"|(attention|hidden|classifier)_dropout|rope_theta"
        r"|name_or_path|architectures|problem_type|num_labels|id2label|label2id|finetuning_task"
        r"|task_specific_params|tokenizer_class|model_name|return_dict|output_\w+|torchscript"
        r"|cache_implementation|is_decoder|unsloth_\w+|max_length|min_length|do_sample|num_beams"
        r"|temperature|top_k|top_p|repetition_penalty|length_penalty|num_return_sequences"
    )

    def __init__(self, raw, where):
        if not isinstance(raw, dict):
            raise UserError(f"{where}: not a JSON object")
        self.raw, self.where, self.seen = raw, where, set()

    def get(self, name, default=None):
        self.seen.add(name)
        return self.raw.get(name, default)

    def need(self, name):
        value = self.get(name)
        if value is None:
            raise UserError(f"{self.where}: no {name}; not a whole config.json")
        return value

    def size(self, name, default=None):
        """How many there are of something: a whole number, at least one."""
        value = self.need(name) if default is None else self.get(name) or default
        if type(value) is not int or value < 1:
            raise UserError(f"{self.where}: {name} is {value!r}, not a whole number above 0")
        return value

    def refuse(self, name, value, cure=""):
        raise UserError(f"{self.where}: {name} {value!r} is not supported{cure}")

    def refuse_rest(self):
        """UserError for a field that nobody read, unless it is harmless or switched off."""
        for name, value in self.raw.items():
            if value and name not in self.seen and not self.HARMLESS.fullmatch(name):
                cure = "; delete the field if it does not change what the model computes"
                self.refuse(name, value, cure)


def _common(raw):
    """What all families spell alike."""
    heads, width = raw.size("num_attention_heads"), raw.size("hidden_size")
    return {
        "vocab": raw.size("vocab_size"),
        "width": width,
        "n_layers": raw.size("num_hidden_layers"),
        "heads": heads,
        "kv_heads": raw.size("num_key_value_heads", heads),
        "head_width": raw.size("head_dim", width // heads),
        "ffn": raw.size("intermediate_size"),
        "tied": bool(raw.get("tie_word_embeddings", False)),
    }


ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def _rope_settings(raw, theta="rope_theta", share=1.0):
    """Both spellings: rope_theta + rope_scaling, and the newer rope_parameters.

    theta: the field that names the base; share: how much of a head rotates, if nothing else says.
    """
    spelled = raw.get("rope_parameters"), raw.get("rope_scaling")  # both are read
    rope = {"rope_theta": raw.get(theta, 10000.0), "partial_rotary_factor": share}
    rope |= spelled[0] or spelled[1] or {}
    old = rope.pop("type", "default")
    kind = rope.setdefault("rope_type", old)
    if kind not in ROPE_FIELDS:
        raw.refuse("rope_type", kind)
    for name in ROPE_FIELDS[kind]:
        if name not in rope:
            raise UserError(f"{raw.where}: rope_type {kind!r} without {name}")
    known = {"rope_type", "rope_theta", "partial_rotary_factor", *ROPE_FIELDS["llama3"]}
    for name, value in rope.items():
        if value and (
            name not in known or (name == "partial_rotary_factor" and share == 1 != value)
        ):
            raw.refuse(f"rope_parameters: {name}", value)
    return rope


def _head(raw):
    """What the model ends in, by the name of its class; UserError for remote code and others."""
    name = (raw.get("architectures") or [FAMILIES[raw.get("model_type")].stem + "ForCausalLM"])[0]
    if name == "LlamaForRewardModelWithGating":
        raw.get("auto_map")  # its code is on the hub; heads.GatedHead stands for it
        gate = {
            "objectives": raw.get("num_objectives", 19),
            "temperature": raw.get("gating_temperature", 10),
            "hidden": raw.get("gating_hidden_dim", 1024),
            "layers": raw.get("gating_n_hidden", 3),
        }
        return {"head": "reward", "score": "armo", "gate": gate}
    if raw.get("auto_map"):
        cure = ": it asks for code of its own, which is never run; delete auto_map if the weights"
        raw.refuse("auto_map", raw.get("auto_map"), f"{cure} are those of a plain {name}")
    if name.endswith("ForCausalLM"):
        return {"head": "logps"}
    if name.endswith("ForSequenceClassification"):
        return {"head": "reward"}
    if name == "GPTNeoXRewardModel":
        if raw.get("pooling", "last") != "last":
            raw.refuse("pooling", raw.get("pooling"))
        return {"head": "reward", "score": "oasst"}
    raw.refuse("architectures", name)


# ----------------------------------------------------------------------------- the families


def _act(raw, field, known, default):
    """Name of the activation in layers.ACTIVATIONS. known: {their name: ours}."""
    name = raw.get(field) or default
    return known[name] if name in known else raw.refuse(field, name)


def _swiglu(raw):
    """What Llama, Mistral and Qwen share: no windows and no biases, unless the family says so."""
    return {
        "rope": _rope_settings(raw),
        "eps": raw.need("rms_norm_eps"),
        "act": _act(raw, "hidden_act", {"silu": "silu"}, "silu"),
        "windows": (None,) * raw.need("num_hidden_layers"),
        "qkv_bias": False,
        "out_bias": False,
    }


def _biases(raw, default=False):
    """Biases of the attention's projections, where the family has a field for them."""
    biased = bool(raw.get("attention_bias", default))
    return {"qkv_bias": biased, "out_bias": biased}


def _llama(raw):
    """Llama 2, 3, 3.1, 3.2."""
    return _swiglu(raw) | _biases(raw)


def _mistral(raw):
    """v0.1 slides over 4,096 tokens, which is also the default; v0.2 and later carry null."""
    window = raw.get("sliding_window", 4096)
    return _swiglu(raw) | {"windows": (window,) * raw.need("num_hidden_layers")}


def _qwen(raw):
    """Windows only with use_sliding_window, and then by layer_types or from max_window_layers."""
    first, window = raw.get("max_window_layers", 28), raw.get("sliding_window", 4096)
    windows = _by_layer(raw, window, lambda i: i >= first)
    return _swiglu(raw) | ({"windows": windows} if raw.get("use_sliding_window") else {})


def _qwen2(raw):
    return _qwen(raw) | {"qkv_bias": True}


def _qwen3(raw):
    return _qwen(raw) | _biases(raw) | {"head_width": raw.get("head_dim") or 128}


def _by_layer(raw, window, slides):
    """Windows of all layers: by `layer_types` if it is there, else where slides(layer) says so."""
    kinds = raw.get("layer_types")
    if kinds is None:
        return tuple(window if slides(i) else None for i in range(raw.need("num_hidden_layers")))
    known = {"sliding_attention": window, "full_attention": None}
    for kind in kinds:
        if kind not in known:
            raw.refuse("layer_types", kind)
    return tuple(known[kind] for kind in kinds)


def _gemma2(raw):
    """Soft caps, a scale of its own, and every other layer slides, the first one too."""
    raw.get("hidden_act")  # its older spelling, which nobody reads
    known = {"gelu_pytorch_tanh": "gelu_tanh"}
    return _biases(raw) | {
        "rope": _rope_settings(raw),
        "eps": raw.need("rms_norm_eps"),
        "act": _act(raw, "hidden_activation", known, "gelu_pytorch_tanh"),
        "head_width": raw.get("head_dim", 256),
        "windows": _by_layer(raw, raw.get("sliding_window", 4096), lambda i: i % 2 == 0),
        "scale": raw.get("query_pre_attn_scalar", 256) ** -0.5,
        "attn_cap": raw.get("attn_logit_softcapping", 50.0),
        "logit_cap": raw.get("final_logit_softcapping", 30.0),
        "tied": bool(raw.get("tie_word_embeddings", True)),
    }


def _neox(raw):
    """GPT-NeoX and Pythia, whose rotary settings have names of their own."""
    rope = _rope_settings(raw, "rotary_emb_base", raw.get("rotary_pct", 0.25))
    head_width = raw.need("hidden_size") // raw.need("num_attention_heads")
    tanh = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
    return _biases(raw, True) | {
        "eps": raw.get("layer_norm_eps", 1e-5),
        "act": _act(raw, "hidden_act", {"gelu": "gelu"} | dict.fromkeys(tanh, "gelu_tanh"), "gelu"),
        "rope": rope,
        "head_width": head_width,
        "rotary": int(head_width * rope["partial_rotary_factor"]),
        "windows": (None,) * raw.need("num_hidden_layers"),
        "parallel": bool(raw.get("use_parallel_residual", True)),
    }


LLAMA_NAMES = {  # ours -> theirs; # stands for the layer
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "score": "score",
    "blocks.#.attn_norm": "model.layers.#.input_layernorm",
    "blocks.#.mlp_norm": "model.layers.#.post_attention_layernorm",
    **{f"blocks.#.attn.{p}": f"model.layers.#.self_attn.{p}_proj" for p in "qkvo"},
    **{f"blocks.#.mlp.{p}": f"model.layers.#.mlp.{p}_proj" for p in ("gate", "up", "down")},
    "score.regression": "regression_layer",  # and the rest of ArmoRM's head
    "score.transform": "reward_transform_matrix",
    "score.logit_scale": "gating.logit_scale",
    "score.gate.#": "gating.layers.#",
}
QWEN3_NAMES = LLAMA_NAMES | {
    f"blocks.#.attn.{p}_norm": f"model.layers.#.self_attn.{p}_norm" for p in "qk"
}
GEMMA2_NAMES = LLAMA_NAMES | {
    "blocks.#.attn_post": "model.layers.#.post_attention_layernorm",
    "blocks.#.mlp_norm": "model.layers.#.pre_feedforward_layernorm",
    "blocks.#.mlp_post": "model.layers.#.post_feedforward_layernorm",
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


@dataclass(frozen=True)
class Family:
    """What one family does its own way."""

    stem: str  # of its classes in transformers: LlamaForCausalLM, …
    names: dict
    read: Callable  # Fields -> the values of a Config


FAMILIES = {
    "llama": Family("Llama", LLAMA_NAMES, _llama),
    "mistral": Family("Mistral", LLAMA_NAMES, _mistral),
    "qwen2": Family("Qwen2", LLAMA_NAMES, _qwen2),
    "qwen3": Family("Qwen3", QWEN3_NAMES, _qwen3),
    "gemma2": Family("Gemma2", GEMMA2_NAMES, _gemma2),
    "gpt_neox": Family("GPTNeoX", NEOX_NAMES, _neox),
    "gpt_neox_reward_model": Family("GPTNeoX", NEOX_NAMES | {"score": "out_proj"}, _neox),
}


def hf_name(family, name):
    """Our parameter name -> the name in the family's checkpoints."""
    names, layer = FAMILIES[family].names, re.search(r"\d+", name)
    key = re.sub(r"\d+", "#", name)
    module, _, kind = key.rpartition(".")
    theirs = names[key] if key in names else f"{names[module]}.{kind}"
    return theirs.replace("#", layer.group() if layer else "")
