"""The cache changes no token, and sampling is what it says."""

import json
from collections import deque

import numpy as np
import pytest
import tiny
import torch
from dialogues import say

from bench.generation import sample
from conftest import write_model
from generate import Sampling, Sequence, candidates, complete, stop_ids
from generate import draw_tokens as draw
from hub.template import Template
from model import load

CONFIGS = {"llama": tiny.LLAMA, "mistral": tiny.MISTRAL, "qwen2": tiny.QWEN2}
GREEDY = Sampling(max_new_tokens=20, temperature=0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(directory):
    return load(directory)


def prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, n).tolist() for n in lengths]


def naive_greedy(model, prompt, n):
    """The whole sequence anew for every token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def peer_greedy(peer, prompt, n):
    """The same by a transformers model's own `generate`."""
    ids = torch.tensor([list(map(int, prompt))])
    never = {"eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    return peer.generate(ids, do_sample=False, max_new_tokens=n, **never)[
        0, ids.shape[1] :
    ].tolist()


# ----------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_cached_greedy_is_the_full_forward_greedy(tmp_path, family, batch):
    """Unequal prompts, more of them than rows (so that rows are taken over), sliding windows."""
    model = load(write_model(tmp_path, CONFIGS[family]))
    asked = prompts([5, 30, 1, 12, 2, 21, 9])
    expected = [naive_greedy(model, p, 20) for p in asked]
    assert sample(model, asked, GREEDY, batch=batch) == expected


def test_rows_of_ended_sequences_are_taken_over(model):
    """Sequences end after 1, 2, 3 … tokens: each by its own stop, found by a run without."""
    asked = prompts(range(3, 19))
    free = sample(model, asked, GREEDY)
    for stop in {answer[5] for answer in free}:
        sampling = Sampling(20, temperature=0, stop_ids=frozenset([stop]))
        cut = [a[: a.index(stop)] if stop in a else a for a in free]
        assert sample(model, asked, sampling, batch=4) == cut


def test_the_cache_grows(model):
    """More positions than the first allotment of slots."""
    (prompt,) = prompts([250])
    assert sample(model, [prompt], GREEDY) == [naive_greedy(model, prompt, 20)]


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_equals_transformers(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    write_model(tmp_path, CONFIGS[family])
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    asked = prompts([12, 30])
    ours = sample(load(tmp_path), asked, GREEDY)
    for prompt, answer in zip(asked, ours, strict=True):
        assert peer_greedy(peer, prompt, 20) == answer


@pytest.mark.slow
def test_greedy_equals_transformers_on_a_real_model(smollm2):
    """Three prompts of different lengths, by transformers one by one."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    template = Template(smollm2)
    texts = ["Name three colours.", "Why is the sky blue? " * 4, "Write a haiku about the sea."]
    asked = [template.encode([template.render(say(t), generation=True)])[0] for t in texts]
    ours = sample(load(smollm2), asked, Sampling(16, temperature=0))
    for prompt, answer in zip(asked, ours, strict=True):
        assert peer_greedy(peer, prompt, 16) == answer


# ----------------------------------------------------------------------------- sampling


def even(n):
    """n uniform numbers, evenly spread."""
    return (torch.arange(n) + 0.5) / n


def test_nucleus_by_hand():
    """top_p 0.7 of (0.15, 0.5, 0.05, 0.3): tokens 1 and 3, renormalised to 5/8 and 3/8."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    uniforms = torch.tensor([0.0, 0.624, 0.626, 0.99, 1.0])  # 1.0: a uniform number rounded up
    drawn = draw(logits.expand(5, -1), uniforms, Sampling(temperature=1, top_p=0.7))
    assert drawn.tolist() == [1, 1, 3, 3, 3]
    halves = torch.zeros(1, 2)  # 0.5 is the first number of the second half
    assert draw(halves, torch.tensor([0.5]), Sampling(temperature=1, top_p=1)).tolist() == [1]


def test_frequencies_are_the_softmax():
    """Without a nucleus, and at temperature 2: probabilities go with the square root."""
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for temperature, expected in ((1.0, probs), (2.0, probs.sqrt() / probs.sqrt().sum())):
        sampling = Sampling(temperature=temperature, top_p=1.0)
        drawn = draw(probs.log().expand(10_000, -1), even(10_000), sampling)
        frequency = drawn.bincount(minlength=4) / 10_000
        torch.testing.assert_close(frequency, expected, atol=2e-4, rtol=0)


def test_temperature_zero_is_the_candidates():
    logits = torch.randn(8, 50)
    assert draw(logits, even(8), Sampling(temperature=0)).equal(logits.argmax(-1))


def test_nothing_outside_the_nucleus_is_drawn(for_all):
    """And every token inside is, where uniform numbers are dense enough to hit it."""

    def check(rng):
        seed, top_p, temperature = rng.randrange(10**6), rng.uniform(0.01, 1), rng.uniform(0.1, 3)
        logits = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 2
        probs = (logits.double() / temperature).softmax(-1)
        # mass of the tokens that are likelier
        before = {i: probs[probs > probs[i]].sum().item() for i in range(40)}
        sampling = Sampling(8, temperature, top_p)
        drawn = set(draw(logits.expand(2000, -1), even(2000), sampling).tolist())
        assert all(before[i] < top_p + 1e-5 for i in drawn)
        assert drawn >= {i for i in before if before[i] < top_p - 1e-5 and probs[i] > 1e-3}

    for_all(check)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.99])
def test_the_likeliest_few_are_those_of_the_whole_order(top_p):
    probs = (torch.randn(5, 1000) * 3).softmax(-1)
    few, ids = candidates(probs, top_p)
    order, places = probs.sort(-1, descending=True)
    n = few.shape[1]
    assert few.equal(order[:, :n]) and ids.equal(places[:, :n])
    assert (few.sum(-1) >= top_p - 1e-5).all()


def test_an_answer_depends_on_its_prompt_and_seed_alone(model):
    asked = prompts([7, 19, 3, 11, 30])
    sampling = Sampling(max_new_tokens=25, temperature=1.0, top_p=0.9)
    alone = sample(model, asked, sampling, seed=3, batch=1)
    assert sample(model, asked, sampling, seed=3, batch=4) == alone
    assert sample(model, asked, sampling, seed=4, batch=4) != alone
    same = sample(model, [asked[0]] * 3, sampling, seed=3)  # one prompt, three indices
    assert same[0] == alone[0] and same[0] != same[1] != same[2]


def test_sampled_tokens_follow_the_models_distribution(model):
    """4,000 draws behind one token against the softmax: total variation as chance has it."""
    (prompt,) = prompts([1])
    drawn = sample(model, [prompt] * 4000, Sampling(1, 1.0, 1.0), batch=500)
    frequency = torch.tensor([a[0] for a in drawn]).bincount(minlength=260) / 4000
    expected = model.logits(torch.tensor([prompt]))[0, -1].softmax(-1)
    chance = (expected * (1 - expected) / 4000).sqrt().sum() * (2 / np.pi) ** 0.5 / 2
    assert (frequency - expected).abs().sum() / 2 < 1.3 * chance


# ----------------------------------------------------------------------------- ends


def test_the_stop_token_ends_and_is_no_text(model):
    (prompt,) = prompts([10])
    (free,) = sample(model, [prompt], GREEDY)
    stop = free[7]
    seq = Sequence(prompt)
    sampling = Sampling(20, temperature=0, stop_ids=frozenset([stop]))
    assert list(complete(model, deque([seq]), sampling)) == [seq]
    assert seq.answer == free[: free.index(stop)] and seq.finished
    seq = Sequence(prompt)
    list(complete(model, deque([seq]), GREEDY))
    assert seq.answer == free and not seq.finished


@pytest.mark.parametrize("eos", [None, 256, [256, 257]])
def test_stop_ids_come_from_both_configs_and_the_template(tmp_path, eos):
    config = tiny.LLAMA | {"eos_token_id": 7}
    template = Template(write_model(tmp_path, config))
    assert stop_ids(template) == {7, 258}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    listed = set() if eos is None else {256, 257} if isinstance(eos, list) else {eos}
    assert stop_ids(template) == {7, 258} | listed


def test_tokens_are_heard_as_they_come(model):
    heard = [[], []]
    queue = deque(Sequence(x, on_token=heard[i].append) for i, x in enumerate(prompts([4, 9])))
    sequences = list(queue)
    list(complete(model, queue, GREEDY))
    assert heard == [seq.answer for seq in sequences] == sample(model, prompts([4, 9]), GREEDY)


def test_no_answer_goes_beyond_the_models_positions(tmp_path):
    """An answer ends there, unfinished; a prompt that leaves no room has none."""
    model = load(tiny.build(tmp_path, tiny.LLAMA | {"max_position_embeddings": 12}))
    queue = deque(Sequence(ids, tag=len(ids)) for ids in prompts([4, 11, 12, 13, 2]))
    found = {seq.tag: seq for seq in complete(model, queue, GREEDY._replace(max_new_tokens=9), 2)}
    assert {n: len(seq.answer) for n, seq in found.items()} == {4: 8, 11: 1, 12: 0, 13: 0, 2: 9}
    assert not any(seq.finished for seq in found.values())
