"""What a run needs of a GPU's memory: computed from config.json alone, on the meta device.

Read by training before it starts on CUDA, and printed by `python evaluate.py plan`.
"""

import torch
from functorch.compile import aot_function, min_cut_rematerialization_partition
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor.decomposition import select_decomp_table
from torch.func import functional_call

from model import ScoredLogps, Transformer, rope_table

HEADROOM = 0.9  # of a GPU's memory: CUDA, NCCL and fragmentation have the rest
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the activations that compiled blocks would keep by themselves


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


def saved_bytes(block, config, tokens, dtype):
    """Bytes that the backward of one compiled block needs of its forward, parameters left out.

    torch.compile takes a block's operations apart and cuts their joint graph so that little is
    kept, and what is cheap is computed again. That alone is done here, on shapes: what is kept is
    what the forward graph gives out.
    """
    with torch.device("meta"):
        x = torch.zeros(1, tokens, config.width, dtype=dtype, requires_grad=True)
        cos, sin = rope_table(config, torch.arange(tokens)[None], dtype)
    names, parameters = zip(*block.named_parameters(), strict=True)
    kept = {}  # storage: its bytes, so that a view counts once

    def body(x, cos, sin, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return functional_call(block, named, (x, cos, sin, lambda *qkv: fused(*qkv)[0]))

    def forward(graph, inputs):
        *nodes, result = graph.graph.nodes
        shared = [node.meta["val"].untyped_storage()._cdata for node in nodes[1 : len(inputs)]]
        values = [node.meta.get("val") for node in result.args[0][1:]]  # behind the block's output
        storages = [v.untyped_storage() for v in values if isinstance(v, torch.Tensor)]
        kept.update((s._cdata, s.nbytes()) for s in storages if s._cdata not in shared)
        return graph.forward

    options = {"fw_compiler": forward, "bw_compiler": lambda graph, inputs: graph.forward}
    options |= {"decompositions": select_decomp_table()}  # apart, Gemma's norms keep 20% less
    cut = aot_function(body, partition_fn=min_cut_rematerialization_partition, **options)
    cut(x, cos, sin, *parameters)
    return sum(kept.values())


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward(grad: Tensor, kept: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in kept[:3]]


# stands for a fused attention kernel, which keeps q, k, v, its output and a log-sum-exp
fused = torch.library.custom_op("nanopo::attention", _attention, mutates_args=())
fused_backward = torch.library.custom_op("nanopo::backward", _backward, mutates_args=())
fused.register_fake(_attention)  # there are only shapes to compute
fused_backward.register_fake(_backward)
fused.register_autograd(
    lambda ctx, grad, _: tuple(fused_backward(grad, list(ctx.saved_tensors))),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def per_gpu(sizes, n, dtype=torch.bfloat16):
    """{what: bytes} on each of n GPUs, as jobs.processes.shard lays a model of these sizes out.

    fp32 weights, gradients and AdamW's two moments are sharded. Gathered in the compute dtype are,
    on several GPUs, the root with its gradient; on one GPU, everything. In work are either a chunk
    of the head's logits, or two blocks (one computes, one is fetched) and a gradient that waits to
    be reduced in fp32. The peak is in backward, while a row's activations are there.
    """
    p, block, root = sizes["parameters"], sizes["largest block"], sizes["root"]
    share = 4 * -(-p // n)  # in fp32, rounded up
    gathered = 2 * root if n > 1 else p + root
    working = max(sizes["head"], 3 * block * dtype.itemsize + 4 * block)
    parts = {"weights": share, "gradients": share, "optimizer": 2 * share}
    return parts | {"gathered": gathered * dtype.itemsize, "in work": working}


def fit_to_memory(s, config, ranks):
    """Computes {setting: value} of what is recomputed in backward, where --flags leave it open.

    On CUDA everything is kept where it fits; else compiled blocks keep the largest share of it that
    does; else nothing but each block's input is.
    """
    given = s.checkpoint_activations, s.keep_activations
    if given != (None, None) or ranks.kind != "cuda":
        return {"checkpoint_activations": bool(given[0]), "keep_activations": given[1] or 1.0}
    for share in SHARES if s.compile else SHARES[:1]:
        if needed(s, config, ranks, share) <= HEADROOM * gpu_bytes(ranks.device):
            return {"checkpoint_activations": False, "keep_activations": share}
    return {"checkpoint_activations": True, "keep_activations": 1.0}


def shortage(s, config, ranks):
    """What of a training run does not fit a GPU, and the flags that help; "" where it fits.

    s: settings of train.py with their defaults. Nothing is said of a CPU's memory.
    """
    if ranks.kind != "cuda":
        return ""
    given = s.keep_activations, s.checkpoint_activations, s.offload
    room, asked = HEADROOM * gpu_bytes(ranks.device), needed(s, config, ranks, *given)
    if asked <= room:
        return ""
    helps = {"--checkpoint_activations": (1.0, True, s.offload), "--offload": (1.0, False, True),
             "--checkpoint_activations --offload": (1.0, True, True)}  # fmt: skip
    fits = [flags for flags, choice in helps.items() if needed(s, config, ranks, *choice) <= room]
    cure = f"add {fits[0]}" if fits else "take more GPUs, or a smaller --row_tokens"
    return (f"memory: this run needs about {asked / 1e9:.1f} GB of each GPU, which has "
            f"{room / 1e9:.1f} to give; {cure}")  # fmt: skip


def needed(s, config, ranks, share, recompute=False, offload=None):
    """Bytes of a GPU in a run of train.py's settings, but for these; share: as keep_activations."""
    dtype = torch.bfloat16 if s.dtype == "bf16" else torch.float32
    with functorch_config.patch(activation_memory_budget=share):
        sizes = measure(config, s.row_tokens, dtype)
    parts = per_gpu(sizes, s.shard_group or ranks.world, dtype)
    if s.offload if offload is None else offload:  # then these are in CPU memory
        parts = {name: parts[name] for name in ("gathered", "in work")}
    return sum(parts.values()) + sizes["recomputed" if recompute else "activations"]


def gpu_bytes(device):
    return torch.cuda.get_device_properties(device).total_memory
