"""Computes what a training run will need of each GPU: `python evaluate.py plan --model DIR`.

Only config.json is read, and the model is built on the meta device: no weights, no GPU, a second.
"""

from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks

from evals.results import markdown_table
from hub.weights import resolve
from jobs.cli import CheckpointFlags, flag, require
from model import ScoredLogps, Transformer, read_config, rope_table

GPUS = (1, 4, 8)
HEADROOM = 0.9  # of a GPU's memory: CUDA, NCCL and fragmentation have the rest


@dataclass(frozen=True)
class PlanFlags(CheckpointFlags):
    row_tokens: int = flag(8192, "tokens per row", least=1)


def measure(config, tokens, dtype=torch.bfloat16):
    """Parameters of a model, and the bytes of rows of `tokens` tokens computed in `dtype`."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    count = sum(p.numel() for p in model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    stream = tokens * config.width * dtype.itemsize  # bytes of the residual stream
    one = saved_bytes(model.blocks[0], config, tokens, dtype)
    ends = 4 * stream  # embedding, final norm, scored states, their gradient
    return {
        "parameters": count,
        "largest block": max(blocks),  # parameters
        "root": count - sum(blocks),  # parameters outside blocks: embedding, final norm, head
        "block": one,  # bytes that backward needs of a row and block
        "activations": config.n_layers * one + ends,  # bytes that backward needs of a row
        "recomputed": config.n_layers * stream + one + ends,  # with --checkpoint_activations
        # a chunk of logits on CUDA, twice in fp32 and once in the compute dtype
        "head": 4 * ScoredLogps.LOGITS * (2 * 4 + dtype.itemsize),
    }


def saved_bytes(block, config, tokens, dtype, device="meta"):
    """Bytes that autograd keeps for the backward of one block, its parameters left out."""
    cos, sin = rope_table(config, torch.arange(tokens, device=device)[None], dtype)
    # left out: its parameters, and what all blocks share
    own = {t.untyped_storage()._cdata for t in (*block.parameters(), cos, sin)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    x = torch.zeros(1, tokens, config.width, dtype=dtype, device=device, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = block.body(x, cos, sin, Kernel.apply)  # alive: so no storage is counted twice
    return sum(kept.values()) if y.requires_grad else 0


class Kernel(torch.autograd.Function):
    """Stands for a fused attention kernel, which keeps q, k, v, its output and a log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v):
        y, logsumexp = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, y, logsumexp)
        return y


def per_gpu(sizes, n, dtype=torch.bfloat16):
    """{what: bytes} on each of n GPUs, as jobs.processes.shard lays a model of these sizes out.

    fp32 weights, gradients and AdamW's two moments are sharded. Gathered in the compute dtype are,
    on several GPUs, the root and two blocks (one computes, one is fetched), and in backward their
    gradients, of which one block's is copied to fp32 to be reduced; on one GPU, everything.
    """
    p, block, root = sizes["parameters"], sizes["largest block"], sizes["root"]
    share = 4 * -(-p // n)  # in fp32, rounded up
    gathered = (2 * block + root) + (block + root) if n > 1 else p + block
    parts = {"weights": share, "gradients": share, "optimizer": 2 * share}
    parts["gathered"] = gathered * dtype.itemsize + 4 * max(block, root)  # the latter to reduce
    return parts | {"head": sizes["head"]}


def memory_table(config, tokens, gpu_bytes=80 * 10**9):
    """The lines that are printed: one per number of GPUs, and what of a row fits beside it."""
    sizes, gb, rows = measure(config, tokens), 1e9, []
    row_sizes = sizes["activations"], sizes["recomputed"]
    kept = "{:.1f} GB for backward, {:.1f} GB".format(*(size / gb for size in row_sizes))
    yield (f"{sizes['parameters']:,} parameters; a row of {tokens} tokens keeps {kept} "
           "with --checkpoint_activations")  # fmt: skip
    for n in GPUS:
        parts = per_gpu(sizes, n)
        total = sum(parts.values())
        rows.append([str(n), *(f"{size / gb:.1f}" for size in (*parts.values(), total))])
        for row in row_sizes:
            fits = total + row <= HEADROOM * gpu_bytes
            rows[-1].append(f"{(total + row) / gb:.1f}{'' if fits else ' (too much)'}")
    yield from markdown_table(("GPUs", *parts, "sum", "+ row", "+ recomputed"), rows)
    yield (f"GB per GPU; too much: over {HEADROOM:.0%} of {gpu_bytes / gb:.0f} GB. "
           "--offload keeps weights, gradients and optimizer in CPU memory")  # fmt: skip


def plan(s):
    """Print parameters, and bytes per GPU, of a training run of --model."""
    require(s, "model")
    _, config = read_config(resolve(s.model))
    print("\n".join(memory_table(config, s.row_tokens)))
