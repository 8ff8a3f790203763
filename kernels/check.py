"""Holds a run's first row against the plain rule of model.py in fp32, before it trains.

So kernels that no test has seen run are tested where they are used, by the run's own attention
rule, compiled blocks, dtype, shards, weights and data. What rounding does is measured: as far as
the plain rule in the run's dtype is from fp32. No gradient, state or random number is left behind.
"""

import gc
from dataclasses import replace
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from jobs.cli import UserError
from jobs.processes import shard
from model import Transformer, plain_attention, rope_table

KINDS, TIMES, FLOOR = ("cuda",), 4, 0.01  # devices checked; let pass: times rounding, and 1%


def check_kernels(model, row, s, ranks):
    """Compares what a run computes of each rank's row with the plain rule; UserError if off."""
    exact, rounded = (_values(_twin(model, s, ranks, dtype), row) for dtype in ("fp32", s.dtype))
    own = _values(model, row)
    for what, right in exact.items():
        off = ((x[what] - right).norm() / right.norm().clamp(min=1e-12) for x in (own, rounded))
        gap, rounding = ranks.most(*(ratio.nan_to_num(torch.inf).item() for ratio in off))
        told = f"first row: {what} {gap:.1%} from the plain rule in fp32, rounding {rounding:.1%}"
        if not gap <= max(FLOOR, TIMES * rounding):
            raise UserError(f"{told}; try --no-compile, --attention sdpa, and report it")
    return told


def _twin(model, s, ranks, dtype):
    """The same weights and shards, in a model that computes by the plain rule in another dtype."""
    with torch.device("meta"):
        twin = Transformer(model.config)
    twin.attend = lambda row, c: [partial(_by_head, rule) for rule in plain_attention(row, c)]
    shard(twin, replace(s, compile=False, dtype=dtype), ranks)
    twin.load_state_dict(model.state_dict())
    return twin


def _by_head(rule, q, k, v):
    """The plain rule, a key head at a time: all scores at once might not fit."""
    heads = zip(q.split(q.shape[1] // k.shape[1], 1), k.split(1, 1), v.split(1, 1), strict=True)
    return torch.cat([checkpoint(rule, *qkv, use_reentrant=False) for qkv in heads], 1)


def _values(model, row):
    """{what: values}: of the first block of each window, what it adds to x; log-probabilities."""
    gc.collect()  # a model before this one: FSDP's hooks hold it in circles
    logps, found, c, end = model(row).detach(), {}, model.config, row.spans[-1][1]
    x, rules = model.embed(row.tokens[None]).detach(), model.attend(row, c)
    cos, sin = rope_table(c, row.positions[None], x.dtype)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    dy[:, end:] = 0  # on padding rules differ, and it reaches nobody
    for i in map(c.windows.index, dict.fromkeys(c.windows)):
        start, block, of = x.clone().requires_grad_(), model.blocks[i], f"block {i}'s"
        (y := block(start, cos, sin, rules[i])).backward(dy)
        found[f"{of} output"] = (y.detach().float() - x)[:, :end]
        found[f"{of} gradient"] = (start.grad.float() - dy)[:, :end]
        weights = {n: p.grad.to_local() for n, p in block.named_parameters() if p.ndim > 1}
        found |= {f"{of} gradient of {n}": g for n, g in weights.items()}
        model.zero_grad()
    return found | {"log-probabilities": logps}
