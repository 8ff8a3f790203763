"""A start that checks itself: kernels that are wrong stop a run, rounding does not, no trace."""

import dataclasses
import gc
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import parity
import pytest
import torch
import torch.distributed as dist
import torch.nn.attention.flex_attention as torch_flex
from dialogues import say
from ranks import on_ranks
from runs import final, lines, train_here
from torch.distributed.tensor import DTensor
from tries import random_paths

import model as model_file
import train
from conftest import PAIRS, write_model
from data import Dataset, Limits, build_row, lay_out
from hub.template import Template
from jobs.cli import UserError
from jobs.processes import Ranks, compile_block
from kernels import chains, check, flex
from losses import recipe
from model import plain_attention
from pairs.layouts import Pair

FAMILIES = ["Llama 3", "Mistral 0.1", "Qwen2, sliding", "Qwen3", "Gemma 2", "Pythia"]
FAMILIES += ["GPT-NeoX, sequential"]
HEALTHY = [("ins_dpo", chains.attend, "bf16"), ("ifsr_dpo", flex.attend, "bf16")]
HEALTHY += [("ins_dpo", flex.attend, "fp32")]
SETTINGS = train.TrainFlags(compile=False, attention="sdpa")


@pytest.fixture
def ranks():
    yield Ranks("cpu")
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def swift(monkeypatch):
    """What lies in circles may stay: there is a lot of it in a process of many tests."""
    monkeypatch.setattr(check, "gc", SimpleNamespace(collect=lambda: None))


@pytest.fixture
def flex_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def sharded(directory, ranks, attend=chains.attend, dtype="bf16", **flags):
    """(model as train.py builds it, its settings)."""
    s = dataclasses.replace(SETTINGS, dtype=dtype, **flags)
    model = train.build_model(s, ranks, directory, None)
    model.attend = attend
    return model, s


def row_of(directory, loss, pad_to=0):
    """A row of one pair of an objective."""
    pair, rule = Pair(say(PAIRS[0]["prompt"]), "13.", "Who knows.", ""), recipe(loss)
    dataset = Dataset([pair], Template(directory), rule, Limits(256, 1.0), "another")
    return build_row([dataset.trie(0, rule.paths)], [0], len(rule.paths), pad_to)


def random_row(seed=0, tries=3):
    rng = np.random.default_rng(seed)
    return build_row([lay_out(random_paths(rng)) for _ in range(tries)], range(tries), 5, 256)


# ----------------------------------------------------------------------------- what passes


@pytest.mark.parametrize("loss, attend, dtype", HEALTHY)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_healthy_run_passes(
    family, loss, attend, dtype, ranks, flex_on_a_cpu, tmp_path, monkeypatch
):
    """Every family and both bridges, padded rows: within half of what is let pass."""
    monkeypatch.setattr(check, "TIMES", check.TIMES / 2)
    directory = write_model(tmp_path, parity.CONFIGS[family])
    model, s = sharded(directory, ranks, attend, dtype)
    told = check.check_kernels(model, row_of(directory, loss, 384), s, ranks)
    assert "log-probabilities 0." in told and "rounding 0." in told


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_fused_attention_of_a_real_model_differs_from_the_plain_rule_by_rounding(
    dtype, ranks, monkeypatch
):
    """The embedded start, by torch's fused kernel, which rounds less than the plain rule."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def fused(q, k, v, mask, scale=None, cap=None):
        return attention(q, k, v, mask, scale=scale, enable_gqa=True)

    monkeypatch.setattr(chains, "fast_attention", fused)
    start = train.ASSETS / "start"
    model, s = sharded(start, ranks, dtype=dtype)
    check.check_kernels(model, row_of(start, "ins_dpo"), s, ranks)


def test_contexts_without_gradient_and_a_new_reward_head_pass(ranks, tiny_model_dir):
    """The one with its weights offloaded, too."""
    model, s = sharded(tiny_model_dir, ranks, context_grad=False, offload=True)
    check.check_kernels(model, row_of(tiny_model_dir, "ins_dpo"), s, ranks)
    model = train.build_model(s, ranks, tiny_model_dir, "reward")
    check.check_kernels(model, row_of(tiny_model_dir, "reward"), s, ranks)


# ----------------------------------------------------------------------------- what stops


def changed_row(change):
    return lambda row, c: plain_attention(SimpleNamespace(**vars(row) | change(row)), c)


def changed_config(change):
    return lambda row, c: plain_attention(row, dataclasses.replace(c, **change(c)))


def changed_gradient(which, share):
    """Values are right; of the gradient of q, k or v only a share passes."""

    def attend(row, c):
        return [partial(rule_of, rule) for rule in plain_attention(row, c)]

    def rule_of(rule, *qkv):
        qkv = list(qkv)
        qkv[which] = share * qkv[which] + (1 - share) * qkv[which].detach()
        return rule(*qkv)

    return attend


def not_itself(row, c):
    """A token does not see itself, unless it is the first of its path."""

    def mask(window):
        itself = torch.eye(len(row.tokens), dtype=torch.bool)
        seen = model_file.visible(row.until, row.positions, window)
        return torch.where(itself & (row.positions > 0), False, seen)

    options = {"scale": c.scale, "cap": c.attn_cap}
    return [partial(model_file.masked_attention, mask=mask(w), **options) for w in c.windows]


FAULTS = {
    "beyond the branch": changed_row(lambda row: {"until": row.until + 1}),
    "branches see one another": changed_row(lambda row: {"until": row.until * 0 + 256}),
    "not itself": not_itself,
    "scale": changed_config(lambda c: {"scale": 1.2 * (c.scale or c.head_width**-0.5)}),
    "window ignored": changed_config(lambda c: {"windows": (None,) * c.n_layers}),
    "window of one more": changed_config(lambda c: {"windows": [w and w + 1 for w in c.windows]}),
    "cap dropped": changed_config(lambda c: {"attn_cap": None}),
    "q": changed_gradient(0, 0.5),
    "k": changed_gradient(1, 0.5),
    "v": changed_gradient(2, 0.5),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_stops_in_one_line(fault, ranks, tmp_path):
    families = [FAMILIES[0]] if fault == "scale" else []
    families += ["Mistral 0.1", "Qwen2, sliding"] if "window" in fault else ["Gemma 2"]
    for family in families:
        directory = write_model(tmp_path / family, parity.CONFIGS[family])
        model, s = sharded(directory, ranks, FAULTS[fault])
        with pytest.raises(UserError) as error:
            check.check_kernels(model, random_row(), s, ranks)
        told = str(error.value)
        assert "\n" not in told and told.endswith("--attention sdpa, and report it")
        layer = 1 if "window" in fault and family == "Qwen2, sliding" else 0
        right = "output" if fault not in "qkv" else f"gradient of attn.{fault}.weight"
        assert f"first row: block {layer}'s " in told
        assert right in told or fault in ("scale", "q", "k", "v"), told


def test_what_is_not_a_number_stops(ranks, tiny_model_dir):
    def nan(rule, *qkv):
        return rule(*qkv) * torch.nan

    def attend(row, c):
        return [partial(nan, rule) for rule in plain_attention(row, c)]

    model, s = sharded(tiny_model_dir, ranks, attend)
    with pytest.raises(UserError, match="block 0's output"):
        check.check_kernels(model, random_row(), s, ranks)


@pytest.mark.parametrize("broken", [None, 1])
def test_two_ranks_agree_that_one_of_them_is_wrong(broken, tiny_model_dir):
    """The weights are sharded; the first rank's row is empty."""

    def work(ranks):
        attend = FAULTS["not itself"] if ranks.rank == broken else chains.attend
        model, s = sharded(tiny_model_dir, ranks, attend)
        row = random_row() if ranks.rank else build_row([], [], 5, 256)
        try:
            return check.check_kernels(model, row, s, ranks)
        except UserError as error:
            return f"stopped: {error}"

    first, second = on_ranks(2, work)
    assert first == second and first.startswith("stopped") is (broken is not None)


# ----------------------------------------------------------------------------- what is left


def test_nothing_is_left_behind(ranks, tiny_model_dir, monkeypatch):
    """No gradient, no random number drawn, nor the models of the plain rule."""
    monkeypatch.setattr(check, "gc", gc)
    model, s = sharded(tiny_model_dir, ranks)
    made, build = [], check.Transformer
    watch = lambda config: made.append(weakref.ref(twin := build(config))) or twin  # noqa: E731
    monkeypatch.setattr(check, "Transformer", watch)
    before, state = [p.to_local().clone() for p in model.parameters()], torch.get_rng_state()
    check.check_kernels(model, random_row(), s, ranks)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(made) == 2 and not any(twin() for twin in made)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert isinstance(parameter, DTensor) and parameter.grad is None
        assert torch.equal(parameter.to_local(), value)


def test_it_compiles_nothing_that_the_run_does_not(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    torch.compiler.reset()
    traced = []

    def counted(graph, inputs):
        traced.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    directory = write_model(tmp_path, parity.CONFIGS["Gemma 2"])
    model, s = sharded(directory, ranks, flex.attend, attention="flex")
    for block in model.blocks:
        compile_block(block, "flex", counted)
    check.check_kernels(model, random_row(), s, ranks)
    assert len(traced) == 2, "one per window, with gradient"
    model(random_row(1)).sum().backward()
    assert len(traced) == 2


def test_a_checked_run_is_bitwise_the_run_without(flags, no_plots, monkeypatch, capsys):
    outs = [flags["out"] / name for name in ("without", "with")]
    flags |= {"dtype": "bf16"}
    for out, kinds in zip(outs, ((), ("cpu",)), strict=True):
        monkeypatch.setattr(check, "KINDS", kinds)
        train_here(flags | {"out": out})
    assert capsys.readouterr().out.count("first row: log-probabilities") == 1
    a, b = map(final, outs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [[line["loss"] for line in lines(out)] for out in outs]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_run_with_a_wrong_kernel_stops_before_its_reference_pass(flags, no_plots, monkeypatch):
    monkeypatch.setattr(check, "KINDS", ("cpu",))
    monkeypatch.setattr(chains, "attend", FAULTS["k"])
    with pytest.raises(UserError, match="first row: block 0's gradient"):
        train_here(flags)
    assert not (flags["out"] / "reference.safetensors").exists()
