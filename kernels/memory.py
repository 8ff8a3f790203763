"""What a run needs of a GPU's memory: computed from config.json alone, on the meta device.

Read by training before it starts on CUDA, and printed by `python evaluate.py plan`.
"""

import torch
from torch.autograd.graph import saved_tensors_hooks

from model import ScoredLogps, Transformer, rope_table

HEADROOM = 0.9  # of a GPU's memory: CUDA, NCCL and fragmentation have the rest


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


def shortage(s, config, ranks):
    """What of a training run does not fit a GPU, and the flags that help; "" where it fits.

    s: settings of train.py with their defaults. Nothing is said of a CPU's memory.
    """
    if ranks.kind != "cuda":
        return ""
    room, world = HEADROOM * gpu_bytes(ranks.device), s.shard_group or ranks.world
    dtype = torch.bfloat16 if s.dtype == "bf16" else torch.float32
    sizes = measure(config, s.row_tokens, dtype)

    def need(recompute, offload):
        parts = per_gpu(sizes, world, dtype)
        kept = ("gathered", "head") if offload else parts
        return sum(parts[k] for k in kept) + sizes["recomputed" if recompute else "activations"]

    if (needed := need(s.checkpoint_activations, s.offload)) <= room:
        return ""
    helps = {"--checkpoint_activations": (True, s.offload), "--offload": (False, True),
             "--checkpoint_activations --offload": (True, True)}  # fmt: skip
    fits = [f"add {flags}" for flags, choice in helps.items() if need(*choice) <= room]
    cure = fits[0] if fits else "take more GPUs, or a smaller --row_tokens"
    return (f"memory: this run needs about {needed / 1e9:.1f} GB of each GPU, which has "
            f"{room / 1e9:.1f} to give; {cure}")  # fmt: skip


def gpu_bytes(device):
    return torch.cuda.get_device_properties(device).total_memory
