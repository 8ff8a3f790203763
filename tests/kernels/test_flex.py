"""FlexAttention equals the plain rule, backward too, and is compiled once per length of rows.

It has no backward on a CPU only because a check of the device says so; without that check it runs.
"""

import numpy as np
import parity
import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from runs import lines, train_here
from tries import random_paths

import train
from conftest import write_model
from data import build_row, lay_out, pack
from jobs.processes import compile_block
from kernels import flex
from model import load, plain_attention

FAMILIES = ["Llama 3", "Mistral 0.1", "Qwen2, sliding", "Qwen3", "Gemma 2", "Pythia"]
FAMILIES += ["GPT-NeoX, sequential"]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """FlexAttention as on CUDA, op by op."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    torch.compiler.reset()


def a_row(seed, pad_to=256):
    rng = np.random.default_rng(seed)
    return build_row([lay_out(random_paths(rng)) for _ in range(3)], range(3), 5, pad_to)


def values_and_gradients(model, row):
    out = model(row)
    return [out, *torch.autograd.grad(out.square().mean(), list(model.parameters()))]


@pytest.mark.parametrize("family", FAMILIES)
def test_flex_equals_the_plain_rule_in_values_and_gradients(family, tmp_path):
    """Of a whole model: grouped heads, windows, soft caps and partial rotation among them."""
    model = load(write_model(tmp_path, parity.CONFIGS[family])).requires_grad_(True)
    for seed in range(2):
        found = []
        for model.attend in (plain_attention, flex.attend):
            found.append(values_and_gradients(model, a_row(seed)))
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_traced_whole_and_once_per_length(family, tmp_path, monkeypatch):
    """Two graphs, with gradient and without, for all layers of a window and rows of a length."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    torch._dynamo.utils.counters.clear()  # of other tests
    traced = []

    def counted(graph, inputs):
        traced.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    model = load(write_model(tmp_path, parity.CONFIGS[family])).requires_grad_(True)
    expected = [values_and_gradients(model, a_row(seed, 256)) for seed in range(3)]
    for block in model.blocks:
        compile_block(block, "flex", counted)
    model.attend, graphs = flex.attend, 2 * len(set(model.config.windows))
    lengths = (256, 384) if family in ("Llama 3", "Gemma 2") else (256,)
    for n, length in enumerate(lengths, 1):
        for seed in range(3):
            with torch.no_grad():
                model(a_row(seed, length))
            found = values_and_gradients(model, a_row(seed, length))
            for mine, theirs in zip(found, expected[seed], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert len(traced) == n * graphs
    assert not torch._dynamo.utils.counters["graph_break"]


# ----------------------------------------------------------------------------- rows of one length


def test_rows_of_one_length_hold_all_items_in_few_lengths(for_all):
    """Whatever the sizes: whole, within the limit, equally many per rank, at most 8 an octave."""
    lengths = set()

    def check(rng):
        ranks, longest = rng.randint(1, 16), 2 ** rng.randint(5, 12)
        sizes = [rng.randint(1, longest) for _ in range(rng.randint(0, 200))]
        rows, length = flex.pack_alike(sizes, 8192, ranks)
        assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
        assert len(rows) % ranks == 0 and max(sum(sizes[i] for i in row) for row in rows) <= length
        assert len(rows) * length <= len(pack(sizes, 8192, ranks)) * 8192
        lengths.add(length)

    for_all(check)
    assert max(lengths) <= 8192 and not any(length % 128 for length in lengths)
    assert len({length for length in lengths if length > 4096}) <= 8


def test_a_run_with_padded_rows_has_the_losses_of_one_without(flags, monkeypatch, no_plots):
    """To rounding: 4 steps, an objective with contexts, rows of 512 tokens at most."""
    found, lengths, build = [], set(), train.build_row

    def watched(*args):
        lengths.add(args[3])
        return build(*args)

    monkeypatch.setattr(train, "build_row", watched)
    for attention in ("sdpa", "flex"):
        decided = train.processes.by_device(train.TrainFlags(compile=False), "cpu")
        decided |= {"attention": attention}
        monkeypatch.setattr(train.processes, "by_device", lambda s, kind, of=decided: of)
        out = f"{flags['out']}-{attention}"
        train_here(flags | {"row_tokens": 512, "out": out})
        found.append(lines(out))
    for plain, fused in zip(*found, strict=True):
        assert fused["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert fused["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
        assert 0.5 < fused["row_fill"] < 1
    assert 0 in lengths and len(lengths) > 1 and not any(n % 128 for n in lengths)


def test_more_rows_are_taken_where_they_need_less_padding():
    """Three items on two rows make both as long as two of them; on three rows nothing is empty."""
    assert flex.pack_alike([2100] * 3, 4608) == ([[0], [1], [2]], 2304)
    assert flex.pack_alike([], 4096, 2) == ([[], []], 128)
    assert flex.pack_alike([900], 1000) == ([[0]], 1000), "never over the limit"
