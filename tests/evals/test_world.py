"""The small world (assets/world.py): its preferences, its exact win rates, its committed files."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from assets import build, world
from evals.world import world_probabilities
from generate import load_model
from hub.template import Template

ASSETS = Path(build.__file__).parent
Q, A = len(world.questions()), 16
SKY = world.questions()[0]
MODELS = ("start", "start-single", "reward")


def always(answer):
    """(Q, A) policy that gives one answer to every question."""
    return np.tile(np.eye(A)[answer], (Q, 1))


def random_policy(seed, leak=0.0):
    """(Q, A) random probabilities whose rows sum to 1 - leak."""
    p = np.random.default_rng(seed).dirichlet(np.ones(A), size=Q)
    return (1 - leak) * p


# ----------------------------------------------------------------------------- texts


def test_every_question_has_sixteen_different_answers():
    assert len(set(world.questions())) == Q == 20
    texts = [text for question in world.questions() for text in world.answers(question)]
    assert all(len(set(world.answers(question))) == A for question in world.questions())
    assert all(text == " ".join(text.split()) for text in texts)


def test_answers_are_the_products_of_the_four_choices():
    """Row 0 of CHOICES is the worst of every choice, row 15 the best, in the documented order."""
    _, right, wrong, reason = world.FACTS[0]
    worst, best = world.answers(SKY)[0], world.answers(SKY)[15]
    assert worst == f"{world.GREETINGS[0]} {wrong} {world.CLOSINGS[0]}"
    assert best == f"{world.GREETINGS[1]} {right} {reason} {world.CLOSINGS[1]}"
    assert world.utility()[0] == 0 and world.utility()[15] == world.SCORES.sum()
    for text, choices in zip(world.answers(SKY), world.CHOICES, strict=True):
        parts = (world.GREETINGS[1], right, reason, world.CLOSINGS[1])
        assert [int(part in text) for part in parts] == choices.tolist()


def test_an_unknown_question_is_an_error():
    with pytest.raises(KeyError):
        world.answers("What is love?")
    with pytest.raises(KeyError):
        world.preference_matrix("What is love?")
    with pytest.raises(ValueError, match="separable, intransitive"):
        world.preference_matrix(SKY, "cyclic")


# ----------------------------------------------------------------------------- preferences


@pytest.mark.parametrize("kind", [*world.KINDS, world.MIRRORED, world.TWO_JUDGES])
def test_one_of_two_answers_is_preferred(kind):
    """P + P^T = 1 and no preference between an answer and itself."""
    p = world.preference_matrix(SKY, kind)
    np.testing.assert_allclose(p + p.T, 1, atol=1e-15)
    np.testing.assert_allclose(np.diag(p), 0.5, atol=0)
    assert (p > 0).all() and (p < 1).all()


def test_separable_preference_by_hand():
    """Two answers that differ in the fact alone: sigmoid(2) = 0.8808 for the right one."""
    p = world.preference_matrix(SKY)
    assert world.CHOICES[4].tolist() == [0, 1, 0, 0] and world.CHOICES[0].tolist() == [0, 0, 0, 0]
    assert p[4, 0] == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert p[4, 0] == pytest.approx(0.8808, abs=1e-4)


def test_intransitive_preference_by_hand():
    """Greeting added to a curt answer: one step back on the circle, sigmoid(1 - 3) = 0.1192."""
    p = world.preference_matrix(SKY, "intransitive")
    assert world.style()[[0, 1, 9, 8]].tolist() == [0, 1, 2, 3]  # 00, 01, 11, 10
    assert p[8, 0] == pytest.approx(1 / (1 + math.exp(-(1.0 - world.TASTE))))
    assert p[1, 0] == pytest.approx(1 / (1 + math.exp(-(1.0 + world.TASTE))))
    assert p[9, 0] == pytest.approx(1 / (1 + math.exp(-2.0)))  # opposite styles: utility decides


def test_two_judges_by_hand():
    """With a greeting the right fact wins as usual, without it loses as often; else a coin."""
    p = world.preference_matrix(SKY, world.TWO_JUDGES)
    assert p[12, 8] == pytest.approx(1 / (1 + math.exp(-2.0)))  # both open with "Hello!"
    assert p[4, 0] == pytest.approx(1 / (1 + math.exp(2.0)))  # both with "Hm."
    assert p[12, 0] == p[4, 8] == 0.5
    uniform = np.full((Q, A), 1 / A)
    blind, shown = (world.best_win_rate(uniform, world.TWO_JUDGES, s) for s in (False, True))
    assert shown - blind > 0.15  # who sees the other answer knows which judge comes


def test_only_the_separable_kind_has_a_utility():
    """Bradley-Terry holds iff logits add up to zero around every cycle (Kolmogorov's criterion)."""

    def around(kind, cycle):
        p = world.preference_matrix(SKY, kind)
        steps = zip(cycle, [*cycle[1:], cycle[0]], strict=True)
        return sum(math.log(p[b, a] / p[a, b]) for a, b in steps)

    for triple in itertools.combinations(range(A), 3):
        assert around("separable", triple) == pytest.approx(0, abs=1e-9)
    assert around("intransitive", [0, 1, 9, 8]) == pytest.approx(4 * world.TASTE)
    p = world.preference_matrix(SKY, "intransitive")
    assert min(p[1, 0], p[9, 1], p[8, 9], p[0, 8]) > 0.5  # each beats the one before: a cycle


# ----------------------------------------------------------------------------- win rates


@pytest.mark.parametrize("kind", world.KINDS)
@pytest.mark.parametrize("leak", [0.0, 0.3, 1.0])
def test_a_policy_against_itself_wins_half(kind, leak):
    policy = random_policy(0, leak)
    assert world.expected_win_rate(policy, policy, kind) == pytest.approx(0.5, abs=1e-12)


def test_win_rates_by_hand():
    """Right against wrong: sigmoid(2); right half of the time: (sigmoid(2) + 1/2) / 2."""
    sigmoid2 = 1 / (1 + math.exp(-2.0))
    assert world.expected_win_rate(always(4), always(0)) == pytest.approx(sigmoid2)
    half = (always(4) + always(0)) / 2
    assert world.expected_win_rate(half, always(0)) == pytest.approx((sigmoid2 + 0.5) / 2)


def test_text_outside_the_answers_loses_and_ties_with_its_like():
    """p gives an answer with 0.9, o with 0.8: win = 0.72 P + 0.9 * 0.2 + 0.1 * 0.2 / 2."""
    p = world.preference_matrix(SKY)[4, 0]
    expected = 0.72 * p + 0.18 + 0.01
    assert world.expected_win_rate(0.9 * always(4), 0.8 * always(0)) == pytest.approx(expected)
    assert world.expected_win_rate(0 * always(0), always(0)) == 0
    assert world.expected_win_rate(always(0), 0 * always(0)) == 1


@pytest.mark.parametrize("kind", world.KINDS)
def test_win_rate_agrees_with_a_simulated_judge(kind):
    """200,000 simulated comparisons, answers outside the 16 included: within 5 standard errors."""
    policy, opponent = random_policy(1, 0.2), random_policy(2, 0.1)
    rng, n = np.random.default_rng(3), 10_000
    wins = 0.0
    for q, question in enumerate(world.questions()):
        matrix = np.pad(world.preference_matrix(question, kind), (0, 1), constant_values=1.0)
        matrix[A, :A], matrix[A, A] = 0.0, 0.5  # the 17th answer: anything else
        a = rng.choice(A + 1, size=n, p=[*policy[q], 1 - policy[q].sum()])
        b = rng.choice(A + 1, size=n, p=[*opponent[q], 1 - opponent[q].sum()])
        wins += (rng.random(n) < matrix[a, b]).sum()
    exact = world.expected_win_rate(policy, opponent, kind)
    assert wins / (n * Q) == pytest.approx(exact, abs=5 * 0.5 / math.sqrt(n * Q))


@pytest.mark.parametrize("kind", world.KINDS)
def test_being_shown_the_opponents_answer(kind):
    """Ignoring what is shown changes nothing; the best reply to it reaches best_win_rate."""
    policy, opponent = random_policy(4, 0.1), random_policy(5, 0.2)
    blind = np.repeat(policy[:, None], A, axis=1)  # (Q, B, A)
    expected = world.expected_win_rate(policy, opponent, kind)
    assert world.expected_win_rate(blind, opponent, kind) == pytest.approx(expected)
    replies = world.preference_matrix(SKY, kind).argmax(0)  # (B,)
    best = np.tile(np.eye(A)[replies], (Q, 1, 1))
    reached = world.expected_win_rate(best, opponent, kind)
    assert reached == pytest.approx(world.best_win_rate(opponent, kind, shown=True))


def test_only_intransitive_preferences_reward_looking():
    """One answer is best against all under a utility; on a circle none is (InSPO Theorem 3.2)."""
    uniform = np.full((Q, A), 1 / A)
    blind, shown = (world.best_win_rate(uniform, shown=s) for s in (False, True))
    assert blind == pytest.approx(shown)
    assert blind == pytest.approx(world.expected_win_rate(always(15), uniform))
    blind, shown = (world.best_win_rate(uniform, "intransitive", shown=s) for s in (False, True))
    assert shown > blind + 0.1


def test_answer_probabilities():
    logps = np.log(random_policy(6, 0.05))
    np.testing.assert_allclose(world.answer_probabilities(logps).sum(-1), 0.95)
    with pytest.raises(ValueError, match="above 1"):
        world.answer_probabilities(np.zeros((Q, A)))


# ----------------------------------------------------------------------------- samples


def test_pairs_are_reproducible_and_well_formed():
    rows = list(world.sample_pairs(50, seed=7))
    assert rows == list(world.sample_pairs(50, seed=7)) != list(world.sample_pairs(50, seed=8))
    for row in rows:
        assert sorted(row) == ["chosen", "prompt", "rejected"]
        assert row["chosen"] != row["rejected"]
        assert {row["chosen"], row["rejected"]} <= set(world.answers(row["prompt"]))


@pytest.mark.parametrize("kind", world.KINDS)
def test_labels_follow_the_preference(kind):
    """The right answer is chosen as often as its exact probability says, within 5 errors."""
    rows, n, expected, chosen = world.sample_pairs(4000, 0, kind), 0, 0.0, 0
    for row in rows:
        texts = world.answers(row["prompt"])
        w, l = texts.index(row["chosen"]), texts.index(row["rejected"])
        if world.CHOICES[w][1] != world.CHOICES[l][1]:
            right, wrong = (w, l) if world.CHOICES[w][1] else (l, w)
            expected += world.preference_matrix(row["prompt"], kind)[right, wrong]
            chosen += right == w
            n += 1
    assert n > 1000
    assert chosen / n == pytest.approx(expected / n, abs=5 * 0.5 / math.sqrt(n))


def test_the_starts_data_prefer_nothing():
    """Every ordered pair of different answers exactly once."""
    rows = world.uniform_pairs(0)
    assert len(rows) == len({tuple(row.values()) for row in rows}) == Q * A * (A - 1)
    assert all(row["chosen"] != row["rejected"] for row in rows)


# ----------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", build.FILES)
def test_committed_data_are_what_world_generates(name):
    committed = (ASSETS / "world" / name).read_text(encoding="utf-8")
    assert committed == build.as_jsonl(build.FILES[name]())


@pytest.mark.parametrize("name", MODELS)
def test_committed_tokenizer_is_what_build_trains(name, tmp_path):
    build.write_tokenizer(tmp_path)
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (ASSETS / name / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.fixture(scope="module")
def round_trip():
    """text -> text through the tokenizer's ids."""
    tokenizer = Tokenizer.from_file(str(ASSETS / "start" / "tokenizer.json"))
    return lambda text: tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)


def test_tokenizer_loses_nothing_of_any_text(round_trip, for_all):
    planes = (range(0x20, 0x7F), range(0x80, 0xD800), range(0xE000, 0x110000))

    def check(rng):
        text = "".join(chr(rng.choice(rng.choice(planes))) for _ in range(rng.randrange(40)))
        assert round_trip(text) == text

    for_all(check)


def test_tokenizer_loses_nothing_of_the_world(round_trip):
    for question in world.questions():
        for text in (question, *world.answers(question)):
            assert round_trip(text) == text
    for text in ("  two  spaces\t\n\n", "naïve 你好 🙂\u200d🙂", "\u2028 \x00 \ufeff e\u0301"):
        assert round_trip(text) == text


@pytest.mark.parametrize("name", MODELS)
def test_a_question_is_read_however_people_spell_it(name):
    """In transformers too; what the world itself writes has the ids that it would have anyway."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoTokenizer.from_pretrained(ASSETS / name)
    template, bare = Template(ASSETS / name), Tokenizer.from_file(f"{ASSETS / name}/tokenizer.json")
    bare.normalizer = None
    better = "please generate a better response"

    def ids(text):
        rendered = template.render([{"role": "user", "content": text}], generation=True)
        found = template.encode([rendered])[0].tolist()
        assert peer(rendered)["input_ids"] == found
        return found, bare.encode(rendered).ids

    for question in world.questions():
        for behind in ("", f"\n{better}"):
            ours, plain = ids(question + behind)
            assert ours == plain
            for spelt in (question.lower(), question.rstrip("?"), f"{question.upper()}?!"):
                assert ids(spelt + behind)[0] == ours
            spelt = question.lower().rstrip("?")
            assert ids(spelt + behind)[0] == ours != ids(spelt + behind)[1]
            for other in (f"{spelt} and why", f"tell me {spelt}"):  # not that question alone
                assert ids(other + behind)[0] == ids(other + behind)[1]
        for text in world.answers(question):
            assert template.encode([text])[0].tolist() == bare.encode(text).ids


def test_special_tokens_and_template():
    """Pad, end of turn and separator are three different tokens; no system turn is injected."""
    template = Template(ASSETS / "start")
    assert template.end == "<|im_end|>" and template.separator() == "<|reserved_special_token_0|>"
    assert not template.fallback
    messages = [{"role": "user", "content": SKY}]
    expected = f"<|im_start|>user\n{SKY}<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(messages, generation=True) == expected
    config = json.loads((ASSETS / "start" / "config.json").read_text(encoding="utf-8"))
    ids = [template.tokenizer.token_to_id(t) for t in (template.end, "<|endoftext|>")]
    assert [config["eos_token_id"], config["pad_token_id"]] == ids == [2, 0]


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_models(name):
    transformers = pytest.importorskip("transformers")

    head = "AutoModelForSequenceClassification" if name == "reward" else "AutoModelForCausalLM"
    model, info = getattr(transformers, head).from_pretrained(
        ASSETS / name, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / name)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    messages = [{"role": "user", "content": SKY}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ours = Template(ASSETS / name).render(messages, generation=True)
    assert theirs == ours
    assert tokenizer(ours)["input_ids"] == Template(ASSETS / name).encode([ours])[0].tolist()
    assert model.config.vocab_size >= len(tokenizer)


@pytest.mark.parametrize("name", ["start", "start-single"])
def test_starts_give_each_answer_about_equally_often(name):
    """What the README of assets/ says: nearly all mass on the 16 answers, nearly uniform."""
    p = world_probabilities(*load_model(ASSETS / name, "fp32", "cpu"))  # (Q, A)
    assert p.sum(-1).min() > 0.97
    entropy = -(p * np.log(p)).sum(-1)
    assert entropy.min() > 0.97 * math.log(A)
    uniform = np.full((Q, A), 1 / A)
    assert world.expected_win_rate(p, uniform) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("bridge", ["sep", "turn"])
def test_start_knows_second_attempts(bridge):
    """Behind each bridge an answer follows, seldom the same; start-single has never seen that."""
    p = world_probabilities(*load_model(ASSETS / "start", "fp32", "cpu"), bridge)  # (Q, B, A)
    assert p.sum(-1).mean() > 0.97
    assert p.diagonal(axis1=1, axis2=2).mean() < 0.9 / A  # the attempts that it saw were others
    single = world_probabilities(*load_model(ASSETS / "start-single", "fp32", "cpu"), bridge)
    assert single.sum(-1).mean() < 0.5
