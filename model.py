"""The transformer: a residual stream over rows, and scored heads.

Its blocks are Llama's (layers.py) or the family's own (variants.py), who sees whom is attend.py's,
its shape comes from families.py, its weights from weights.py; nothing here knows about ranks:
ranks.py shards from outside.

Legend: B batch, T tokens, S scored tokens, D width, H heads, C head width, V vocabulary.
"""

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from heads import REWARDS
from hub.weights import load_weights, read_config, resolve
from layers import Block, rope_table
from variants import BLOCKS

# ----------------------------------------------------------------------------- attention


def sees(q, k, until, positions, window=None):
    """Whether row index q attends to row index k, as tensors that broadcast -> bool.

    window: sliding window in tokens, which counts along the path.
    """
    inside = (k <= q) & (q < until[k])
    return inside if window is None else inside & (positions[q] - positions[k] < window)


def visible(until, positions, window=None):
    """(T query, T key) bool: the attention rule as a dense mask."""
    index = torch.arange(len(until), device=until.device)
    return sees(index[:, None], index[None, :], until, positions, window)


def plain_attention(row, config):
    """One attention rule per layer, (q, k, v) -> y, under the row's dense mask.

    row: anything with `until` and `positions`, (T,) each.
    """
    masks = {w: visible(row.until, row.positions, w) for w in set(config.windows)}
    known = {"scale": config.scale, "cap": config.attn_cap}
    return [partial(masked_attention, mask=masks[w], **known) for w in config.windows]


def masked_attention(q, k, v, mask, scale=None, cap=None):
    """softmax(q k^T scale) v over the keys that `mask` lets see.

    q: (B, H, T, C), k, v: (B, K, U, C), mask: (T, U) or (B, 1, T, U) bool -> (B, H, T, C).
    """
    if cap is not None:  # SDPA has none
        return explicit_attention(q, k, v, mask, scale, cap)
    if q.is_cuda:  # there, no kernel but the one that keeps all scores takes fewer key heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def explicit_attention(q, k, v, mask, scale=None, cap=None):
    """softmax(cap tanh(q k^T scale / cap)) v, where the (H, T, U) probabilities are kept.

    Shapes as in `masked_attention`. The heads that share a key head are the rows of one product.
    """
    (batch, heads, size, width), groups = q.shape, k.shape[1]
    scale = width**-0.5 if scale is None else scale
    grouped = (q * scale).reshape(batch, groups, -1, width)  # (B, K, H/K T, C)
    scores = soft_cap(grouped @ k.mT, cap).view(batch, heads, size, -1)  # (B, H, T, U)
    hidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    weights = (scores + hidden).softmax(-1).view(batch, groups, -1, k.shape[2])
    return (weights @ v).view(batch, heads, size, v.shape[-1])


def soft_cap(x, cap):
    """cap * tanh(x / cap), which keeps x within (-cap, cap); x itself where there is no cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


# ----------------------------------------------------------------------------- the transformer


def scored_states(model, row):
    """(S, D) residual stream at the tokens that predict the scored ones."""
    return model.row_states(row)[row.source]


class Transformer(nn.Module):
    """forward(row) gives one fp32 value per scored token; logits(tokens) is the plain causal model.

    attend: (row, config) -> one attention rule per layer; kernels/ has faster ones.
    states: (model, row) -> (S, D) that predict the scored tokens.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.attend, self.states = plain_attention, scored_states
        block = BLOCKS.get(c.family, Block)
        self.embed = block.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(block(c) for _ in range(c.n_layers))
        self.norm = block.Norm(c.width, c.eps)
        if c.head == "reward":
            self.score = REWARDS[c.score](c)
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
        c = self.config
        cos, sin = rope_table(c.rope, c.rotary or c.head_width, positions, x.dtype)
        for block, rule in zip(self.blocks, attend, strict=True):
            x = block(x, cos, sin, rule)
        return x

    def forward(self, row):
        """Row -> (S,) fp32: log-probabilities of the labels, or scalar rewards."""
        if self.config.head == "reward":
            return self.score(self.norm(self.row_states(row)), row)
        x = self.norm(self.states(self, row))  # (S, D)
        return ScoredLogps.apply(x, self.head_weight, row.label, self.config.logit_cap)

    def row_states(self, row):
        """(T, D) residual stream of a row."""
        rules = self.attend(row, self.config)
        return self.hidden(row.tokens[None], row.positions[None], rules)[0]

    def to_logits(self, x):
        """Residual stream after the last block (…, D) -> (…, V)."""
        return soft_cap(F.linear(self.norm(x), self.head_weight), self.config.logit_cap)

    def logits(self, tokens):
        """(B, T) ids -> (B, T, V): plain causal language model."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        path = SimpleNamespace(
            positions=positions, until=torch.full_like(positions, len(positions))
        )
        rules = plain_attention(path, self.config)
        return self.to_logits(self.hidden(tokens, positions.expand_as(tokens), rules))


def load(directory, dtype=torch.float32, device="cpu"):
    """HF directory -> Transformer in eval mode on one device."""
    directory = resolve(directory)
    _, config = read_config(directory)
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device)
    load_weights(model, directory)
    return model.eval().requires_grad_(False)


# ----------------------------------------------------------------------------- scored head


class ScoredLogps(torch.autograd.Function):
    """log softmax(soft_cap(x W^T))[label] per scored token, a chunk of logits at a time.

    x: (S, D), weight: (V, D), label: (S,), cap: number or None -> (S,) fp32. The (S, V) matrix
    never exists: logits of a chunk are made in forward, dropped, and made again in backward. Those
    of the last chunk are kept, since backward begins where forward ends.
    """

    LOGITS = 2**26  # of one chunk

    @staticmethod
    def forward(ctx, x, weight, label, cap=None):
        logps = torch.empty(len(x), device=x.device)
        logsumexp, logits = torch.empty_like(logps), None
        for part in ScoredLogps._chunks(x, weight):
            del logits  # of the chunk before, to make room
            logits = soft_cap((x[part] @ weight.T).float(), cap)  # (chunk, V)
            logsumexp[part] = logits.logsumexp(-1)
            logps[part] = logits.gather(-1, label[part, None]).squeeze(-1) - logsumexp[part]
        ctx.save_for_backward(x, weight, label, logsumexp)
        ctx.cap, ctx.last = cap, logits
        return logps

    @staticmethod
    def backward(ctx, grad):
        """d logp / d logits = onehot(label) - softmax; and of the cap, 1 - (capped / cap)^2."""
        x, weight, label, logsumexp = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        last, ctx.last = ctx.last, None
        for part in reversed(ScoredLogps._chunks(x, weight)):
            d = soft_cap((x[part] @ weight.T).float(), ctx.cap) if last is None else last
            last = None  # (chunk, V)
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
        size = max(1, ScoredLogps.LOGITS // len(weight))
        return [slice(start, start + size) for start in range(0, len(x), size)]
