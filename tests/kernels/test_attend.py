"""Attention chain by chain is the one rule of rows; and contexts without gradient are just that."""

import numpy as np
import parity
import pytest
import torch

import attend
import rows
from conftest import write_model
from model import load
from test_model import MODELS, random_paths, trainable

FAMILIES = ["llama tied", "mistral sliding", "qwen2 sliding from layer 1"]


@pytest.fixture(params=[0, 256], autouse=True)
def short(request, monkeypatch):
    """Every trie in chains, and every (short) trie as a whole."""
    monkeypatch.setattr(rows, "SHORT", request.param)


def a_row(seed, tries=3, pad_to=0):
    rng = np.random.default_rng(seed)
    made = [rows.lay_out(random_paths(rng)) for _ in range(tries)]
    return rows.build_row(made, range(tries), 5, pad_to)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("window", [None, 4])
def test_pieces_see_what_the_rule_says(seed, window):
    """Every query is in one piece, and its keys there are those that `rows.visible` names."""
    row = a_row(seed, pad_to=200)
    wanted = rows.visible(row.until, row.positions, window)
    every = torch.ones_like(row.tokens, dtype=torch.bool)
    found, start = torch.zeros_like(wanted), 0
    pieces, sizes = attend._pieces(row, window, every, None)
    parts = torch.arange(len(row.tokens)).split(sizes)
    for seen, mask in pieces:
        index, end = torch.cat([parts[j] for j in seen]), start + len(mask)
        found[start:end] = found[start:end].index_copy(1, index, mask)
        start = end
    used = row.spans[-1][1]
    assert start == used and torch.equal(found[:used], wanted[:used])


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_in_pieces_equals_one_dense_mask(family, tmp_path):
    """Values and gradients of a whole model."""
    model = load(write_model(tmp_path, MODELS[family])).requires_grad_(True)
    row, c = a_row(0), model.config
    dense = {w: attend.Dense(rows.visible(row.until, row.positions, w)) for w in set(c.windows)}
    results = []
    for rules in (attend.row_attention(row, c, "sdpa"), [dense[w] for w in c.windows]):
        x = model.hidden(row.tokens[None], row.positions[None], rules)
        results.append((x, *torch.autograd.grad(x.square().mean(), [*model.blocks.parameters()])))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


class Detached:
    """The oracle: the rule of the whole row, keys and values of all other tokens detached."""

    def __init__(self, rule, live):
        self.rule, self.live = rule, live[:, None]

    def __call__(self, q, k, v):
        k, v = (torch.where(self.live, x, x.detach()) for x in (k, v))
        return self.rule(q, k, v)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_without_context_grad_values_are_the_same_and_gradients_those_of_detached_contexts(
    family, seed, tmp_path
):
    model, row = trainable(write_model(tmp_path, MODELS[family])), a_row(seed, pad_to=128)
    parameters = [p for n, p in model.named_parameters() if n != "head.weight"]
    weights = torch.linspace(-1, 1, len(row.source))

    live = torch.zeros_like(row.tokens, dtype=torch.bool)
    live[row.source] = True
    rules = [Detached(rule, live) for rule in attend.row_attention(row, model.config, "sdpa")]
    x = model.hidden(row.tokens[None], row.positions[None], rules)[0][row.source]
    logps = model.to_logits(x).log_softmax(-1).gather(-1, row.label[:, None])[:, 0]
    wanted = torch.autograd.grad((weights * logps).sum(), parameters)

    exact = torch.autograd.grad((weights * model(row)).sum(), parameters)
    model.context_grad = False
    values = model(row)
    torch.testing.assert_close(values, logps, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad((weights * values).sum(), parameters)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert any((a - b).norm() > 1e-3 * b.norm() for a, b in zip(found, exact, strict=True))


def test_a_row_without_pairs_still_reaches_every_parameter(tiny_model_dir):
    """Ranks without pairs run one, since FSDP's collectives must line up."""
    model = trainable(tiny_model_dir)
    model.context_grad = False
    model(rows.build_row([], [], n_paths=2)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, family",
    [
        ("sdpa", "Llama 3"),
        ("sdpa", "Gemma 2"),
        ("sdpa", "Pythia"),
        ("without context gradient", "Llama 3"),
        ("flex", "Llama 3"),
    ],
)
def test_blocks_are_compiled_for_rows_of_any_length_and_all_layers(kind, family, tmp_path):
    """Once, and once more where lengths turn out to vary; from then on a recompilation is an error.

    Flex has rows of one length, and is forward only: it has no backward on a CPU.
    """
    torch.compiler.reset()
    flex = kind == "flex"
    model = load(write_model(tmp_path, parity.CONFIGS[family]))
    model.requires_grad_(not flex)
    model.context_grad = kind == "sdpa"
    weights = [] if flex else list(model.parameters())

    def values(seed):
        out = model(a_row(seed, tries=seed + 1, pad_to=256 if flex else 0))
        return [out, *(torch.autograd.grad(out.sum(), weights) if weights else ())]

    with torch.set_grad_enabled(not flex):
        expected = [values(seed) for seed in range(5)]
        model.attention = "flex" if flex else "sdpa"
        for block in model.blocks:
            block.body = torch.compile(block.body)
        for seed in range(5):
            strict = seed >= (1 if flex else 2)
            with torch._dynamo.config.patch(error_on_recompile=strict):
                torch.testing.assert_close(values(seed), expected[seed], rtol=1e-4, atol=1e-4)
