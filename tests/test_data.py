"""A pair becomes paths: the papers' sequences by eye, and the length limits that hold for all."""

import shutil
import string
from types import SimpleNamespace

import numpy as np
import pytest
from dialogues import say

import train
from data import Dataset, Limits, lay_out, permutation, plain_paths, trie_size
from hub.template import Template
from jobs.cli import UserError
from losses import CONDITIONS, Path, recipe, unique
from pairs.layouts import Pair

ROOMY = Limits(max_len=10_000, draft_cap=1.0)


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    """One token per byte, ChatML without a default system turn."""
    return Template(tiny_model_dir)


@pytest.fixture(params=["tiny", "smollm2"])
def chat(request):
    """(Template, what it puts before the first user turn)."""
    if request.param == "tiny":
        return request.getfixturevalue("tiny"), ""
    smol = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    template = Template(request.getfixturevalue("smollm2"))
    return template, f"<|im_start|>system\n{smol}<|im_end|>\n"


# ----------------------------------------------------------------------------- by eye

X = "<|im_start|>user\nIs 7 prime?<|im_end|>\n<|im_start|>assistant\n"
XI = (
    "<|im_start|>user\nIs 7 prime?\nplease generate a better response<|im_end|>\n"
    "<|im_start|>assistant\n"
)
W, L, OTHER = "Yes.<|im_end|>", "No.<|im_end|>", "4<|im_end|>"
SEP = "\n\n"
TURN = "\n<|im_start|>user\nplease generate a better response<|im_end|>\n<|im_start|>assistant\n"
TWO = [Pair(say("Is 7 prime?"), "Yes.", "No.", "f:1"), Pair(say("2+2?"), "4", "5", "f:2")]

GOLDEN = {  # (condition, bridge): path: segments; the last one is scored, down to its end token
    ("none", "sep"): {
        "chosen|prompt": [X, W],
        "rejected|prompt": [X, L],
        "mismatched|prompt": [X, OTHER],
    },
    ("cross", "sep"): {  # InSPO Eq. 14-15: x sep l sep w*, the context without its end token
        "chosen|rejected": [X, SEP, "No.", SEP, W],
        "rejected|chosen": [X, SEP, "Yes.", SEP, L],
        "mismatched|rejected": [X, SEP, "No.", SEP, OTHER],
        "mismatched|chosen": [X, SEP, "Yes.", SEP, OTHER],
    },
    ("cross", "turn"): {  # IFSR Eq. 4: x l turn w*, the context ended as an answer is
        "chosen|rejected": [X, L, TURN, W],
        "rejected|chosen": [X, W, TURN, L],
        "mismatched|rejected": [X, L, TURN, OTHER],
        "mismatched|chosen": [X, W, TURN, OTHER],
    },
    ("one_sided", "sep"): {  # InSPO section 5.3 (ii)
        "chosen|rejected": [X, SEP, "No.", SEP, W],
        "rejected|rejected": [X, SEP, "No.", SEP, L],
        "mismatched|rejected": [X, SEP, "No.", SEP, OTHER],
    },
    ("averaged", "turn"): {  # InSPO section 5.3 (iv), with IFSR's bridge
        "chosen|prompt": [X, W],
        "rejected|prompt": [X, L],
        "chosen|rejected": [X, L, TURN, W],
        "rejected|chosen": [X, W, TURN, L],
        "mismatched|prompt": [X, OTHER],
        "mismatched|rejected": [X, L, TURN, OTHER],
        "mismatched|chosen": [X, W, TURN, OTHER],
    },
    ("instruct", "turn"): {  # IFSR without the pseudo response
        "chosen|instruct": [XI, W],
        "rejected|instruct": [XI, L],
        "mismatched|instruct": [XI, OTHER],
    },
}


@pytest.mark.parametrize("condition, bridge", GOLDEN)
def test_the_paths_are_those_of_the_papers(condition, bridge, chat):
    template, preface = chat
    rule = recipe("kto", condition, bridge)
    dataset = Dataset(TWO, template, rule, ROOMY, "better")
    paths = {}
    for path in rule.paths + rule.kl_paths:
        segments, n = dataset.path(0, path)
        assert n == len(segments[-1])
        paths[str(path)] = [template.decode(s, skip_special=False) for s in segments]
        paths[str(path)][0] = paths[str(path)][0].removeprefix(preface)
    assert paths == GOLDEN[condition, bridge]


def by_prompt(*numbers):
    """Pairs as OASST and SHP have them, where neighbours share a prompt; one too long for ROOM."""
    questions = [f"Question {n}{'?' * 500 * (n == 2)}" for n in numbers]
    return [Pair(say(q), f"w{i}", f"l{i}" * (3 * i + 1), f"f:{i}") for i, q in enumerate(questions)]


ROOM = Limits(max_len=200, draft_cap=0.4)
GROUPS = by_prompt(1, 1, 1, 2, 2, 2, 3, 1, 4, 4)


@pytest.mark.parametrize("seed", range(5))
def test_kto_borrows_the_next_answer_to_another_prompt(seed, tiny):
    """Next in the order of the first epoch, found by a naive loop. A prompt that is cut to one
    length behind one pair and to another behind the next is still the same prompt."""
    rule = recipe("ifsr_kto")
    dataset = Dataset(GROUPS, tiny, rule, ROOM, "better", seed=seed)
    assert len(dataset) == len(GROUPS) and len({len(e.prompt) for e in dataset.examples}) > 2
    order = [*permutation(len(GROUPS), seed, 0)] * 2
    for place, i in enumerate(order[: len(GROUPS)]):
        later = (j for j in order[place:] if GROUPS[j].prompt != GROUPS[i].prompt)
        segments, _ = dataset.path(int(i), Path("rejected", "mismatched"))
        assert tiny.decode(segments[-1]) == GROUPS[next(later)].chosen
    others = {str(Dataset(GROUPS, tiny, rule, ROOM, "better", seed=s).mismatched) for s in range(5)}
    assert len(others) == 5


def test_the_reference_of_a_run_with_another_seed_is_not_taken_over(tiny):
    """Its mismatched answers are others: the cache's key covers whose answer is scored."""
    rule, keys = recipe("kto"), []
    for seed in (0, 0, 1):
        dataset = Dataset(GROUPS, tiny, rule, ROOM, "better", seed=seed)
        s = SimpleNamespace(dtype="fp32", attention="sdpa", score_eos=True)
        wanted = {"train": rule.reference_paths}
        run = SimpleNamespace(s=s, wanted=wanted, sets={"train": dataset}, by_token=set())
        keys.append(train.Run.reference_key(run, "weights"))
    assert keys[0] == keys[1] != keys[2]


def test_kto_asks_for_a_second_prompt(tiny):
    dataset = Dataset(by_prompt(2, 2, 2), tiny, recipe("kto"), ROOM, "better")
    assert dataset.path(0, Path(None, "chosen"))  # margins, say, need no other prompt
    with pytest.raises(UserError, match="f:0: all 3 pairs have the same prompt; KTO needs"):
        dataset.size(0, [Path(None, "mismatched")])


OWN = {"worse": "please generate a worse response", "Shorter, please": "Shorter, please"}


@pytest.mark.parametrize("instruction", OWN)
def test_the_instruction_is_one_of_the_papers_or_the_users_own(instruction, tiny):
    turn, suffix = (
        Dataset(TWO, tiny, rule, ROOMY, instruction)
        for rule in (recipe("ifsr_dpo"), recipe("dpo", "instruct"))
    )
    for ids, text in ((turn.after, TURN), (suffix.examples[0].instruct, XI)):
        told = text.replace("please generate a better response", OWN[instruction])
        assert tiny.decode(ids, skip_special=False) == told


def test_a_separator_of_ones_own(tiny):
    rule = recipe("ins_dpo")
    dataset = Dataset(TWO, tiny, rule, ROOMY, "better", sep=" ### ")
    segments, _ = dataset.path(0, rule.paths[0])
    assert [tiny.decode(s) for s in segments[1:]] == [" ### ", "No.", " ### ", "Yes."]


def test_without_score_eos_the_end_token_is_in_the_path_but_not_scored(tiny):
    """InSPO C.1."""
    dataset = Dataset(TWO, tiny, recipe("dpo"), Limits(999, 1.0, score_eos=False), "better")
    segments, n = dataset.path(0, Path(None, "chosen"))
    assert tiny.decode(segments[-1], skip_special=False) == W
    assert tiny.decode(segments[-1][:n], skip_special=False) == "Yes."


def test_a_reward_head_reads_the_whole_rendering_and_scores_its_last_token(tiny):
    rule = recipe("reward")
    dataset = Dataset(TWO, tiny, rule, ROOMY, "better")
    segments, _ = dataset.path(0, rule.paths[0])
    text = "".join(tiny.decode(s, skip_special=False) for s in segments)
    assert text == tiny.render([*TWO[0].prompt, *say("", "Yes.")[1:]])
    assert len(dataset.trie(0, rule.paths).source) == 2


def test_the_trie_of_a_pair_is_that_of_its_paths(tiny):
    """The averaged objective's plain answers are the contexts of the others: 2 turns and 2 answers
    on top of the plain pair's tokens, not 2 prompts and 4 answers."""
    plain, both = (recipe("ifsr_dpo", c) for c in ("none", "averaged"))
    dataset = Dataset(TWO, tiny, both, ROOMY, "better")
    paths = [dataset.path(0, path) for path in both.paths]
    assert dataset.trie(0, both.paths) == lay_out(paths)
    assert dataset.size(0, both.paths) == trie_size(paths)
    answers = len(dataset.examples[0].chosen) + len(dataset.examples[0].rejected)
    extra = dataset.size(0, both.paths) - dataset.size(0, plain.paths)
    assert extra == 2 * len(dataset.after) + answers


# ----------------------------------------------------------------------------- limits


def random_pair(rng, i):
    """A dialogue of 1 to 3 questions, perhaps with a system turn; texts of 1 to 60 letters.

    Its answers differ in their first letter, so that no cut makes them equal.
    """

    def text():
        return "".join(rng.choice(string.ascii_letters) for _ in range(rng.randint(1, 60)))

    turns = [text() for _ in range(rng.choice([1, 1, 3, 5]))]
    prompt = say(*turns, system=rng.choice([None, text()]))
    return Pair(prompt, f"w{text()}"[:60], f"l{text()}"[:60], f"f:{i}")


def random_dataset(rng, template, condition):
    """(Dataset or None where no pair was left, pairs, recipe) under random limits."""
    pairs = [random_pair(rng, i) for i in range(rng.randint(1, 4))]
    rule = recipe("kto", condition, rng.choice(["sep", "turn"]), rng.choice(["plain", None]))
    limits = Limits(rng.randint(60, 400), rng.choice([0.1, 0.4, 1.0]), rng.random() < 0.5)
    try:
        return Dataset(pairs, template, rule, limits, "better"), pairs, rule
    except UserError as error:
        assert "no room for a" in str(error)
        return None, pairs, rule


@pytest.mark.parametrize("condition", [*CONDITIONS, "each behind itself"])
def test_max_len_holds_for_every_path_and_every_path_has_something_to_score(
    condition, tiny, for_all, monkeypatch
):
    monkeypatch.setitem(CONDITIONS, "each behind itself", (("chosen", "rejected"),))  # a fork's

    def check(rng):
        dataset, _, rule = random_dataset(rng, tiny, condition)
        for i in range(len(dataset or ())):
            paths = [*rule.paths, *rule.kl_paths, *rule.reference_paths, *plain_paths(rule)]
            if len(set(dataset.examples.crc)) == 1:  # no other prompt to borrow an answer from
                paths = [path for path in paths if path.target != "mismatched"]
            for segments, n in (dataset.path(i, path) for path in unique(paths)):
                assert sum(map(len, segments)) <= dataset.limits.max_len
                ended = segments[-1][-1] == tiny.end_ids[0]  # as it is where nothing was cut
                unscored = 1 if ended and not dataset.limits.score_eos else 0
                assert n == len(segments[-1]) - unscored >= 1
                assert len(segments[0]) > 0

    for_all(check)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_answers_are_cut_on_the_right_and_then_carry_no_end_token(condition, tiny, for_all):
    def check(rng):
        dataset, pairs, rule = random_dataset(rng, tiny, condition)
        by_place = {pair.where: pair for pair in pairs}
        for example in dataset.examples if dataset else ():
            pair = by_place[example.where]
            for name in ("chosen", "rejected"):
                whole = tiny.encode([tiny.answer(pair.prompt, getattr(pair, name))])[0]
                ids, closed = getattr(example, name), example.closed[name]
                assert np.array_equal(ids, whole[: len(ids)])
                assert closed == (len(ids) == len(whole))
                assert closed == (tiny.end_ids[0] in ids)
            if condition in ("cross", "one_sided", "averaged"):  # a draft of at most this share
                room = int(dataset.limits.draft_cap * dataset.limits.max_len)
                assert len(example.rejected) <= room

    for_all(check)


def fits(roomy, i, limits):
    """Does pair i of an uncut dataset fit the limits? With room for two end tokens and for the
    instruction, which are reserved whether a path has them or not."""
    example, end = roomy.examples[i], roomy.template.end_ids
    longest = max(sum(map(len, roomy.path(i, path)[0])) for path in roomy.recipe.paths)
    reserved = len(example.instruct) - len(example.prompt) + 2 * len(end)
    draft = len(example.rejected) if roomy.in_context else 0
    return longest + reserved <= limits.max_len and draft <= limits.draft_cap * limits.max_len


@pytest.mark.parametrize("condition", CONDITIONS)
def test_nothing_is_cut_that_fits_and_every_pair_is_kept_or_counted(condition, tiny, for_all):
    def check(rng):
        dataset, pairs, rule = random_dataset(rng, tiny, condition)
        if dataset is None:
            return
        dropped = [where for places in dataset.drops.rules.values() for where in places]
        kept = {example.where: example for example in dataset.examples}
        assert sorted([*kept, *dropped]) == sorted(pair.where for pair in pairs)
        roomy = Dataset(pairs, tiny, rule, ROOMY, "better")
        for i, whole in enumerate(roomy.examples):
            if fits(roomy, i, dataset.limits):
                for part in ("prompt", "instruct", "chosen", "rejected"):
                    assert len(getattr(kept[whole.where], part)) == len(getattr(whole, part))

    for_all(check)


@pytest.mark.parametrize("bridge, after", [("sep", [SEP]), ("turn", ["<|im_end|>", TURN])])
def test_a_cut_answer_as_context_is_closed_as_any_other(bridge, after, tiny):
    """draft_cap leaves the rejected answer 6 of 300 tokens: "Never.", without its end token."""
    pair, rule = (
        Pair(TWO[0].prompt, "Yes.", "Never. At all.", "f:1"),
        recipe("dpo", "cross", bridge),
    )
    dataset = Dataset([pair], tiny, rule, Limits(300, 0.02), "better")
    segments = [tiny.decode(s, skip_special=False) for s in dataset.path(0, rule.paths[0])[0]]
    assert segments == [X, *([SEP] if bridge == "sep" else []), "Never.", *after, W]
    target, n = dataset.path(0, rule.paths[1])
    assert tiny.decode(target[-1], skip_special=False) == "Never." and n == 6


def test_an_unknown_bridge_or_context_is_told(tiny):
    with pytest.raises(UserError, match="--bridge none: unknown; choose from sep, turn"):
        Dataset(TWO, tiny, recipe("dpo", bridge="none"), ROOMY, "better")
    dataset = Dataset(TWO, tiny, recipe("ins_dpo"), ROOMY, "better")
    for context, fault in (("choosen", "unknown context"), ("instruct", "no instructed path")):
        with pytest.raises(ValueError, match=fault):
            dataset.path(0, Path(context, "chosen"))


def test_the_cuts_are_counted_by_rule(tiny):
    """Too long are the second's question, the third's rejected and the fourth's chosen answer."""
    long = "word " * 30
    pairs = [Pair(say(long if i == 1 else "Hi"), long if i == 3 else "good",
                  long if i == 2 else "bad", f"f:{i}") for i in range(4)]  # fmt: skip
    dataset = Dataset(pairs, tiny, recipe("dpo"), Limits(100, 0.4), "better")
    assert dataset.report() == (
        "4 pairs; cut: 1 prompts, 1 rejected answers, 1 chosen answers; dropped: none"
    )


def test_a_long_prompt_loses_whole_turns_first_and_keeps_the_system_turn(tiny):
    messages = say("old " * 20, "older", "mid " * 5, "middle", "new?", system="Be brief")
    pair, rule = Pair(messages, "w", "l", "f:1"), recipe("dpo")

    def tokens(*kept):
        return tiny.encode([tiny.render([*messages[:1], *kept], generation=True)])[0].tolist()

    def cut_to(room):  # "w" and its end token take the other two
        dataset = Dataset([pair], tiny, rule, Limits(room + 2, 0.4), "worse")
        return dataset.examples[0].prompt.tolist()

    whole, three, one = tokens(*messages[1:]), tokens(*messages[3:]), tokens(*messages[5:])
    assert cut_to(len(whole)) == whole
    assert cut_to(len(whole) - 1) == cut_to(len(three)) == three
    assert cut_to(len(three) - 1) == cut_to(len(one)) == one
    # at last, tokens from the middle of the question: letters, with this tokenizer
    assert cut_to(len(one) - 1) == tokens(messages[-1] | {"content": "ne?"})
    assert cut_to(len(one) - 2) == tokens(messages[-1] | {"content": "n?"})
    with pytest.raises(UserError, match=r"dropped: 1 no room for a question \(f:1\)"):
        cut_to(len(one) - 4)
    told = recipe("dpo", "instruct")
    (example,) = Dataset([pair], tiny, told, Limits(len(three) + 2, 0.4), "worse").examples
    suffixed = messages[-1] | {"content": "new?\nplease generate a worse response"}
    assert example.instruct.tolist() == tokens(suffixed)


def test_a_pair_without_room_for_an_answer_is_dropped_and_counted(tiny):
    """draft_cap 0.001 leaves a rejected answer no token; without a context it has its room."""
    limits = Limits(max_len=400, draft_cap=0.001)
    with pytest.raises(UserError, match=r"dropped: 2 no room for an answer \(f:1, f:2\)"):
        Dataset(TWO, tiny, recipe("ins_dpo"), limits, "better")
    assert len(Dataset(TWO, tiny, recipe("dpo"), limits, "better")) == 2


@pytest.mark.parametrize("condition", CONDITIONS)
def test_answers_that_are_equal_once_they_are_cut_prefer_nothing(condition, tiny):
    """Dropped: they differ in what is cut off both, or (in a context) off the shorter one; or in
    white space that the template trims. Kept: an answer that ends where the other goes on."""
    same = "The recipe begins with two eggs and a spoon of milk. " * 9
    answers = [(same + "Serve it warm.", same + "Serve it raw."), ("Fry it.", "Fry it. Slowly.")]
    answers += [("Fry it. Slowly.", "Fry it."), ("Fry it.", "Eat it raw.")]
    pairs = [Pair(say("Eggs?"), *both, f"f:{i}") for i, both in enumerate(answers)]
    dataset = Dataset(pairs, tiny, recipe("dpo", condition), Limits(400, 0.4), "better")
    assert dataset.drops.rules == {"identical answers": ["f:0"]}
    assert [example.where for example in dataset.examples] == ["f:1", "f:2", "f:3"]


def test_answers_that_the_template_trims_to_the_same_prefer_nothing(tmp_path, tiny_model_dir):
    directory = shutil.copytree(tiny_model_dir, tmp_path / "trims")
    settings = directory / "tokenizer_config.json"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace("m['content']", "m['content'] | trim"), encoding="utf-8")
    pairs = [Pair(say("Hi"), "Yes.", " Yes.\n", "f:1"), Pair(say("Hi"), "Yes.", "No.", "f:2")]
    dataset = Dataset(pairs, Template(directory), recipe("dpo"), ROOMY, "better")
    assert dataset.report() == "1 pairs; cut: none; dropped: 1 identical answers (f:1)"
