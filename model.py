"""The transformer: a residual stream over rows, and scored heads.

Its blocks are Llama's (layers.py) or the family's own (variants.py), who sees whom is attend.py's,
its shape comes from families.py, its weights from weights.py; nothing here knows about ranks:
ranks.py shards from outside.

Legend: B batch, T tokens, S scored tokens, D width, H heads, C head width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from attend import Behind, Dense, Recording, in_pieces, row_attention, soft_cap, split
from heads import REWARDS
from hub.weights import load_weights, read_config, resolve
from layers import Block, rope_table
from rows import visible
from variants import BLOCKS


class Transformer(nn.Module):
    """forward(row) gives one fp32 value per scored token; logits(tokens) is the plain causal model.

    attention: "sdpa" (anywhere) or "flex" (CUDA: FlexAttention over the row's block mask).
    context_grad: whether a gradient passes through the tokens that predict no scored one.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.attention, self.context_grad = "sdpa", True
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
        if not self.context_grad and torch.is_grad_enabled():
            x = self.behind_context(row)
        else:
            attend = row_attention(row, self.config, self.attention)
            x = self.hidden(row.tokens[None], row.positions[None], attend)[0]  # (T, D)
            if self.config.head == "reward":
                return self.score(self.norm(x), row)
            x = x[row.source]
        x = self.norm(x)  # (S, D)
        return ScoredLogps.apply(x, self.head_weight, row.label, self.config.logit_cap)

    def behind_context(self, row):
        """(S, D) of row.source, with a gradient only through tokens that predict a scored one.

        What these need before them runs forward only, and they attend to its detached keys and
        values (InSPO D.5).
        """
        predicts, context, needed = split(row)
        with torch.no_grad():
            rules = in_pieces(row, self.config, needed)
            stored = [Recording(rule, context[needed]) for rule in rules]
            self.hidden(row.tokens[None, needed], row.positions[None, needed], stored)
        rules = in_pieces(row, self.config, predicts, context)
        rules = [Behind(rule, kept) for rule, kept in zip(rules, stored, strict=True)]
        x = self.hidden(row.tokens[None, predicts], row.positions[None, predicts], rules)[0]
        return x[(predicts.cumsum(0) - 1)[row.source]]

    def to_logits(self, x):
        """Residual stream after the last block (…, D) -> (…, V)."""
        return soft_cap(F.linear(self.norm(x), self.head_weight), self.config.logit_cap)

    def logits(self, tokens):
        """(B, T) ids -> (B, T, V): plain causal language model."""
        c = self.config
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        until = torch.full_like(positions[0], tokens.shape[1])
        masks = {w: visible(until, positions[0], w) for w in set(c.windows)}
        attend = [Dense(masks[w], c.scale, c.attn_cap) for w in c.windows]
        return self.to_logits(self.hidden(tokens, positions, attend))


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
