"""The CUDA path held to account without a card: python tests/tools/cuda_build.py [CHECK …]

In an environment of its own with the CUDA build of torch (5 GB) and the requirements beside it:

    python -m venv cuda && cuda/bin/pip install torch===2.13.0 -r requirements.txt
    cuda/bin/python tests/tools/cuda_build.py

It prints the table of docs/guarantees.md, in under ten minutes. Nothing runs on a GPU: tensors
are fake (pretend.py), kernels compiled by ptxas and not loaded, or interpreted (interpreted.py),
ranks pretended.

kernels      compiled blocks of a published shape, with FlexAttention, forward and backward: the
             largest shared memory of a kernel under the card's limit, bytes kept against the plan's
interpreter  the same kernels of narrower blocks, run in bf16 by Triton's interpreter on a row of
             tries: values and all gradients against SDPA under a dense mask, in fp32
step         sharded steps of 8 pretended ranks: forward, backward, clipping, AdamW; two row lengths
memory       the peak of pretended ranks against the plan's

Each check is a process: cuda_build.py CHECK ARGUMENT… runs one, and prints its row.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "tools")]

SHAPES = ("llama-3-8b", "mistral-7b-v0.1", "qwen2-7b", "qwen3-8b", "gemma-2-9b", "pythia-2.8b")
BOTH, HALVED = ("a100", "h100"), ("llama-3-8b", "gemma-2-9b")
CHECKS = []  # those of a row of the table side by side
for shape in SHAPES:
    CHECKS += [("kernels", shape, card) for card in BOTH]
    CHECKS += [("kernels", shape, "a100", "half")] * (shape in HALVED)
CHECKS += [("interpreter", shape, card) for card in BOTH for shape in SHAPES]
CHECKS += [("step", "llama-3-8b", "a100", how) for how in ("kept", "recomputed")]
CHECKS += [("memory", "llama-3-8b", n, "kept") for n in ("4", "8", "64")]
CHECKS += [("memory", "llama-3-8b", "8", how) for how in ("half", "recomputed")]
CHECKS += [("memory", "gemma-2-9b", "8", how) for how in ("kept", "half")]
CHECKS += [("memory", "llama-3.2-1b", "1", "kept")]
HALF = {"half": 0.5}  # --keep_activations; else all is kept, or recomputed


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
    """A model, which in FakeTensorMode has no values."""
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


def kernels(shape, card, how="kept", size="8192"):
    """One row: shared memory and the card's limit; bytes kept and those planned."""
    import pretend

    properties, compiled = pretend.start(card)
    import torch
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._subclasses.fake_tensor import FakeTensorMode

    from jobs.processes import compile_block
    from kernels import flex, memory
    from model import rope_table

    tokens, kept, graphs = int(size), [], []
    config = config_named(shape, layers=2)
    functorch_config.activation_memory_budget = HALF.get(how, 1.0)

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
    cells = f"{named(card, how)} {shared / 1024:.0f}/{limit / 1024:.0f}"
    return shape, f"{cells}, {found / 2**20:.0f}/{planned / 2**20:.0f}"


def interpreter(shape, card):
    """One row: the largest difference of a narrow block's compiled values and gradients."""
    os.environ["TRITON_INTERPRET"] = "1"  # before there is a Triton
    import pretend

    pretend.start(card)
    import torch
    from interpreted import Shadows, mend

    from jobs.processes import compile_block
    from kernels import chains, flex
    from model import rope_table, visible

    mend()
    torch.default_generator.manual_seed(0)
    config, row, shadows = narrow(config_named(shape, layers=2)), row_of_tries(384), Shadows()
    fakes, exact = shadowed_model(config, shadows)
    size = (1, len(row.tokens), config.width)
    given = [torch.randn(size).bfloat16() for _ in range(2)]  # input, gradient of the output
    given += rope_table(config, row.positions[None], torch.bfloat16)
    vectors = {name: v for name, v in vars(row).items() if torch.is_tensor(v)}
    fake_row = dataclasses.replace(row, **{name: shadows.fake(v) for name, v in vectors.items()})
    worst = 0
    for layer in {window: i for i, window in enumerate(config.windows)}.values():
        with shadows.mode:
            rule = flex.attend(fake_row, config)[layer]
        rules = rule, flex.attend(row, config)[layer]
        masks = [vars(rule.keywords["block_mask"]).values() for rule in rules]
        for fake, value in zip(*masks, strict=True):
            shadows.put(fake, value)
        compile_block(block := fakes.blocks[layer], "flex", shadows.backend)
        inputs = [shadows.fake(v) for v in given]
        with shadows.mode:
            found = gradients(block, *inputs, rule)
        mask = visible(row.until, row.positions, config.windows[layer])
        dense = partial(chains.fast_attention, mask=mask, scale=config.scale, cap=config.attn_cap)
        expected = gradients(exact.blocks[layer], *(v.float() for v in given), dense)
        for mine, theirs in zip(map(shadows.value, found), expected, strict=True):
            worst = max(worst, ((mine.float() - theirs).norm() / theirs.norm()).item())
    assert worst < 0.02, f"values and gradients differ by {worst:.1%} from SDPA's"
    return card, f"{shape} {worst:.1%}"


def narrow(config):
    """A Config of the same kinds of layers, of sizes for the interpreter; heads are as wide."""
    few = {"width": 128, "ffn": 256, "vocab": 64, "heads": 2}
    few |= {"kv_heads": 2 if config.heads == config.kv_heads else 1}
    few |= {"windows": tuple(w and 100 for w in config.windows), "attn_cap": config.attn_cap and 2}
    return dataclasses.replace(config, **few)


def shadowed_model(config, shadows):
    """(a fake model in bf16 with random values behind it, a real one of the same in fp32)."""
    import torch

    exact = fake_model(config, device="cpu")
    with shadows.mode:
        fakes = fake_model(config, torch.bfloat16)
    for fake, p in zip(fakes.parameters(), exact.parameters(), strict=True):
        torch.nn.init.normal_(p, p.dim() == 1, 0.3 if p.dim() == 1 else p.shape[-1] ** -0.5)
        shadows.put(fake, p.detach().bfloat16())
        p.data = p.data.bfloat16().float()
    return fakes, exact


def gradients(block, x, grad, *rest):
    """[output, gradients of the input and of every parameter] of a block."""
    import torch

    out = block(x.requires_grad_(), *rest)
    return [out, *torch.autograd.grad(out, (x, *block.parameters()), grad)]


def row_of_tries(size):
    """A row of two pairs as ins_dpo has them, the first over several blocks of 128, and padding."""
    import numpy as np

    from data import build_row, lay_out

    def trie(*sizes):
        x, w, l, sep = (np.arange(n, dtype=np.int32) + n for n in sizes)  # noqa: E741
        return lay_out([([x, sep, l, sep, w], len(w)), ([x, sep, w, sep, l], len(l))])

    return build_row([trie(130, 50, 40, 2), trie(10, 9, 8, 1)], [0, 1], 2, size)


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


def step(shape, card, how):
    """One row: a whole step, for rows of two lengths with a pass without gradient between."""
    import pretend

    pretend.start(card)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    from jobs import processes
    from kernels import flex

    ranks, settings = pretended_ranks(8, "cuda")
    settings["checkpoint_activations"] = how == "recomputed"
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
    return shape, named(how, f"{len(traced)} graphs", "no break")


def memory(shape, world, how, size="8192"):
    """One row: the peak of a pretended rank while a row goes forward and backward; the plan's."""
    from live import Live
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch import config as functorch_config
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    from jobs import processes
    from kernels import memory
    from model import ScoredLogps, read_config

    ranks, settings = pretended_ranks(int(world), "cpu")
    recomputed, tokens = how == "recomputed", int(size)
    settings |= {"checkpoint_activations": recomputed, "keep_activations": HALF.get(how, 1.0)}
    functorch_config.activation_memory_budget = settings["keep_activations"]
    _, config = read_config(ROOT / "bench" / "shapes" / shape)
    graph = lambda graph, inputs: boxed(graph.forward)  # noqa: E731
    options = {"partition_fn": min_cut_rematerialization_partition}
    options |= {"decompositions": select_decomp_table()}  # as inductor does
    cut = aot_autograd(fw_compiler=graph, **options)
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
    return shape, f"{named(world, how)}: {found / 1e9:.1f}/{planned / 1e9:.1f}"


def named(*words):
    """What a result is of; that all is kept is not said."""
    return ", ".join(word for word in words if word != "kept")


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
        for (name, of), rows in itertools.groupby(pool.map(alone, chosen), lambda row: row[:2]):
            told = "; ".join(row[2] for row in rows)
            print(f"| {name} | {of} | {told} |", flush=True)
            failed |= "FAILED" in told
    sys.exit(failed)


def alone(check):
    """(check, what of, result) of one check in a process of its own."""
    words = [sys.executable, __file__, *check]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        *_, fault = ["?", *done.stderr.strip().splitlines()]
        return check[0], ", ".join(check[1:]), f"FAILED: {fault}"
    return check[0], *json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
