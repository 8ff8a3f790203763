"""Every kernel equals the plain rule of model.py, in values and where it can in gradients."""

import numpy as np
import parity
import pytest
import torch
from tiny import MODELS
from tries import random_paths

from conftest import write_model
from data import build_row, lay_out
from kernels import chains, detached
from model import load, plain_attention, scored_states, visible

CONFIGS = {name: MODELS[name] for name in ("llama tied", "mistral sliding")}
CONFIGS |= {"qwen2 sliding from layer 1": MODELS["qwen2 sliding from layer 1"]}
CONFIGS |= {"gemma 2": parity.CONFIGS["Gemma 2"]}  # soft caps, a scale of its own


@pytest.fixture(params=[0, 256], autouse=True)
def short(request, monkeypatch):
    """Every trie in chains, and every (short) trie as a whole."""
    monkeypatch.setattr(chains, "SHORT", request.param)


def a_row(seed, tries=3, pad_to=0):
    rng = np.random.default_rng(seed)
    return build_row([lay_out(random_paths(rng)) for _ in range(tries)], range(tries), 5, pad_to)


def random_qkv(seed, config, size):
    """Queries, keys and values of one layer, on which a gradient may be taken."""
    generator = torch.Generator().manual_seed(seed)
    heads = (config.heads, config.kv_heads, config.kv_heads)
    return [
        torch.randn(1, h, size, config.head_width, generator=generator).requires_grad_()
        for h in heads
    ]


# ----------------------------------------------------------------------------- chains


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("seed", range(10))
def test_chains_equal_the_plain_rule_on_random_tries(seed, family, tmp_path):
    """Each layer's output and gradients, for random queries, keys and values."""
    config, row = load(write_model(tmp_path, CONFIGS[family])).config, a_row(seed, pad_to=200)
    used, qkv = row.spans[-1][1], random_qkv(seed, config, 200)  # what padding gets differs
    rules = zip(plain_attention(row, config), chains.attend(row, config), strict=True)
    for plain, fast in rules:
        expected, found = (rule(*qkv)[:, :, :used] for rule in (plain, fast))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        wanted, got = (torch.autograd.grad(y.square().sum(), qkv) for y in (expected, found))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("window", [None, 4])
def test_chains_see_what_the_rule_says(seed, window):
    """Every query is in one piece, and its keys there are those that `visible` names."""
    row = a_row(seed, pad_to=200)
    wanted = visible(row.until, row.positions, window)
    every = torch.ones_like(row.tokens, dtype=torch.bool)
    found, start = torch.zeros_like(wanted), 0
    pieces, sizes = chains._pieces(row, window, [every])
    parts = torch.arange(len(row.tokens)).split(sizes)
    for seen, mask in pieces:
        index, end = torch.cat([parts[j] for j in seen]), start + len(mask)
        found[start:end] = found[start:end].index_copy(1, index, mask)
        start = end
    used = row.spans[-1][1]
    assert start == used and torch.equal(found[:used], wanted[:used])


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_by_chains_equals_one_by_dense_masks(family, tmp_path):
    """Values and gradients of a whole model."""
    model, row, results = (
        load(write_model(tmp_path, CONFIGS[family])).requires_grad_(True),
        a_row(0),
        [],
    )
    for model.attend in (chains.attend, plain_attention):
        x = model.row_states(row)
        results.append((x, *torch.autograd.grad(x.square().mean(), [*model.blocks.parameters()])))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_spelt_out_in_bf16_equals_sdpa_in_value_and_gradient(kv_heads):
    """What short chains run in bf16 on a CPU, as against fp32 SDPA."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, h, 20, 8).bfloat16().requires_grad_() for h in (4, kv_heads, kv_heads)
    )
    trie = build_row([lay_out(random_paths(np.random.default_rng(1)))], [0], 5, pad_to=20)
    mask = visible(trie.until, trie.positions, window=6)
    exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, mask, enable_gqa=True)
    found = chains.fast_attention(q, k, v, mask)
    assert found.dtype == torch.bfloat16 and (found - expected).abs().max() < 0.03
    direction = torch.randn(expected.shape)
    wanted = torch.autograd.grad(expected, exact, direction)
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), direction.bfloat16()), wanted, strict=True
    ):
        assert (a - b).norm() < 0.02 * b.norm()


def test_cudnn_which_plans_anew_for_every_shape_is_switched_off():
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# ----------------------------------------------------------------------------- detached contexts


class Detached:
    """The oracle: the rule of the whole row, keys and values of all other tokens detached."""

    def __init__(self, rule, live):
        self.rule, self.live = rule, live[:, None]

    def __call__(self, q, k, v):
        k, v = (torch.where(self.live, x, x.detach()) for x in (k, v))
        return self.rule(q, k, v)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("seed", range(4))
def test_without_context_grad_values_are_the_same_and_gradients_those_of_detached_contexts(
    family, seed, tmp_path
):
    model, row = (
        load(write_model(tmp_path, CONFIGS[family])).requires_grad_(True),
        a_row(seed, pad_to=128),
    )
    parameters = [p for n, p in model.named_parameters() if n != "head.weight"]
    weights = torch.linspace(-1, 1, len(row.source))

    live = torch.zeros_like(row.tokens, dtype=torch.bool)
    live[row.source] = True
    rules = [Detached(rule, live) for rule in plain_attention(row, model.config)]
    x = model.hidden(row.tokens[None], row.positions[None], rules)[0][row.source]
    logps = model.to_logits(x).log_softmax(-1).gather(-1, row.label[:, None])[:, 0]
    wanted = torch.autograd.grad((weights * logps).sum(), parameters)

    exact = torch.autograd.grad((weights * model(row)).sum(), parameters)
    model.states = detached.states
    values = model(row)
    torch.testing.assert_close(values, logps, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad((weights * values).sum(), parameters)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert any((a - b).norm() > 1e-3 * b.norm() for a, b in zip(found, exact, strict=True))


def test_a_row_without_pairs_still_reaches_every_parameter(tiny_model_dir):
    """Ranks without pairs run one, since FSDP's collectives must line up."""
    model = load(tiny_model_dir).requires_grad_(True)
    model.states = detached.states
    model(build_row([], [], n_paths=2)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, family",
    [
        ("chains", "Llama 3"),
        ("chains", "Gemma 2"),
        ("chains", "Pythia"),
        ("without context gradient", "Llama 3"),
    ],
)
def test_blocks_are_compiled_for_rows_of_any_length_and_all_layers(kind, family, tmp_path):
    """Once, and once more where lengths turn out to vary; a recompilation after it is an error."""
    torch.compiler.reset()
    model = load(write_model(tmp_path, parity.CONFIGS[family])).requires_grad_(True)
    model.attend = chains.attend
    model.states = detached.states if kind == "without context gradient" else scored_states
    weights = list(model.parameters())

    def values(seed):
        out = model(a_row(seed, tries=seed + 1))
        return [out, *torch.autograd.grad(out.sum(), weights)]

    expected = [values(seed) for seed in range(5)]
    for block in model.blocks:
        block.body = torch.compile(block.body)
    for seed in range(5):
        with torch._dynamo.config.patch(error_on_recompile=seed >= 2):
            torch.testing.assert_close(values(seed), expected[seed], rtol=1e-4, atol=1e-4)
