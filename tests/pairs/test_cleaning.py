"""InSPO's cleaning rules (appendix D.2): each alone, together, and what they count."""

import pytest
from dialogues import GOOD, say, write_rows
from published import h4

from hub.template import Template
from jobs.cli import UserError
from pairs.cleaning import CleaningFlags, clean
from pairs.layouts import Pair
from pairs.read import Drops, read_pairs
from train import TrainFlags


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    """One token per byte, so that lengths can be told by eye."""
    return Template(tiny_model_dir)


def pair(i, chosen, rejected, margin=None, prompt="Why?"):
    return Pair(say(prompt), chosen, rejected, f"f:{i}", margin)


def cleaned(pairs, template, **rules):
    """(rows kept, {rule: rows dropped})"""
    drops = Drops()
    kept = clean(pairs, CleaningFlags(**rules), template, drops)
    assert len(kept) + drops.total == len(pairs)
    return [p.where[2:] for p in kept], {r: [w[2:] for w in ws] for r, ws in drops.rules.items()}


def test_no_rule_is_on_by_default(tiny):
    assert CleaningFlags.of(TrainFlags()) == CleaningFlags()
    pairs = [pair(1, "a", "b"), pair(2, "a", "b"), pair(3, "a" * 9999, "b", -5.0)]
    assert cleaned(pairs, tiny) == (["1", "2", "3"], {})


def test_of_exact_duplicates_the_first_stays(tiny):
    """Prompt, both answers and roles count; white space and case are differences."""
    system = [{"role": "system", "content": "Why?"}]
    pairs = [
        pair(1, "a", "b"),
        pair(2, "a", "b"),
        pair(3, "b", "a"),
        pair(4, "a", "b "),
        pair(5, "a", "b", prompt="why?"),
        Pair(system, "a", "b", "f:6"),
        pair(7, "a", None),
        pair(8, "a", None),
        pair(9, "a", "b", margin=2.0),
    ]
    expected = ["1", "3", "4", "5", "6", "7"], {"duplicate": ["2", "8", "9"]}
    assert cleaned(pairs, tiny, dedup=True) == expected


def test_copies_made_by_a_weight_are_no_duplicates(tmp_path, tiny):
    file = write_rows(tmp_path, [GOOD, GOOD | {"chosen": "Yes."}, GOOD])
    drops = Drops()
    pairs = clean(read_pairs(f"{file}@2", Drops()), CleaningFlags(dedup=True), tiny, drops)
    assert [p.chosen for p in pairs] == ["So.", "Yes."] * 2
    assert set(drops.rules["duplicate"]) == {f"{file}:3"}


def test_either_answer_may_be_too_long_and_both_must_be_short(tiny):
    pairs = [
        pair(1, "a" * 64, "b" * 64),
        pair(2, "a" * 65, "b"),
        pair(3, "a", "b" * 65),
        pair(4, "a" * 31, "b" * 31),
        pair(5, "a" * 32, "b"),
        pair(6, "a", "b" * 32),
        pair(7, "é" * 16, "b"),  # 32 bytes
        pair(8, "a" * 31, None),
    ]
    assert cleaned(pairs, tiny, max_answer=64, min_answer=32) == (
        ["1", "5", "6", "7"],
        {"answer over 64 tokens": ["2", "3"], "both answers under 32 tokens": ["4", "8"]},
    )
    assert cleaned(pairs, tiny, max_answer=64)[0] == ["1", "4", "5", "6", "7", "8"]
    assert cleaned(pairs, tiny, min_answer=32)[0] == ["1", "2", "3", "5", "6", "7"]


def test_lengths_are_those_of_the_text_as_a_message_says_it(tiny):
    """A special token's name inside an answer is its letters: "<|im_end|>" is ten tokens here."""
    assert cleaned([pair(1, "<|im_end|>", "b")], tiny, max_answer=10) == (["1"], {})
    with pytest.raises(UserError, match="1 answer over 9 tokens"):
        cleaned([pair(1, "<|im_end|>", "b")], tiny, max_answer=9)


def test_more_pairs_than_a_block_keep_their_lengths(tiny):
    """Lengths are counted for blocks of 512 pairs."""
    pairs = [pair(i, "a" * (i % 7 + 1), "b") for i in range(1100)]
    expected = [str(i) for i in range(1100) if i % 7 + 1 <= 3]
    assert cleaned(pairs, tiny, max_answer=3)[0] == expected


def test_a_margin_is_asked_for_where_there_are_scores(tiny):
    pairs = [pair(i, "a", "b", m) for i, m in enumerate((2.0, 1.0, 0.999, 0.0, -3.0, None))]
    assert cleaned(pairs, tiny, min_margin=1.0) == (
        ["0", "1", "5"], {"margin under 1": ["2", "3", "4"]})  # fmt: skip
    assert cleaned(pairs, tiny, min_margin=0.0)[0] == ["0", "1", "2", "3", "5"]


def test_the_papers_rules_together_on_rows_of_ultrafeedback(tmp_path, tiny):
    long, short = "a" * 40, "b" * 20
    rows = [
        h4("Why?", long, short, (8.0, 5.0)),
        h4("Why?", long, short, (8.0, 5.0)),
        h4("How?", long, short, (8.0, 7.5)),
        h4("Who?", "a" * 2049, short, (8.0, 5.0)),
        h4("What?", "c" * 31, short, (8.0, 5.0)),
    ]
    drops, pairs = Drops(), read_pairs(write_rows(tmp_path, rows, "train_prefs.parquet"), Drops())
    rules = CleaningFlags(dedup=True, max_answer=2048, min_answer=32, min_margin=1.0)
    assert clean(pairs, rules, tiny, drops) == pairs[:1]
    assert {rule: len(where) for rule, where in drops.rules.items()} == {
        "duplicate": 1,
        "margin under 1": 1,
        "answer over 2048 tokens": 1,
        "both answers under 32 tokens": 1,
    }


def test_nothing_left_is_told_with_the_reasons(tiny):
    with pytest.raises(UserError, match="no pair is left after cleaning; dropped: 1 margin under"):
        clean([pair(1, "a", "b", 0.5)], CleaningFlags(min_margin=1.0), tiny, Drops())
