"""Sampling with a key/value cache: token ids in, token ids out.

From the bottom up: one token is drawn from logits, a cache makes a step cost one token per
sequence, and `complete` keeps the rows of a batch busy until its queue is empty. What is asked,
and in which words, is generate.py's.

Legend: B sequences at work, T new tokens of each, H heads, K key/value heads, G = H / K,
C head width, U slots in use, D width, V vocabulary.
"""

import functools
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from attend import attention

# ----------------------------------------------------------------------------- one token


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when a sequence ends."""

    max_new_tokens: int = 2048
    temperature: float = 0.7  # 0: the likeliest token
    top_p: float = 0.95  # mass of the nucleus that tokens are drawn from
    stop_ids: frozenset = frozenset()


def draw(logits, uniforms, sampling):
    """(B, V) logits and (B,) uniform numbers in [0, 1) -> (B,) token ids.

    Nucleus sampling (Holtzman et al. 2020): the smallest set of likeliest tokens that holds top_p
    of the mass, and of it the token in which the uniform number falls (inverse CDF).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / sampling.temperature).softmax(-1)  # (B, V)
    top, ids = likeliest(probs, sampling.top_p)
    keep = top.cumsum(-1) - top < sampling.top_p  # what is likelier does not fill the nucleus yet
    mass = (top * keep).cumsum(-1)
    place = torch.searchsorted(mass, uniforms[:, None] * mass[:, -1:], right=True)  # (B, 1)
    place = place.minimum(keep.sum(-1, keepdim=True) - 1)  # a uniform number may round up to 1
    return ids.gather(-1, place).squeeze(-1)


def likeliest(probs, top_p, few=256):
    """The likeliest tokens' probabilities, descending, and ids, (B, N) each, N enough for top_p.

    A nucleus seldom has hundreds of tokens, and sorting a whole vocabulary costs as much as a
    forward pass of a small model.
    """
    top, ids = probs.topk(min(few, probs.shape[-1]))
    enough = (top.sum(-1) >= top_p).all()
    return (top, ids) if enough else probs.sort(-1, descending=True)


# ----------------------------------------------------------------------------- the cache


class Cache:
    """Keys and values of a batch, per layer (2, B, K, U, C); slot t of a row holds position t.

    Rows are of unequal length and each fills slots of its own from 0 on, so there is no padding:
    who sees whom is a matter of positions alone. What a former sequence left in a row lies at
    positions that its successor overwrites before it can see them.

    static: a step looks at all rows and slots, whose number is a power of two, so that it keeps its
    shape for torch.compile; else at what is in use.
    """

    def __init__(self, model, rows, static=False):
        c = self.config = model.config
        self.rows, self.static = rows, static
        self.groups = c.heads // c.kv_heads
        new = model.embed.weight.new_zeros
        self.layers = [new(2, rows, c.kv_heads, 0, c.head_width) for _ in range(c.n_layers)]

    def attend(self, rows, positions, used):
        """What `Transformer.hidden` takes: one attention rule per layer.

        rows: slice of B rows; positions: (B, T) of the new tokens, which also are their slots;
        used: U, over the largest of them, and reserved.
        """
        c = self.config
        slots = torch.arange(used, device=positions.device)
        age = positions[:, None, :, None] - slots  # (B, 1, T, U)
        masks = {w: age >= 0 if w is None else (age >= 0) & (age < w) for w in set(c.windows)}
        # the G query heads of a key/value head attend as if they were G times as many queries
        masks = {w: mask.repeat(1, 1, self.groups, 1) for w, mask in masks.items()}
        return [
            Cached(*layer[:, rows, :, :used], positions, masks[window], c.scale, c.attn_cap)
            for layer, window in zip(self.layers, c.windows, strict=True)
        ]

    def reserve(self, used):
        """Make room for `used` slots, by powers of two -> the slots that a step looks at."""
        room = self.layers[0].shape[3]
        if used > room:
            more = max(256, 1 << (used - 1).bit_length()) - room
            for i, layer in enumerate(self.layers):  # zeros: a masked NaN would still spread
                self.layers[i] = F.pad(layer, (0, 0, 0, more))
        return self.layers[0].shape[3] if self.static else used

    def move(self, source, target):
        """Copy one row over another."""
        for layer in self.layers:
            layer[:, target] = layer[:, source]


@dataclass
class Cached:
    """The attention rule of one layer: store the new keys and values, then look at all."""

    keys: torch.Tensor  # (B, K, U, C), a view of the cache
    values: torch.Tensor
    positions: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, 1, G T, U)
    scale: float | None
    cap: float | None

    def __call__(self, q, k, v):
        rows = torch.arange(len(k), device=k.device)[:, None]  # (B, 1)
        self.keys.transpose(1, 2)[rows, self.positions] = k.transpose(1, 2)  # (B, T, K, C)
        self.values.transpose(1, 2)[rows, self.positions] = v.transpose(1, 2)
        q = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, K, G T, C)
        y = attention(q, self.keys, self.values, self.mask, self.scale, self.cap)
        return y.unflatten(2, (-1, k.shape[2])).flatten(1, 2)  # (B, H, T, C)


# ----------------------------------------------------------------------------- many sequences


@dataclass(eq=False)
class Sequence:
    """A prompt and what has been generated behind it.

    seed: any tuple of integers. A sequence draws its own random numbers, so what becomes of it
    depends on no other sequence of the batch (but for the rounding of the batch's matmuls).
    """

    prompt: list
    seed: tuple = (0,)
    on_token: object = None  # called with every id of the answer, as it comes
    tag: object = None  # whatever the caller wants to find again
    answer: list = field(default_factory=list)  # ids, without the one that stopped it
    finished: bool = False  # it stopped by itself

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)

    @property
    def last(self):
        return self.answer[-1] if self.answer else self.prompt[-1]

    def take(self, token, sampling):
        """Append a drawn token. Returns whether the sequence is at its end."""
        self.finished = token in sampling.stop_ids
        if not self.finished:
            self.answer.append(token)
            if self.on_token:
                self.on_token(token)
        return self.finished or len(self.answer) == sampling.max_new_tokens


def complete(model, queue, sampling, batch=16, static=False):
    """Yield the Sequences of a deque as they end; the caller may append to it meanwhile.

    At most `batch` are at work, and one that ends makes room for the next at once. static: with a
    static cache and a compiled step.
    """
    cache, active = Cache(model, batch, static), []
    while queue or active:
        while queue and len(active) < batch:
            active.append(queue.popleft())
            prefill(model, cache, len(active) - 1, active[-1].prompt)
        tokens = step(model, cache, active, sampling)
        ended = [row for row, seq in enumerate(active) if seq.take(tokens[row], sampling)]
        for row in reversed(ended):  # from the end, so that the last row is one that goes on
            yield active[row]
            cache.move(len(active) - 1, row)
            active[row] = active[-1]
            active.pop()


@torch.no_grad()
def prefill(model, cache, row, prompt):
    """Fill a row with all of a prompt but its last token, which the next step takes."""
    if len(prompt) > 1:
        tokens = torch.tensor(prompt[:-1], device=model.embed.weight.device)[None]  # (1, T)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        used = cache.reserve(len(prompt) - 1)
        model.hidden(tokens, positions, cache.attend(slice(row, row + 1), positions, used))


@torch.no_grad()
def step(model, cache, active, sampling):
    """Feed every sequence its last token and draw the next -> list of B ids."""
    device = model.embed.weight.device
    idle = [0] * (cache.rows - len(active)) if cache.static else []  # rows that nobody reads
    last = torch.tensor([seq.last for seq in active] + idle, device=device)
    places = [len(seq.prompt) + len(seq.answer) - 1 for seq in active]
    positions = torch.tensor(places + idle, device=device)
    used = cache.reserve(max(places) + 1)
    run = compiled(next_logits) if cache.static else next_logits
    logits = run(model, cache, last[:, None], positions[:, None], used)[: len(active)]
    uniforms = torch.tensor([seq.rng.random() for seq in active], device=device)
    return draw(logits, uniforms, sampling).tolist()


def next_logits(model, cache, last, positions, used):
    """(B, 1) last tokens and their positions -> (B, V) logits of the next."""
    attend = cache.attend(slice(0, len(last)), positions, used)
    x = model.hidden(last, positions, attend)  # (B, 1, D)
    return model.to_logits(x[:, 0])


@functools.cache
def compiled(function):
    """On CUDA the step is replayed as one graph: a small batch would wait for kernel launches."""
    return torch.compile(function, dynamic=False, mode="reduce-overhead")


def generate(model, prompts, sampling, seed=0, batch=16, on_token=None, static=False):
    """Token ids in, token ids out: a list of prompts -> a list of answers, in the same order.

    Prompt i draws its random numbers from (seed, i). on_token(i, token) is called as tokens come.
    static: a static cache and a compiled step.
    """

    def listener(i):
        return on_token and (lambda token: on_token(i, token))

    sequences = [Sequence(list(p), (seed, i), listener(i)) for i, p in enumerate(prompts)]
    for _ in complete(model, deque(sequences), sampling, batch, static):
        pass
    return [seq.answer for seq in sequences]
