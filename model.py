"""Computes log-probabilities of rows with a Llama: rotary positions, attention, block, scored head.

    tokens -> embedding -> x, the residual stream, to which every block adds twice:
        x = x + attention(norm(x))      a token gathers from those before it on its path
        x = x + mlp(norm(x))            a token by itself
    -> norm -> head -> log softmax, at the label of each scored token

A row (data.py) holds several tries in one sequence. Of that the model needs two things:
`positions`, by which queries and keys rotate, and the one attention rule, `sees`. All else is a
plain Llama. Faster ways to compute the rule (kernels/) and sharding (train.py) are put in from
outside. Mistral and Qwen2 differ by their config alone; other architectures are in families/.

Legend: B batch, T tokens, S scored tokens, D width of the residual stream, H heads, K key/value
heads, C head width, R of it rotate, U keys, F feed-forward width, V vocabulary.
"""

import importlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hub.weights import ConfigFields, Weights, resolve, write_directory
from jobs.cli import UserError
from jobs.files import read_json


@dataclass(frozen=True)
class Config:
    """The shape of a model."""

    family: str  # key of FAMILIES
    vocab: int
    width: int
    n_layers: int
    heads: int
    kv_heads: int  # fewer than heads: each key/value head serves heads / kv_heads query heads
    head_width: int
    ffn: int
    eps: float  # of the norms
    rope: dict  # rope_type, rope_theta, partial_rotary_factor, and the scaling's own numbers
    tied: bool  # the head is the embedding
    head: str  # "logps": a language model; "reward": a scalar score
    windows: tuple  # per layer: sliding window in tokens, or None
    positions: int | None = None  # that the model was made for; None: not said
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None  # of the attention scores; None: 1 / sqrt(head_width)
    attn_cap: float | None = None  # soft cap of the attention scores
    logit_cap: float | None = None  # soft cap of the logits
    own: dict = field(default_factory=dict)  # what only the family's own file reads


def rope_table(c, positions, dtype):
    """Computes cos and sin of the angles m * theta^(-2i/R): (…, T) positions m -> (…, T, R/2) each.

    Su et al. 2021, Eq. 15. Llama 3.1 (rope_type "llama3") makes 8k positions of pre-training reach
    128k: a frequency that turns fewer than low_freq_factor times within the original context is
    divided by `factor`, one that turns more than high_freq_factor times is kept, so that near
    tokens are told apart as before, and those between are blended.
    """
    rope, rotary = c.rope, int(c.head_width * c.rope["partial_rotary_factor"])  # R; mostly C
    exponent = torch.arange(0, rotary, 2, device=positions.device).float() / rotary
    freq = 1.0 / rope["rope_theta"] ** exponent  # (R/2,) radians per position: fast ones first
    if rope["rope_type"] == "linear":  # positions squeezed into the range of pre-training
        freq = freq / rope["factor"]
    elif rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * freq / (2 * torch.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / rope["factor"]
    # fp32 up to here: bf16, of 8 significant bits, cannot tell position 1,000 from 1,001
    angles = positions[..., None].float() * freq  # (…, T, R/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turns pairs of numbers by their position's angles. x: (B, H, T, C); cos, sin: (B, T, R/2).

    q . k then depends on the distance of the two tokens alone. A pair is number i of the first half
    of a head and number i of the second; the paper pairs neighbours, which is the same up to the
    order of q's and k's weights, and Hugging Face's checkpoints have them in the order of halves.
    """
    half, cos, sin = cos.shape[-1], cos[:, None], sin[:, None]  # (B, 1, T, R/2): all heads alike
    a, b, *still = x.split(half, -1)  # still: what does not rotate, or nothing
    return torch.cat([a * cos - b * sin, b * cos + a * sin, *still], -1)


# ----------------------------------------------------------------------------- the attention rule


def sees(q, k, until, positions, window=None):
    """Whether row index q attends to row index k, as tensors that broadcast -> bool.

    until[k] is the index just past k's subtree: every q in k <= q < until[k] lies on a path that
    leads through k, and no other does. That is causality, and it keeps branches and documents
    apart. window: how many tokens of its path q looks back on, itself included (Mistral).
    """
    inside = (k <= q) & (q < until[k])
    return inside if window is None else inside & (positions[q] - positions[k] < window)


def visible(until, positions, window=None):
    """The attention rule of a row as a dense mask: (T query, T key) bool."""
    index = torch.arange(len(until), device=until.device)
    return sees(index[:, None], index[None, :], until, positions, window)


def plain_attention(row, c):
    """The attention of a row: one rule (q, k, v) -> y per layer, each under a dense mask."""
    masks = {w: visible(row.until, row.positions, w) for w in set(c.windows)}  # (T, T) each
    known = {"scale": c.scale, "cap": c.attn_cap}
    return [partial(masked_attention, mask=masks[window], **known) for window in c.windows]


def masked_attention(q, k, v, mask, scale=None, cap=None):
    """softmax(cap tanh(q k^T scale / cap)) v over the keys that the mask lets see.

    q: (B, H, T, C), k, v: (B, K, U, C), mask: (T, U) or (B, 1, T, U) bool -> (B, H, T, C).
    """
    (batch, heads, size, width), groups = q.shape, k.shape[1]
    scale = width**-0.5 if scale is None else scale
    # the H/K query heads that share a key head are rows of one matrix product: k is never repeated
    grouped = (q * scale).reshape(batch, groups, -1, width)  # (B, K, H/K T, C)
    scores = soft_cap(grouped @ k.mT, cap).view(batch, heads, size, -1)  # (B, H, T, U)
    unseen = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    weights = (scores + unseen).softmax(-1).view(batch, groups, -1, k.shape[2])  # exp(-inf) = 0
    return (weights @ v).view(batch, heads, size, v.shape[-1])


def soft_cap(x, cap):
    """cap * tanh(x / cap), which keeps x within (-cap, cap); x itself where there is no cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


# ----------------------------------------------------------------------------- the layers


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023); who sees whom is the `rule`'s, handed in."""

    def __init__(self, c):
        super().__init__()
        self.head_width = c.head_width
        self.q = nn.Linear(c.width, c.heads * c.head_width, bias=c.qkv_bias)
        self.k = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.qkv_bias)
        self.v = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.qkv_bias)
        self.o = nn.Linear(c.heads * c.head_width, c.width, bias=c.out_bias)

    def project(self, x):
        """(B, T, D) -> q, k, v, each (B, H or K, T, C)."""
        heads = [proj(x).unflatten(-1, (-1, self.head_width)) for proj in (self.q, self.k, self.v)]
        return [y.transpose(1, 2) for y in heads]

    def forward(self, x, cos, sin, rule):
        q, k, v = self.project(x)
        y = rule(rotate(q, cos, sin), rotate(k, cos, sin), v)  # (B, H, T, C)
        return self.o(y.transpose(1, 2).flatten(2))  # the heads side by side, mixed: (B, T, D)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): silu(x W_gate) says how much of x W_up passes."""

    activation = staticmethod(F.silu)

    def __init__(self, c):
        super().__init__()
        self.gate = nn.Linear(c.width, c.ffn, bias=False)
        self.up = nn.Linear(c.width, c.ffn, bias=False)
        self.down = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x):
        return self.down(self.activation(self.gate(x)) * self.up(x))  # (B, T, F) -> (B, T, D)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream.

    recompute: keep only the block's input for backward, and compute the rest again there.
    """

    # a family swaps these. RMSNorm: x / sqrt(mean(x^2) + eps) * weight, inside in fp32 also for
    # bf16: LayerNorm without its mean and bias (Zhang and Sennrich 2019)
    Norm, Attention, MLP, Embedding = nn.RMSNorm, Attention, MLP, nn.Embedding

    def __init__(self, c):
        super().__init__()
        self.attn_norm, self.attn = self.Norm(c.width, c.eps), self.Attention(c)
        self.mlp_norm, self.mlp = self.Norm(c.width, c.eps), self.MLP(c)
        self.recompute = False

    def forward(self, x, cos, sin, rule):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.body, x, cos, sin, rule, use_reentrant=False)
        return self.body(x, cos, sin, rule)

    def body(self, x, cos, sin, rule):
        x = x + self.attn(self.attn_norm(x), cos, sin, rule)
        return x + self.mlp(self.mlp_norm(x))


class RewardHead(nn.Linear):
    """`score` of transformers' *ForSequenceClassification: one number per scored token."""

    def __init__(self, c, bias=False):
        super().__init__(c.width, 1, bias=bias)

    def forward(self, x, row):
        """(T, D) states after the final norm -> (S,) fp32: in bf16, good answers would tie."""
        bias = None if self.bias is None else self.bias.float()
        scores = F.linear(x[row.source].float(), self.weight.float(), bias)  # (S, 1)
        return scores.sum(-1)  # no squeeze: FSDP's hooks can be lost on a view


class Transformer(nn.Module):
    """forward(row) gives one fp32 value per scored token; logits(tokens) is the plain causal model.

    attend  (row, config) -> one attention rule per layer, (q, k, v) -> y
    states  (model, row) -> (S, D), the residual stream at the tokens that predict scored ones
    Both are this file's plain ones, unless train.py or a loader puts in those of kernels/.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.attend, self.states = plain_attention, scored_states
        family = family_of(c.family)
        self.embed = family.block.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(family.block(c) for _ in range(c.n_layers))
        self.norm = family.block.Norm(c.width, c.eps)
        if c.head == "reward":
            self.score = family.reward_head(c)
        elif not c.tied:  # a tied head is the embedding, which then gets the gradients of both
            self.head = nn.Linear(c.width, c.vocab, bias=False)

    @property
    def head_weight(self):
        return self.embed.weight if self.config.tied else self.head.weight  # (V, D)

    def hidden(self, tokens, positions, rules):
        """Residual stream after the last block, before the final norm: (B, T, D).

        tokens, positions: (B, T); rules: one per layer, (q, k, v) -> y, all (B, heads, T, C).
        """
        x = self.embed(tokens)  # (B, T, D)
        cos, sin = rope_table(self.config, positions, x.dtype)  # once for all layers
        for block, rule in zip(self.blocks, rules, strict=True):
            x = block(x, cos, sin, rule)
        return x

    def row_states(self, row):
        """(T, D) residual stream of a row."""
        rules = self.attend(row, self.config)
        return self.hidden(row.tokens[None], row.positions[None], rules)[0]

    def forward(self, row):
        """Row -> (S,) fp32: log-probabilities of the labels, or scalar rewards."""
        if self.config.head == "reward":
            return self.score(self.norm(self.row_states(row)), row)
        x = self.norm(self.states(self, row))  # (S, D): nothing else goes through the head
        return ScoredLogps.apply(x, self.head_weight, row.label, self.config.logit_cap)

    def to_logits(self, x):
        """Residual stream after the last block (…, D) -> (…, V)."""
        return soft_cap(F.linear(self.norm(x), self.head_weight), self.config.logit_cap)

    def logits(self, tokens):
        """(B, T) ids -> (B, T, V): plain causal language model."""
        size = tokens.shape[1]
        positions = torch.arange(size, device=tokens.device)  # (T,)
        until = torch.full_like(positions, size)  # a row of one path: nothing branches off
        row = SimpleNamespace(tokens=tokens[0], positions=positions, until=until, spans=[(0, size)])
        rules = self.attend(row, self.config)
        return self.to_logits(self.hidden(tokens, positions.expand_as(tokens), rules))


def scored_states(model, row):
    """(S, D) residual stream at the tokens that predict the scored ones."""
    return model.row_states(row)[row.source]


class ScoredLogps(torch.autograd.Function):
    """Computes log softmax(z)[label] for z = soft_cap(x W^T), a chunk of tokens at a time.

    x: (S, D), weight: W (V, D), label: (S,), cap: number or None -> (S,) fp32. With V = 128k the
    logits of a row would be its largest tensor by far, so they never exist at once: those of a
    chunk are made in forward, dropped, and made again in backward.
    """

    LOGITS = 2**26  # of one chunk; four times as many on CUDA, which likes larger products

    @staticmethod
    def forward(ctx, x, weight, label, cap=None):
        logps = torch.empty(len(x), device=x.device)
        logsumexp, logits = torch.empty_like(logps), None
        for part in ScoredLogps._chunks(x, weight):
            del logits  # of the chunk before, to make room
            logits = soft_cap(_logits(x[part], weight), cap)  # (chunk, V)
            logsumexp[part] = logits.logsumexp(-1)
            logps[part] = logits.gather(-1, label[part, None]).squeeze(-1) - logsumexp[part]
        ctx.save_for_backward(x, weight, label, logsumexp)
        ctx.cap, ctx.last = cap, logits  # backward begins with the chunk that forward ended with
        return logps

    @staticmethod
    def backward(ctx, grad):
        """With g = dLoss/dlogp, p = softmax(z) = exp(z - logsumexp), and u = x W^T:

        dLoss/dz = g (onehot(label) - p)        dz/du = 1 - (z / cap)^2, of the cap
        dLoss/dx = dLoss/du W                   dLoss/dW = (dLoss/du)^T x
        """
        x, weight, label, logsumexp = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        last, ctx.last = ctx.last, None
        for part in reversed(ScoredLogps._chunks(x, weight)):
            # d is z, (chunk, V), and becomes dLoss/du in place: a second one might not fit
            d = soft_cap(_logits(x[part], weight), ctx.cap) if last is None else last
            last = None
            slope = None if ctx.cap is None else 1 - (d / ctx.cap) ** 2
            d.sub_(logsumexp[part, None]).exp_().mul_(-grad[part, None])
            d.scatter_add_(-1, label[part, None], grad[part, None])
            d = (d if slope is None else d.mul_(slope)).to(x.dtype)
            grad_x[part] = d @ weight
            grad_weight.addmm_(d.T, x[part])
            del d  # likewise
        return grad_x, grad_weight, None, None

    @staticmethod
    def _chunks(x, weight):
        size = max(1, ScoredLogps.LOGITS * (4 if x.is_cuda else 1) // len(weight))
        return [slice(start, start + size) for start in range(0, len(x), size)]


def _logits(x, weight):
    """x W^T in fp32; bf16 has 8 significant bits, so that logits of 16 to 32 are 0.125 apart."""
    if x.is_cuda and x.dtype == torch.bfloat16:  # summed in fp32, and never rounded
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return (x @ weight.T).float()  # a CPU has no such product


# ----------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Family:
    """How one architecture is published: a row of FAMILIES."""

    stem: str | None  # of its classes: LlamaForCausalLM, …; None: one class, which exports keep
    read: Callable  # ConfigFields -> values of a Config
    names: dict  # our name of a module or parameter -> theirs; # stands for a number
    block: type = Block
    reward_head: Callable = RewardHead


LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "score": "score",
    "blocks.#.attn_norm": "model.layers.#.input_layernorm",
    "blocks.#.mlp_norm": "model.layers.#.post_attention_layernorm",
    **{f"blocks.#.attn.{p}": f"model.layers.#.self_attn.{p}_proj" for p in "qkvo"},
    **{f"blocks.#.mlp.{p}": f"model.layers.#.mlp.{p}_proj" for p in ("gate", "up", "down")},
}


def read_gated(raw, field="hidden_act", act="silu"):
    """What Llama, Mistral, Qwen and Gemma share; field: where the MLP's activation is named."""
    raw.one_of(field, act)
    return {"rope": raw.rope(), "eps": raw.need("rms_norm_eps")}


def biases(raw, default=False):
    """Biases of the attention's projections, where the family has a field for them."""
    biased = bool(raw.get("attention_bias", default))
    return {"qkv_bias": biased, "out_bias": biased}


def layer_windows(raw, slides):
    """Windows of all layers: by `layer_types` if it is there, else where slides(layer) says so."""
    window, kinds = raw.get("sliding_window", 4096), raw.get("layer_types")
    if kinds is None:
        return tuple(window if slides(i) else None for i in range(raw.need("num_hidden_layers")))
    known = {"sliding_attention": window, "full_attention": None}
    return tuple(known[k] if k in known else raw.refuse("layer_types", k) for k in kinds)


def read_llama(raw, *activation):
    """Llama 2, 3, 3.1, 3.2."""
    return read_gated(raw, *activation) | biases(raw)


def read_mistral(raw):
    """v0.1 slides over 4,096 tokens, which is also the default; v0.2 and later carry null."""
    window = raw.get("sliding_window", 4096)
    return read_gated(raw) | {"windows": (window,) * raw.need("num_hidden_layers")}


def read_qwen(raw):
    """Windows only with use_sliding_window, and then by layer_types or from max_window_layers."""
    first = raw.get("max_window_layers", 28)
    windows = layer_windows(raw, lambda layer: layer >= first)
    return read_gated(raw) | ({"windows": windows} if raw.get("use_sliding_window") else {})


FAMILIES = {  # a file of families/ adds its own when it is imported
    "llama": Family("Llama", read_llama, LLAMA_NAMES),
    "mistral": Family("Mistral", read_mistral, LLAMA_NAMES),
    "qwen2": Family("Qwen2", lambda raw: read_qwen(raw) | {"qkv_bias": True}, LLAMA_NAMES),
}
BY_CLASS = {"LlamaForRewardModelWithGating": "armo"}  # its model_type says llama
HEADS = {"logps": "ForCausalLM", "reward": "ForSequenceClassification"}  # how class names end
FOLDER = Path(__file__).with_name("families")


def family_of(name):
    """The Family of a model_type: of this file or of families/NAME.py; None where there is none."""
    if name not in FAMILIES and FOLDER / f"{name}.py" in FOLDER.glob("*.py"):
        importlib.import_module(f"families.{name}")
    return FAMILIES.get(name)


def config_of(raw, where="config.json"):
    """config.json, as a dict -> Config; UserError names what is not supported."""
    raw = ConfigFields(raw, where)  # notes what is read
    try:
        kind, classes = raw.get("model_type"), raw.get("architectures") or [None]
        name = BY_CLASS.get(classes[0], kind)
        if (family := family_of(name)) is None:
            others = {file.stem for file in FOLDER.glob("*.py") if family_of(file.stem)}
            known = ", ".join(sorted({*FAMILIES, *others}.difference(BY_CLASS.values())))
            raw.refuse("model_type", kind, f" (known: {known})")
        heads, width = raw.size("num_attention_heads"), raw.size("hidden_size")
        n_layers = raw.size("num_hidden_layers")
        values = {
            "family": name,
            "vocab": raw.size("vocab_size"),
            "width": width,
            "n_layers": n_layers,
            "heads": heads,
            "kv_heads": raw.size("num_key_value_heads", heads),
            "head_width": raw.size("head_dim", width // heads),
            "ffn": raw.size("intermediate_size"),
            "tied": bool(raw.get("tie_word_embeddings", False)),
            "windows": (None,) * n_layers,
        } | family.read(raw)
        values["positions"] = raw.positions(values["rope"])
        if family.stem:
            values["head"] = read_head(raw, classes[0] or f"{family.stem}ForCausalLM")
    except (TypeError, ValueError) as error:  # text or a list where a number is expected, …
        raise UserError(f"{where}: a field is of the wrong kind: {error}") from error
    raw.refuse_rest()
    return Config(**values)


def read_head(raw, name):
    """What the model ends in, by its class; UserError for remote code and for other classes."""
    if code := raw.get("auto_map"):
        cure = ": it asks for code of its own, which is never run; delete auto_map if the weights"
        raw.refuse("auto_map", code, f"{cure} are those of a plain {name}")
    heads = [head for head, end in HEADS.items() if name.endswith(end)]
    return heads[0] if heads else raw.refuse("architectures", name)


def hf_name(family, name):
    """Our name of a parameter -> its name in the family's checkpoints."""
    names, number = family_of(family).names, re.search(r"\d+", name)
    key = re.sub(r"\d+", "#", name)
    module, _, kind = key.rpartition(".")  # kind: weight or bias
    theirs = names[key] if key in names else f"{names[module]}.{kind}"
    return theirs.replace("#", number.group() if number else "")


# ----------------------------------------------------------------------------- in and out


def read_config(directory):
    """config.json of a HF directory -> (raw dict, Config)."""
    file = Path(directory) / "config.json"
    if not file.exists():
        raise UserError(f"{directory}: no config.json; not a Hugging Face model directory")
    raw = read_json(file)
    return raw, config_of(raw, str(file))


def stored_dtype(directory):
    """The torch dtype that a HF directory says its weights have."""
    raw, _ = read_config(directory)
    return getattr(torch, raw.get("dtype") or raw.get("torch_dtype") or "bfloat16")


def path_limit(max_len, *directories, most=4096):
    """--max_len: None is `most`, or as many tokens as these models have positions for.

    UserError for more than that: what a model computes at positions that it never saw is noise.
    """
    for directory in directories:
        positions = read_config(directory)[1].positions or math.inf
        most = min(most, positions)
        if max_len is not None and max_len > positions:
            fault = f"{directory} was made for {positions} positions"
            cure = "lower --max_len, or let config.json say how rope_scaling stretches them"
            raise UserError(f"--max_len {max_len}: {fault} (max_position_embeddings); {cure}")
    return most if max_len is None else max_len


def outline(directory, head=None, flag="--model", new_head=False):
    """Transformer on the meta device, shapes without memory; UserError where the files differ.

    head: "logps" or "reward", if it must be one of these; new_head: a reward head may be new.
    """
    _, config = read_config(directory)
    if head not in (None, config.head) and (head == "logps" or not new_head):
        kinds = {"logps": "a language model", "reward": "a reward model"}
        raise UserError(f"{flag} {directory} is {kinds[config.head]}; {kinds[head]} is needed")
    with torch.device("meta"):  # no random weights are drawn to be overwritten
        model = Transformer(replace(config, head=head or config.head))
    load_weights(model, directory, lambda p: (torch.empty(0, *p.shape[1:]), slice(0, 0)))
    return model


def load(directory, dtype=torch.float32, device="cpu", head=None, flag="--model"):
    """HF directory or hub id -> Transformer in eval mode, without gradients; `.directory` is where.

    dtype: a torch dtype, "bf16", "fp32", or None: bf16 on CUDA, else fp32; device: a torch device
    or "auto"; head: "logps" or "reward", if it must be one of these; flag: what errors call it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: no CUDA device is available")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # each of torchrun's its own
    dtype = dtype or ("bf16" if torch.device(device).type == "cuda" else "fp32")
    directory = resolve(directory, flag)
    model = outline(directory, head, flag)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(dtype, dtype)
    model = model.to(dtype).to_empty(device=device)
    model.directory = directory
    load_weights(model, directory)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def load_weights(model, directory, local=lambda parameter: (parameter, slice(None))):
    """Fills the model's parameters from a HF directory.

    local(parameter) -> (tensor, rows): the part to fill and which rows of the whole it is. A
    sharded caller hands in its shards, so that no process ever reads more than its slices.
    """
    (_, stored), weights, c = read_config(directory), Weights(directory), model.config
    names = {name: hf_name(c.family, name) for name, _ in model.named_parameters()}
    head = hf_name(c.family, "head.weight")  # may be in the files, and not be used
    weights.refuse_rest({*names.values(), head})
    for name, parameter in model.named_parameters():
        tensor, rows = local(parameter)
        if name == "score.weight" and stored.head != "reward":
            tensor.zero_()  # a new reward head on a language model starts at r = 0
        else:
            tensor.copy_(weights.read(names[name], parameter.shape, rows))
    if c.tied and head in weights:  # some checkpoints have it twice
        tensor, rows = local(model.embed.weight)
        if not torch.equal(tensor, weights.read(head, (c.vocab, c.width), rows).to(tensor)):
            cure = "but config.json says tie_word_embeddings; set it to false there"
            raise UserError(f"{directory}: {head} differs from the embedding, {cure}")


def export(directory, config, tensors, source, dtype, template=None, **options):
    """Writes a HF directory that transformers and vLLM load; tensors: (our name, full tensor)."""
    stem = family_of(config.family).stem
    fields = {"architectures": [stem + HEADS[config.head]]} if stem else {}
    if config.head == "reward":
        fields |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    named = ((hf_name(config.family, name), tensor) for name, tensor in tensors)
    write_directory(directory, source, named, dtype, template, fields, **options)
