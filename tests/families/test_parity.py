"""Every family against transformers: the cells of docs/guarantees.md, each with its bound."""

import re
from pathlib import Path

import numpy as np
import parity
import pytest
import torch

from conftest import write_model
from data import build_row, lay_out
from kernels import chains, flex
from model import load

PAGE = Path(__file__).parents[2] / "docs" / "guarantees.md"
CELLS = [(n, c) for n in parity.CONFIGS for c in parity.CHECKS if parity.applies(n, c)]


@pytest.mark.parametrize("name, check", CELLS)
def test_a_family_equals_transformers(name, check, tmp_path):
    pytest.importorskip("transformers")
    error = parity.CHECKS[check](parity.build(name, check, tmp_path))
    assert error <= (0 if check == "bytes" else 1e-4)


@pytest.mark.parametrize("name, length", [("Llama 3.1", 2000), ("Llama 3.2", 100)])
def test_a_scaling_that_is_ignored_would_be_seen(name, length, tmp_path):
    """The checks above can fail: without rope_scaling the same weights are far off."""
    config = parity.CONFIGS[name]
    scaled = write_model(tmp_path / "a", config)
    plain = write_model(tmp_path / "b", config | {"rope_scaling": None})
    tokens = parity.ids(1, length)
    with torch.no_grad():
        difference = load(scaled).logits(tokens) - load(plain).logits(tokens)
    assert difference[:, -100:].abs().max() > 1e-3


PARTS = [  # what distinguishes a family, and a value that switches it off
    ("Mistral 0.1", {"sliding_window": None}),
    ("Gemma 2", {"attn_logit_softcapping": None}),
    ("Gemma 2", {"final_logit_softcapping": None}),
    ("Gemma 2", {"query_pre_attn_scalar": 16}),
    ("Gemma 2", {"layer_types": ["full_attention"] * 3}),
    ("Pythia", {"rotary_pct": 1.0}),
    ("Pythia", {"rotary_emb_base": 10000}),
    ("Pythia", {"use_parallel_residual": False}),
    ("Pythia", {"hidden_act": "gelu_new"}),
]


@pytest.mark.parametrize("name, off", PARTS)
def test_each_part_of_a_family_is_visible_in_its_logits(name, off, tmp_path):
    config, tokens = parity.CONFIGS[name], parity.ids(1, 100)
    on = load(write_model(tmp_path / "a", config)).logits(tokens)
    changed = load(write_model(tmp_path / "b", config | off)).logits(tokens)
    assert (on - changed).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["Gemma 2", "Pythia", "Qwen3"])
def test_flex_attention_and_bf16_rows_equal_sdpa(name, tmp_path):
    """Soft cap, scale and windows in every attention that a row may run through."""
    directory = write_model(tmp_path, parity.CONFIGS[name])
    laid = [lay_out(paths) for paths in parity.tries()]
    row = build_row(laid, range(3), 4, pad_to=256)
    with torch.no_grad():
        model = load(directory)
        expected = model(row)
        model.attend = flex.attend
        assert (model(row) - expected).abs().max() <= 1e-5
        model = load(directory, torch.bfloat16)
        model.attend = chains.attend
        rough = model(row)
        assert (rough - expected).abs().max() < 0.15 and not torch.equal(rough, expected)


@pytest.mark.parametrize("name", ["Gemma 2", "GPT-NeoX, sequential", "Pythia", "Qwen3"])
def test_gradients_of_a_row_equal_those_of_its_sequences_in_transformers(name, tmp_path):
    pytest.importorskip("transformers")
    directory = write_model(tmp_path, parity.CONFIGS[name])
    ours, other = load(directory).requires_grad_(True), parity.theirs(directory)
    pairs = parity.tries()
    row = build_row([lay_out(paths) for paths in pairs], range(3), 4)
    (row.sums(ours(row)) * torch.arange(1.0, 5.0) / 100).sum().backward()
    for paths in pairs:
        for j, (segments, n) in enumerate(paths, 1):
            tokens = torch.tensor(np.concatenate(segments)).long()[None]
            logps = other(tokens).logits[0].log_softmax(-1)[:-1]
            (logps.gather(-1, tokens[0, 1:, None])[-n:].sum() * j / 100).backward()
    wanted = other.get_input_embeddings().weight.grad
    assert wanted.abs().max() > 1e-3
    assert (ours.embed.weight.grad - wanted).abs().max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("check", ["logits", "decoding", "rows"])
def test_a_real_model_equals_transformers(check, smollm2):
    pytest.importorskip("transformers")
    bound = 1e-2 if check == "rows" else 1e-3  # logits of size 30, sums over a dozen tokens
    assert parity.CHECKS[check](smollm2) <= bound


def test_the_table_in_the_docs_has_these_rows_and_columns_and_keeps_the_bounds():
    section = PAGE.read_text(encoding="utf-8").split("\n## ")[1]
    table = re.findall(r"^\| (.*) \|$", section, re.M)
    head, _, *body = [[cell.strip() for cell in line.split("|")] for line in table]
    assert head == ["family", *parity.CHECKS]
    assert [line[0] for line in body] == [*parity.CONFIGS, "SmolLM2-135M"]
    for name, *cells in body[:-1]:
        for check, cell in zip(parity.CHECKS, cells, strict=True):
            assert (cell != "") == parity.applies(name, check), (name, check)
            assert float(cell or 0) <= 1e-4
