"""The cache changes no token, sampling is what it says, and the modes ask as in training."""

import json
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import generate
from conftest import write_model
from data import Dataset, Limits
from generate import (
    Answers,
    Job,
    Sampling,
    Sequence,
    Stream,
    candidates,
    complete,
    sample,
    stop_ids,
)
from generate import draw_tokens as draw
from hub.template import Template
from jobs.cli import UserError
from losses import Path as LossPath
from losses import recipe
from model import load
from pairs.questions import Ask, read_asks
from pairs.read import Pair

ROOT = Path(__file__).parent.parent
CONFIGS = {"llama": tiny.LLAMA, "mistral": tiny.MISTRAL, "qwen2": tiny.QWEN2}
GREEDY = Sampling(max_new_tokens=20, temperature=0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(directory):
    return load(directory)


@pytest.fixture(scope="module")
def template(directory):
    return Template(directory)


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
    asked = [template.encode([template.render(user(t), generation=True)])[0] for t in texts]
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
    answers = sample(model, prompts([4, 9]), GREEDY, on_token=lambda i, t: heard[i].append(t))
    assert heard == answers


# ----------------------------------------------------------------------------- the modes


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "mode, path",
    [
        ("plain", LossPath(None, "chosen")),
        ("instruct", LossPath("instruct", "chosen")),
        ("refine", LossPath("rejected", "chosen")),
    ],
)
def test_a_mode_asks_as_its_path_was_trained(template, mode, path):
    """The prompt's ids are those that training puts before the scored answer."""
    condition = {"plain": "none", "instruct": "instruct", "refine": "cross"}[mode]
    rule = recipe("dpo", condition=condition, bridge="turn")
    pair = Pair(user("Why?"), "Because.", "So what.", "here")
    dataset = Dataset([pair], template, rule, Limits(512, 0.4), "better")
    segments, _ = dataset.path(0, path)
    answers = Answers(None, template, GREEDY, mode)
    seq = answers._first(Job(Ask(pair.prompt, "So what."), 0), None)
    assert seq.prompt == np.concatenate(segments[:-1]).tolist()


def test_refine_joins_its_own_draft(model, template, monkeypatch):
    """x, the draft's ids as they were sampled, the end of turn, the turn; draft as in plain."""
    seen = []
    spy = lambda *args: (seen.append(seq) or seq for seq in complete(*args))  # noqa: E731
    monkeypatch.setattr(generate, "complete", spy)
    sampling = Sampling(12, temperature=1.0)
    asks = [Ask(user("Why?")), Ask(user("What else is there to be said?"))]
    plain = list(Answers(model, template, sampling, batch=1)(asks))
    drafts = {tuple(seq.prompt): seq.answer for seq in seen}
    seen.clear()
    rows = list(Answers(model, template, sampling, "refine", batch=2)(asks))
    assert [row["draft"] for row in rows] == [row["answer"] for row in plain]
    turn = template.encode([template.turn("please generate a better response")])[0].tolist()
    joined = [[*x, *y, *template.end_ids, *turn] for x, y in drafts.items()]
    refined = [seq for seq in seen if seq.tag[0] == "answer"]
    assert sorted(joined) == sorted(seq.prompt for seq in refined)
    assert {seq.seed for seq in refined} == {(0, 0, 1), (0, 1, 1)}  # not the draft's numbers again


def test_rows_come_in_order(model, template):
    """Though the second of three ends first."""
    asks = [Ask(user(text)) for text in ("first", "second", "third")]
    sampling = Sampling(15, temperature=1.0, stop_ids=frozenset(range(0, 256, 20)))
    rows = list(Answers(model, template, sampling, batch=2)(asks, range(5, 8)))
    assert [row["prompt"] for row in rows] == [ask.prompt for ask in asks]
    later = list(Answers(model, template, sampling, batch=1)(asks[1:], range(6, 8)))
    assert later == rows[1:]


def test_a_stream_waits_for_whole_characters(template, capsys):
    stream, text = Stream(template), "é 🇫🇷, naïve"
    for token in template.encode([text])[0]:
        stream("answer", int(token))
    stream.close()
    assert capsys.readouterr().out == text + "\n"


# ----------------------------------------------------------------------------- prompts


def test_prompts_are_read_from_every_layout(tmp_path):
    hh = "\n\nHuman: a?\n\nAssistant: "
    rows = [
        {"prompt": "a?"},
        {"prompt": user("a?"), "draft": "a!"},
        {"instruction": "a?", "output": "old answer", "generator": "x"},
        {"prompt": "a?", "chosen": "b", "rejected": "c"},
        {"chosen": [*user("a?"), {"role": "assistant", "content": "b"}]},
        {"chosen": hh + "b", "rejected": hh + "c"},
        {"prompt": hh},
        {"prompt": hh, "chosen": "b", "rejected": "c"},
        {"prompt": "a?"},
    ]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asks = read_asks(str(file))
    assert [ask.prompt for ask in asks] == [user("a?")] * len(rows)
    assert [ask.draft for ask in asks] == [None, "a!"] + [None] * 7
    assert len(read_asks(str(file), limit=3)) == 3


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "a?"}, "expected prompt, instruction or chosen"),
        ({"prompt": [{"role": "assistant", "content": "hello"}]}, "end with a user turn"),
        ({"prompt": 7}, "expected text or messages"),
        (["a?"], "expected an object"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path, row, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"bad.jsonl:2: .*{message}"):
        read_asks(str(file))


# ----------------------------------------------------------------------------- the command


@pytest.fixture
def command(directory, tmp_path, call):
    """command(*flags) runs generate.py in this process."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"question {i}?"}) + "\n" for i in range(5)))

    def go(*flags):
        call(generate, "--model", directory, "--max_new_tokens", 8, *flags)

    go.data, go.out = file, tmp_path / "deep" / "answers.jsonl"
    return go


def read_rows(file):
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


@pytest.mark.parametrize("mode", generate.MODES)
def test_each_mode_runs(directory, command, mode):
    flags = ["--model", directory, "--data", command.data, "--max_new_tokens", 6, "--mode", mode]
    flags += ["--limit", 3, "--batch", 2, "--instruction", "another", "--out", command.out]
    script = [sys.executable, str(ROOT / "generate.py"), *map(str, flags)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = read_rows(command.out)
    assert [row["prompt"] for row in rows] == [user(f"question {i}?") for i in range(3)]
    expected = {"prompt", "answer", "finished", "model", "mode", "seed"}
    expected |= {"temperature", "top_p", "max_new_tokens"}
    expected |= {"plain": set(), "instruct": {"instruction"}, "refine": {"instruction", "draft"}}[
        mode
    ]
    assert all(set(row) == expected and row["mode"] == mode for row in rows)


def test_a_file_is_continued(command):
    command("--data", command.data, "--out", command.out)
    whole = command.out.read_bytes()
    command("--data", command.data, "--out", command.out)  # complete: nothing to do
    assert command.out.read_bytes() == whole
    third = whole.find(b"\n", whole.find(b"\n") + 1) + 1
    command.out.write_bytes(whole[: third + 40])  # killed while the third row was written
    command("--data", command.data, "--out", command.out)
    assert command.out.read_bytes() == whole


def test_a_file_of_another_run_is_left_alone(command, capsys):
    command("--data", command.data, "--out", command.out)
    whole = command.out.read_bytes()
    for flags, message in (
        (["--seed", 1], "jsonl:1: of another run (seed differs)"),
        (["--mode", "instruct"], "jsonl:1: of another run (mode differs)"),
        (["--limit", 2], "5 rows for 2 prompts"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            command("--data", command.data, "--out", command.out, *flags)
        assert message in capsys.readouterr().err
        assert command.out.read_bytes() == whole
    command.data.write_text('{"prompt": "another question"}\n' * 5)
    with pytest.raises(SystemExit):
        command("--data", command.data, "--out", command.out)
    assert "prompt differs" in capsys.readouterr().err


def test_rows_go_to_standard_output(command, capfd):
    command("--data", command.data, "--limit", 2)
    rows = [json.loads(line) for line in capfd.readouterr().out.split("\n")[:-1]]
    assert [row["prompt"] for row in rows] == [user("question 0?"), user("question 1?")]


def test_a_single_prompt_streams_its_answer(command, capfd):
    """What is printed is what the same command writes as `answer`, and the draft goes aside."""
    ask = ["--prompt", "Why?", "--mode", "refine", "--temperature", 0]
    command(*ask, "--out", command.out)
    (row,) = read_rows(command.out)
    capfd.readouterr()
    command(*ask)
    printed = capfd.readouterr()
    whole = row["answer"].rstrip("\ufffd")  # a character that never became whole is not shown
    assert printed.out.rstrip("\n").startswith(whole)
    assert row["draft"].rstrip("\ufffd") in printed.err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", "a", "--data", "b"], "either --prompt TEXT or --data FILE"),
        ([], "either --prompt TEXT or --data FILE"),
        (["--prompt", "a", "--top_p", "0"], "--top_p must be in (0, 1]"),
        (["--prompt", "a", "--batch", "0"], "--batch 0: must be at least 1"),
        (["--prompt", "a", "--model", "no/where/at/all"], "--model no/where/at/all: no such"),
        (["--data", "no-such-file.jsonl"], "no such file"),
        (["--data", "prompts", "--out", "/dev/null/x"], "--out /dev/null/x: "),
    ],
)
def test_errors_are_one_line(command, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        command(*[str(command.data) if flag == "prompts" else flag for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_a_reward_model_does_not_answer(tmp_path, command, capsys):
    reward = write_model(tmp_path / "reward", tiny.REWARD)
    with pytest.raises(SystemExit):
        command("--model", reward, "--prompt", "a")
    assert "is a reward model; a language model is needed" in capsys.readouterr().err
