"""The README, the recipes and --help say the same: every command and flag in them exists."""

import re
import shlex
from pathlib import Path

import pytest

import evaluate
import generate
from jobs.cli import parser_of
from losses import OBJECTIVES, PRESETS
from train import TrainFlags

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text):
    """Every call of our scripts in a shell text -> (script, arguments)."""
    text = re.sub(r"\\\n", " ", text)
    for line in text.splitlines():
        for part in re.split(r"&&|;|\{ ", line):
            part = re.sub(r"^run ", "train.py ", part)  # a recipe's function
            if found := re.search(r"\b(train|generate|evaluate)\.py\s+(.*)", part):
                yield found.group(1), shlex.split(found.group(2), comments=True)


def shell_texts():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    return blocks + [file.read_text(encoding="utf-8") for file in ROOT.glob("recipes/*.sh")]


CALLS = [call for text in shell_texts() for call in commands(text)]


def known_flags(script, arguments):
    if script == "evaluate":
        return parser_of(evaluate.COMMANDS[arguments[0]][0], "")
    return parser_of({"train": TrainFlags, "generate": generate.GenerateFlags}[script], "")


@pytest.mark.parametrize("script, arguments", CALLS, ids=lambda x: x if isinstance(x, str) else "")
def test_every_flag_of_every_command_exists(script, arguments):
    options = known_flags(script, arguments)._option_string_actions
    for word in arguments:
        assert not word.startswith("--") or word.partition("=")[0] in options, word


def test_there_are_commands_to_check():
    assert {script for script, _ in CALLS} == {"train", "generate", "evaluate"}


def test_the_table_of_objectives_is_the_one_in_losses():
    table = README[README.index("| `--loss` |") : README.index("On which *path*")]
    rows = re.findall(r"^\| `(\w+)` \|.*\|(.*)\|$", table, re.M)
    assert [name for name, _ in rows] == list(OBJECTIVES)
    for name, flags in rows:
        stated = dict(re.findall(r"--(\w+) ([\d.]+)", flags))
        assert {k: float(v) for k, v in stated.items()} == OBJECTIVES[name].defaults, name


def test_every_flag_of_train_has_a_help_text_and_hyperparameters_have_flags():
    flags = {action.dest: action.help for action in parser_of(TrainFlags, "")._actions}
    assert all(flags.values())
    for objective in OBJECTIVES.values():
        assert set(objective.defaults) <= set(flags)


def test_presets_of_the_readme_are_those_of_the_table():
    assert PRESETS["ins_dpo"] == ("dpo", "cross", "sep", "plain")
    assert PRESETS["ifsr_dpo"] == ("dpo", "cross", "turn", "conditioned")
    assert PRESETS["irft"] == ("sft", "averaged", "turn", "conditioned")


def test_every_file_of_the_readme_exists_and_every_module_is_in_it():
    files = README[README.index("## The files") :]
    named = set(re.findall(r"`(\w+\.py)`", files))
    assert named == {file.name for file in ROOT.glob("*.py")}
