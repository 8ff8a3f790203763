"""What several tests share: a tiny random model as a Hugging Face directory, and a few pairs."""

import json
import os
import random
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from smollm2 import smollm2_dir

from jobs.cli import run
from jobs.files import write_json
from jobs.rundir import Metrics


def write_model(directory, config=tiny.LLAMA, seed=0):
    """tiny.build with norms and biases made random too, so that skipping one cannot pass."""
    tiny.build(directory, config, seed)
    tensors = load_file(directory / "model.safetensors")
    for tensor in (t for t in tensors.values() if t.ndim == 1):
        tensor += 0.3 * torch.randn(tensor.shape)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _pair(i):
    a, b = 3 + i % 7, 2 + i % 5
    answers = (f"{a} plus {b} is {a + b}" + " for sure" * (i % 4), "Who knows" + " that" * (i % 9))
    chosen, rejected = answers if i % 3 else answers[::-1]
    prompt = f"{a} plus {b}" + ", friend" * (i % 4) + "?"
    return {"prompt": prompt, "chosen": chosen + ".", "rejected": rejected + "."}


PAIRS = [_pair(i) for i in range(24)]


SMOLLM2 = smollm2_dir()  # before the cache is the tests' own


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What tests, and the runs that they start, keep between runs is their own."""
    os.environ["NANOPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A tiny fp32 Llama with tied embeddings, ChatML tokenizer, generation config. Read-only."""
    config = tiny.LLAMA | {"dtype": "float32", "tie_word_embeddings": True}
    directory = write_model(tmp_path_factory.mktemp("tiny") / "llama", config)
    generation = {"eos_token_id": 258, "pad_token_id": 258, "temperature": 0.7, "do_sample": True}
    write_json(directory / "generation_config.json", generation)
    return directory


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """24 preference pairs of different lengths as jsonl (prompt, chosen, rejected)."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    return file


@pytest.fixture
def flags(tiny_model_dir, pairs_file, tmp_path):
    """A run of a second: 4 steps of 4 pairs, at a learning rate that moves the weights."""
    return {"model": tiny_model_dir, "data": pairs_file, "out": tmp_path / "out", "batch": 4,
            "steps": 4, "lr": 1e-3, "max_len": 256, "eval_pairs": 4, "eval_every": 100}  # fmt: skip


@pytest.fixture
def call(monkeypatch):
    """call(module, *words) runs `python MODULE.py WORDS…` in this process."""

    def go(module, *words):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
        run(module.main)

    return go


@pytest.fixture
def ended(call, capsys):
    """ended(module, *words): the same -> (stdout, stderr, exit status)."""

    def go(module, *words):
        status, _ = 0, capsys.readouterr()  # what came before
        try:
            call(module, *words)
        except SystemExit as stop:
            status = stop.code
        return *capsys.readouterr(), status

    return go


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(Metrics, "plot", lambda self: None)


@pytest.fixture(scope="session")
def smollm2():
    """The real small chat model, SmolLM2-135M-Instruct, as a Hugging Face directory."""
    if SMOLLM2 is None:
        pytest.skip("SmolLM2 is not built: python tests/tools/smollm2.py")
    return SMOLLM2


def shared_data(name):
    """A file or directory of real data beside the checkout; skips where it is not at hand."""
    place = Path(__file__).parents[2] / "shared" / "data" / name
    if not place.exists():
        pytest.skip(f"no {name}: real data that is not part of the repository")
    return place


@pytest.fixture(scope="session")
def hh_file():
    """Anthropic hh-rlhf, harmless-base test split: 2,312 pairs as they lie on the hub."""
    return shared_data("hh-harmless-test.jsonl.gz")


@pytest.fixture(params=["seeded", "hypothesis"])
def for_all(request):
    """for_all(check) runs check(rng) on a hundred random cases, rng being a random.Random.

    Once with fixed seeds, and once by hypothesis, which hunts for failures and shrinks them.
    """
    if request.param == "seeded":
        return lambda check: [check(random.Random(seed)) for seed in range(100)]
    hypothesis = pytest.importorskip("hypothesis")

    def hunt(check):
        @hypothesis.settings(max_examples=100, deadline=None)
        @hypothesis.given(hypothesis.strategies.randoms(use_true_random=False))
        def case(rng):
            check(rng)

        case()

    return hunt
