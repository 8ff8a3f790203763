"""The CUDA path held to account without a card: python tests/tools/cuda_build.py [CHECK …]

In an environment of its own with the CUDA build of torch (5 GB) and the requirements beside it:

    python -m venv cuda && cuda/bin/pip install torch===2.13.0 -r requirements.txt
    cuda/bin/python tests/tools/cuda_build.py

It prints the table of docs/guarantees.md, in some minutes. Nothing runs on a GPU: tensors are fake
(pretend.py), kernels are compiled by ptxas and not loaded, ranks are pretended.

kernels   compiled blocks of a published shape, with FlexAttention, forward and backward: the
          largest shared memory of a kernel under the card's limit, bytes kept against the plan's
step      sharded steps of 8 pretended ranks: forward, backward, clipping, AdamW; two row lengths
memory    the peak of pretended ranks against the plan's

Each check is a process: cuda_build.py CHECK ARGUMENT… runs one, and prints its row.
"""

import contextlib
import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "tools")]

SHAPES = ("llama-3-8b", "mistral-7b-v0.1", "qwen2-7b", "qwen3-8b", "gemma-2-9b", "pythia-2.8b")
CHECKS = [("kernels", shape, card) for shape in SHAPES for card in ("a100", "h100")]
CHECKS += [("step", "llama-3-8b", "a100", how) for how in ("kept", "recomputed")]
CHECKS += [("memory", "llama-3-8b", n, "kept") for n in ("4", "8", "64")]
CHECKS += [("memory", "llama-3-8b", "8", "recomputed"), ("memory", "gemma-2-9b", "8", "kept")]
CHECKS += [("memory", "llama-3.2-1b", "1", "kept")]


def config_named(shape, layers):
    """The Config of a shape of bench/shapes, with so many layers."""
    from model import read_config

    # two that differ from a published shape in what their kernels see
    based = {"mistral-7b-v0.1": "mistral-7b-v0.2", "qwen3-8b": "llama-3-8b"}
    _, config = read_config(ROOT / "bench" / "shapes" / based.get(shape, shape))
    windows = config.windows[:layers]
    if shape == "mistral-7b-v0.1":
        windows = (4096,) * layers
    family = "qwen3" if shape == "qwen3-8b" else config.family
    return dataclasses.replace(config, n_layers=layers, windows=windows, family=family)


def fake_model(config, dtype=None, device="cuda"):
    """A model without values; in FakeTensorMode."""
    import torch

    from model import Transformer

    torch.set_default_dtype(dtype or torch.float32)
    with torch.device(device):
        model = Transformer(config)
    torch.set_default_dtype(torch.float32)
    return model


def fake_row(size, device="cuda"):
    """A row of so many tokens, half of them scored, without values."""
    import torch

    from data import Row

    vector = [torch.zeros(n, dtype=torch.long, device=device) for n in [size] * 3 + [size // 2] * 3]
    return Row(*vector, spans=[(0, size)], pairs=[0, 1, 2, 3], n_paths=4)


def kernels(shape, card, size="8192"):
    """One row: what of a shape, on which card, graphs, shared memory, bytes kept, those planned."""
    import pretend

    properties, compiled = pretend.start(card)
    import torch
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._subclasses.fake_tensor import FakeTensorMode

    from jobs.processes import compile_block
    from kernels import flex, memory
    from model import rope_table

    tokens, kept, graphs = int(size), [], []
    config = config_named(shape, layers=2)

    def inner(graph, inputs, **options):
        if not options.get("is_backward"):
            outputs = next(iter(reversed(graph.graph.nodes))).args[0][1:]
            graphs.append(graph)
            kept.append(kept_bytes(outputs, tokens, config.width))
        compile_fx_inner(graph, inputs, **options)  # it is compiled, and then run as it is
        return boxed(graph.forward)

    def backend(graph, inputs):
        return compile_fx(graph, inputs, inner_compile=inner)

    with FakeTensorMode():
        blocks = fake_model(config, torch.bfloat16).blocks
        options = {"dtype": torch.bfloat16, "device": "cuda", "requires_grad": True}
        x = torch.zeros(1, tokens, config.width, **options)
        row = fake_row(tokens)
        cos, sin = rope_table(config, row.positions[None], x.dtype)
        for block, rule in zip(blocks, flex.attend(row, config), strict=True):
            compile_block(block, "flex", backend)
            x = block(x, cos, sin, rule)
        x.sum().backward()
    assert all(p.grad is not None for p in blocks.parameters())
    assert len(graphs) == len(set(config.windows)), "one graph for all layers of a window"
    assert not torch._dynamo.utils.counters["graph_break"], "a block was not traced whole"
    shared, limit = max(n for _, n in compiled), properties.shared_memory_per_block_optin
    assert shared <= limit, f"{shared} bytes of shared memory, {limit} are there"
    found, planned = kept[0], memory.measure(config, tokens)["block"]
    assert abs(found / planned - 1) < 0.15, f"{found} bytes are kept, {planned} planned"
    cells = f"{len(compiled)} kernels compiled, {shared / 1024:.0f} of {limit / 1024:.0f} KB"
    cells += f" shared; keeps {found / 2**20:.0f} MiB a layer, planned {planned / 2**20:.0f}"
    return f"{shape}, {card}", cells


def pretended_ranks(world, kind):
    """(what processes.shard asks of the ranks, settings of a run) as rank 0 of so many."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    mesh = init_device_mesh(kind, (world,))
    ranks = SimpleNamespace(world=world, kind=kind, mesh=lambda group: mesh)
    ranks.device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    settings = {"dtype": "bf16", "shard_group": None, "offload": False, "compile": False}
    settings |= {"checkpoint_activations": False, "keep_activations": 1.0, "attention": "flex"}
    return ranks, settings


def step(shape, card, recompute):
    """One row: a whole step, for rows of two lengths with a pass without gradient between."""
    import pretend

    pretend.start(card)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    from jobs import processes
    from kernels import flex

    ranks, settings = pretended_ranks(8, "cuda")
    settings["checkpoint_activations"] = recompute == "recomputed"
    config, traced = config_named(shape, layers=4), []

    def counted(graph, inputs):
        traced.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(config)
        model.attend = flex.attend
        for block in model.blocks:
            processes.compile_block(block, "flex", counted)
        model.to_empty = lambda device: None  # it is there, as far as a fake tensor can be
        processes.shard(model, SimpleNamespace(**settings), ranks)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        for size in (1024, 2048, 1024):
            for last in (False, True):
                processes.reduce_gradients(model, ranks.world, last)
                model(fake_row(size)).sum().backward()
            with torch.no_grad():
                model(fake_row(size))
            for unit in (*model.blocks, model):
                unit.reshard()
            gradients = [p.grad for p in model.parameters()]
            norm = get_total_norm(gradients).full_tensor()
            assert all(g.dtype == torch.float32 for g in gradients)
            clip_grads_with_norm_(model.parameters(), 1.0, norm)
            optimizer.step()
            optimizer.zero_grad()
    graphs = 2 * 2 * len(set(config.windows))  # lengths, with gradient and without
    assert len(traced) == graphs, f"{len(traced)} graphs, {graphs} are enough"
    assert not torch._dynamo.utils.counters["graph_break"]
    cells = "3 steps of 2 rows, clipped, fused AdamW: "
    return f"{shape}, {recompute}", f"{cells}{len(traced)} graphs for two lengths, no break"


def memory(shape, world, recompute, size="8192"):
    """One row: the peak of a pretended rank while a row goes forward and backward; the plan's."""
    from live import Live
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._subclasses.fake_tensor import FakeTensorMode

    from jobs import processes
    from kernels import memory
    from model import ScoredLogps, read_config

    ranks, settings = pretended_ranks(int(world), "cpu")
    recomputed, tokens = recompute == "recomputed", int(size)
    settings["checkpoint_activations"] = recomputed
    _, config = read_config(ROOT / "bench" / "shapes" / shape)
    graph = lambda graph, inputs: boxed(graph.forward)  # noqa: E731
    cut = aot_autograd(fw_compiler=graph, partition_fn=min_cut_rematerialization_partition)
    sizes = memory.measure(config, tokens)
    planned = sum(memory.per_gpu(sizes, ranks.world).values())
    planned += sizes["recomputed" if recomputed else "activations"]
    ScoredLogps.LOGITS *= 4  # as many as on CUDA
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(config, device="cpu")
        model.attend = lambda row, config: [lambda *qkv: memory.fused(*qkv)[0]] * config.n_layers
        for block in model.blocks:
            processes.compile_block(block, "flex", cut)
        model.to_empty = lambda device: None
        processes.shard(model, SimpleNamespace(**settings), ranks)
        row = fake_row(tokens, "cpu")
        with Live([p._local_tensor for p in model.parameters()]) as live:
            for last in (False, True):
                processes.reduce_gradients(model, ranks.world, last)
                model(row).sum().backward()
    moments = sum(2 * p._local_tensor.nbytes for p in model.parameters())
    found = live.peak + moments
    assert abs(found / planned - 1) < 0.15, f"{found / 1e9:.1f} GB, {planned / 1e9:.1f} planned"
    cells = f"peak {found / 1e9:.1f} GB, planned {planned / 1e9:.1f}"
    return f"{shape}, {world} ranks, {recompute}", cells


def boxed(function):
    from functorch.compile import make_boxed_func

    return make_boxed_func(function)


def kept_bytes(outputs, tokens, width):
    """Bytes of what a forward graph hands to its backward, parameters left out."""
    import torch

    stream, sizes = (1, tokens, width), {}
    for node in outputs:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and (node.op != "placeholder" or value.shape == stream):
            storage = value.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def main():
    words = sys.argv[1:]
    if len(words) > 1:  # one check, in this process
        with contextlib.redirect_stdout(sys.stderr):
            told = globals()[words[0]](*words[1:])
        return print(json.dumps(told))
    chosen = [check for check in CHECKS if not words or check[0] == words[0]]
    print("| check | of | result |\n| --- | --- | --- |", flush=True)
    failed = False
    with ThreadPoolExecutor(2) as pool:
        for (name, *_), (of, told) in zip(chosen, pool.map(alone, chosen), strict=True):
            print(f"| {name} | {of} | {told} |", flush=True)
            failed |= told.startswith("FAILED")
    sys.exit(failed)


def alone(check):
    """(what of, result) of one check in a process of its own."""
    words = [sys.executable, __file__, *check]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        return ", ".join(check[1:]), f"FAILED: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
