"""Answer files are joined by prompt, and what cannot be joined or used is told."""

import json

import pytest

from evals.answers import align, question_ids, read_answers
from generate import read_asks
from hub.benchmarks import refuse_twins
from jobs.cli import UserError


@pytest.fixture
def answers_of(tmp_path):
    """answers_of(name, rows) writes a file and reads its answers."""

    def go(name, rows):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_answers(str(file), f"--{name}")

    return go


def said(prompt, answer, **more):
    return {"prompt": prompt, "answer": answer} | more


def pair(prompt, chosen):
    return {"prompt": prompt, "chosen": chosen, "rejected": "no"}


def test_the_kth_answer_meets_the_kth(answers_of):
    """Pairs may repeat a prompt, and more often than it was answered."""
    ours = answers_of("answers", [said("p", "1"), said("q", "2"), said("p", "3")])
    pairs = [pair("q", "a"), pair("p", "b"), pair("p", "c"), pair("p", "d"), pair("r", "e")]
    theirs = answers_of("against", pairs)
    assert [a.text for a in align(ours, theirs, "--against")] == ["b", "a", "c"]
    assert len(set(question_ids(ours))) == 3
    assert [a.text for a in align(ours, ours[::-1], "--against")] == ["3", "2", "1"]
    with pytest.raises(UserError, match="no answer to the prompt of .*answers.jsonl:3, .* 1 of 3"):
        align(ours, theirs[:2], "--against")


def test_second_turns_are_joined_by_what_was_asked(answers_of):
    """Whatever each model had answered to the first turn; it is shown with the second."""
    ours, theirs = (
        answers_of(name, [{"prompt": [said_by("user", "p"), said_by("assistant", first),
                                      said_by("user", "q")], "answer": "b", "turns": 2}])
        for name, first in (("answers", "a"), ("against", "A"))
    )  # fmt: skip
    assert [a.text for a in ours] == ["a", "b"]
    joined = align(ours, theirs, "--against")
    assert [a.said for a in joined] == ["A", "Assistant: A\n\nHuman: q\n\nAssistant: b"]
    assert joined[1].question == [said_by("user", "p"), said_by("user", "q")]


def said_by(who, text):
    return {"role": who, "content": text}


def test_an_answer_file_must_answer_once(answers_of):
    ours = answers_of("answers", [said("p", "1")])
    theirs = answers_of("against", [said("p", "a"), said("p", "b")])
    with pytest.raises(UserError, match="against.jsonl:2: same prompt as .*against.jsonl:1"):
        align(ours, theirs, "--against")


def test_pairs_without_use_are_told(answers_of, capsys):
    assert len(answers_of("against", [pair("p", "a"), pair("q", " ")])) == 1
    assert "dropped 1 empty answer" in capsys.readouterr().out
    with pytest.raises(UserError, match="--against .*against.jsonl: no answers"):
        answers_of("against", [pair("q", " ")])


def test_arena_hard_takes_a_question_once(answers_of):
    with pytest.raises(UserError, match="ours: questions 1 and 3 have the same id"):
        refuse_twins(answers_of("answers", [said("p", ""), said("q", ""), said("p", "")]), "ours")


def test_a_subset_goes_from_the_question_to_its_answer(tmp_path, answers_of):
    file = tmp_path / "asks.jsonl"
    file.write_text(json.dumps({"prompt": "p", "subset": "hard", "category": "c"}) + "\n")
    (ask,) = read_asks(str(file))
    (answer,) = answers_of("answers", [said("p", "a", **ask.about)])
    assert answer.subset == "hard"
    assert answers_of("more", [said("p", "a", dataset="d", subset=3)])[0].subset == "d"
