"""What a step takes of a GPU: bytes as the partitioner keeps them, and what is then recomputed."""

from pathlib import Path
from types import SimpleNamespace

import parity
import pytest
import torch

from bench import memory as bench
from kernels import memory
from model import config_of, read_config

SHAPES = Path(__file__).parents[2] / "bench" / "shapes"


@pytest.mark.parametrize("shape, kept", [("llama-3-8b", 1153), ("gemma-2-9b", 1209)])
def test_compiled_blocks_keep_what_inductor_kept_of_them(shape, kept):
    """MiB of a row of 8,192, as traced for an A100 with FlexAttention (cuda_build.py)."""
    _, config = read_config(SHAPES / shape)
    assert memory.measure(config, 8192)["block"] == pytest.approx(kept * 2**20, rel=0.001)


@pytest.mark.parametrize("name", ["Llama 3", "Qwen3", "Gemma 2", "Pythia"])
def test_compiled_blocks_keep_no_more_than_others(name):
    """But at least the inputs of attention and of the products."""
    config = config_of(parity.CONFIGS[name])
    compiled = memory.measure(config, 512, torch.float32)["block"]
    least = 512 * 4 * (3 * config.width + config.ffn)
    assert least < compiled <= bench.saved_bytes(config, 512)
    real = bench.saved_bytes(config, 512, "cpu")
    assert bench.saved_bytes(config, 512) == pytest.approx(real, rel=0.01)


def test_activations_of_a_linear_layer_by_hand():
    """y = relu(x W) keeps x (5 x 3, fp32) and which of y are 0 (5 x 2 bytes), and not W."""

    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2, bias=False, device="meta")

        def forward(self, x, cos, sin, attend):
            return self.linear(x).relu()

    config = config_of(parity.CONFIGS["Llama 3"] | {"hidden_size": 3, "head_dim": 2})
    assert memory.saved_bytes(Toy(), config, 5, torch.float32) == 4 * 15 + 10


def test_states_are_shared_among_gpus_and_gathered_ones_are_not():
    sizes = {"parameters": 800, "largest block": 10, "root": 100, "head": 7}
    alone, eight = memory.per_gpu(sizes, 1), memory.per_gpu(sizes, 8)
    assert [alone[k] for k in ("weights", "gradients", "optimizer")] == [3200, 3200, 6400]
    assert [eight[k] for k in ("weights", "gradients", "optimizer")] == [400, 400, 800]
    assert alone["gathered"] == 2 * (800 + 100) and eight["gathered"] == 2 * 2 * 100
    assert eight["in work"] == 2 * 3 * 10 + 4 * 10, "a chunk of logits is smaller"
    assert memory.per_gpu(sizes | {"head": 1000}, 8)["in work"] == 1000


@pytest.fixture
def settings():
    """settings(**changed): of a compiled run with rows of 8,192 tokens."""
    s = {"checkpoint_activations": None, "keep_activations": None, "compile": True}
    s |= {"row_tokens": 8192, "offload": False, "shard_group": None, "dtype": "bf16"}
    return lambda **changed: SimpleNamespace(**s | changed)


@pytest.mark.parametrize(
    "shape, gpus, gb, changed, recomputed, share",
    [
        ("llama-3-8b", 8, 80, {}, False, 1.0),
        ("llama-3-8b", 4, 80, {}, False, 0.75),  # 78 GB of 72 with all of it
        ("llama-3-8b", 8, 40, {}, False, 0.25),
        ("llama-3-8b", 8, 30, {}, True, 1.0),
        ("llama-3-8b", 4, 80, {"compile": False}, True, 1.0),
        ("llama-3-8b", 1, 80, {"offload": True}, False, 1.0),
        ("gemma-2-9b", 8, 80, {}, False, 0.75),
        ("gemma-2-9b", 8, 80, {"keep_activations": 0.5}, False, 0.5),
        ("llama-3-8b", 8, 80, {"checkpoint_activations": True}, True, 1.0),
        ("gemma-2-9b", 8, 80, {"checkpoint_activations": False}, False, 1.0),
        ("gemma-2-9b", 8, None, {}, False, 1.0),  # a CPU
    ],
)
def test_no_more_is_recomputed_than_must_be(
    shape, gpus, gb, changed, recomputed, share, settings, monkeypatch
):
    _, config = read_config(SHAPES / shape)
    monkeypatch.setattr(memory, "gpu_bytes", lambda device: gb * 10**9)
    ranks = SimpleNamespace(kind="cuda" if gb else "cpu", device=0, world=gpus)
    found = memory.fit_to_memory(settings(**changed), config, ranks)
    assert found == {"checkpoint_activations": recomputed, "keep_activations": share}


def test_the_share_that_is_kept_reaches_the_compiler(tiny_model_dir, monkeypatch):
    from jobs import processes

    set_, made = [], SimpleNamespace(blocks=[], to_empty=lambda device: None)
    monkeypatch.setattr(processes, "functorch_config", box := SimpleNamespace())
    monkeypatch.setattr(
        processes.fsdp, "fully_shard", lambda module, **options: set_.append(module)
    )
    s = SimpleNamespace(dtype="fp32", shard_group=None, offload=False, keep_activations=0.5)
    ranks = SimpleNamespace(world=1, kind="cpu", mesh=lambda group: None, device="cpu")
    processes.shard(made, s, ranks)
    assert box.activation_memory_budget == 0.5 and set_ == [made]
