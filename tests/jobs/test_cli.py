"""Flags are the fields of a dataclass."""

import pytest

import evaluate
from generate import GenerateFlags
from jobs import cli
from jobs.cli import UserError, parse, parser_of, require
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


# ----------------------------------------------------------------------------- values and spelling

WRONG = {
    "--steps 0": "at least 1",
    "--epochs 0": "above 0",
    "--batch -4": "at least 1",
    "--lr -1": "above 0",
    "--lr inf": "a finite number",
    "--warmup 2": "below 1",
    "--clip -1": "at least 0",
    "--clip nan": "",
    "--keep 0": "at least 1",
    "--limit 0": "at least 1",
    "--draft_cap 1.5": "at most 1",
    "--seed -1": "at least 0",
    "--guard_threshold 3": "at most 1",
    "--beta inf": "a finite number",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_number_out_of_its_bounds_is_one_line(words):
    flag, value = words.split()
    with pytest.raises(UserError, match=rf"^{flag} {value}[\d.]*: must be {WRONG[words]}"):
        parse(TrainFlags, "", words.split())


@pytest.mark.parametrize("words", ["--clip 0", "--warmup 0", "--final_lr 1", "--gamma -1"])
def test_bounds_allow_what_has_a_meaning(words):
    parse(TrainFlags, "", words.split())


@pytest.mark.parametrize("name", evaluate.COMMANDS)
def test_bounds_hold_for_every_command_and_its_own_defaults(name):
    flags, _ = evaluate.find_command(name)
    s = parse(flags, "", [])
    numbers = [k for k, v in vars(s).items() if type(v) in (int, float)]
    for number in numbers:
        with pytest.raises(UserError, match=f"--{number} -2"):
            parse(flags, "", [f"--{number}", "-2"])


def test_dashes_stand_for_underscores():
    s = parse(TrainFlags, "", ["--max-len=7", "--no-score-eos", "--no_context-grad"])
    assert (s.max_len, s.score_eos, s.context_grad) == (7, False, False)
    assert parse(TrainFlags, "", ["--sep=a-b"]).sep == "a-b"


@pytest.mark.parametrize(
    "word, near", [("--betta", "--beta"), ("--batchsize=4", "--batch"), ("--maxlen", "--max_len")]
)
def test_a_wrong_flag_names_the_one_that_was_meant(word, near):
    with pytest.raises(UserError, match=rf"^unknown flag {word[:6]}.*\(did you mean {near}\?\)"):
        parse(TrainFlags, "", [word])


def test_all_missing_flags_are_told_at_once():
    with pytest.raises(UserError, match="^--model, --data are missing$"):
        require(GenerateFlags(), "model", "seed", "data")


def test_help_has_groups_real_defaults_and_the_right_usage(ended):
    out, _, _ = ended(evaluate, "reward", "--help")
    assert out.startswith("usage: python evaluate.py reward [flags]\n")
    assert out.count("\nflags:\n") == 1, "its own and those of a class without a name for users"
    assert "default: None" not in out and "(default last)" in " ".join(out.split())
    commands, _, _ = ended(evaluate, "--help")
    assert "Legend" not in commands and "\nextract " in commands, "nothing about the file"
    text = parser_of(TrainFlags, "").format_help()
    groups = ["\nflags:", "\nHyperparameters of the objectives", "\nHow a pair becomes paths"]
    assert all(group in text for group in groups)
    assert text.index("--lr LR") < text.index("\nHow a pair") < text.index("--draft_cap")
