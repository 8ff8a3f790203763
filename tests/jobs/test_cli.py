"""Flags are the fields of a dataclass."""

import pytest

from jobs import cli
from jobs.cli import UserError, parse
from train import TrainFlags, resolve_flags


@pytest.mark.parametrize(
    "words, value",
    [
        ("", True),
        ("--context_grad", True),
        ("--no-context_grad", False),
        ("--context_grad false", False),
        ("--context_grad=False", False),
        ("--context_grad TRUE --loss dpo", True),
    ],
)
def test_booleans_are_switches_or_take_true_and_false(words, value):
    assert parse(TrainFlags, "", words.split()).context_grad is value


@pytest.mark.parametrize("words", ["--context_grad maybe", "--loss false true", "false"])
def test_other_words_are_refused(words):
    with pytest.raises(UserError):
        parse(TrainFlags, "", words.split())


def test_compile_without_a_compiler_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="--compile: there is no no-such-compiler"):
        resolve_flags(TrainFlags(compile=True), "cpu")
    resolve_flags(TrainFlags(compile=False), "cpu")
    resolve_flags(TrainFlags(), "cpu")


@pytest.mark.parametrize("other", [{"attention": "flex"}, {"loss": "reward"}])
def test_context_grad_false_refuses_what_it_cannot_do(other):
    with pytest.raises(UserError, match="--context_grad false"):
        resolve_flags(TrainFlags(context_grad=False, **other), "cuda")


def test_a_hyperparameter_with_the_name_of_another_flag_is_told(monkeypatch):
    """--clip 0.2 would be the gradient norm's limit and, in silence, the new loss's."""
    monkeypatch.setitem(cli.HYPER, "clip", {"new": 0.2})
    with pytest.raises(UserError, match="the hyperparameter clip is also another flag"):
        cli.parse(TrainFlags, "", [])
