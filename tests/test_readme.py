"""The README, the docs, the recipes and --help say the same: every command and flag exists."""

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
DOCS = {file: file.read_text(encoding="utf-8") for file in (ROOT / "docs").glob("*.md")}
SIX = ["losses.py", "data.py", "model.py", "train.py", "generate.py", "evaluate.py"]
WINGS = {"families", "hub", "pairs", "jobs", "kernels", "evals"}


def commands(text):
    """Every call of our scripts in a shell text -> (script, arguments)."""
    text = re.sub(r"\\\n", " ", text)
    for line in text.splitlines():
        for part in re.split(r"&&|;|\{ ", line):
            part = re.sub(r"^run ", "train.py ", part)  # a recipe's function
            if found := re.search(r"\b(train|generate|evaluate)\.py\s+(.*)", part):
                yield found.group(1), shlex.split(found.group(2), comments=True)


def shell_texts():
    """Shell blocks of README and docs, their indented lines, and the recipes."""
    pages = [README, *DOCS.values()]
    blocks = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page, re.S)]
    indented = ["\n".join(re.findall(r"^    (.*)$", page, re.M)) for page in pages]
    recipes = [file.read_text(encoding="utf-8") for file in ROOT.glob("recipes/*.sh")]
    return blocks + indented + recipes


CALLS = [call for text in shell_texts() for call in commands(text)]


def known_flags(script, arguments):
    if script == "evaluate":
        return parser_of(evaluate.find_command(arguments[0])[0], "")
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


def test_the_files_of_the_readme_are_the_root_files_and_the_wings():
    table = README[README.index("## The files") : README.index("## Results")]
    files = {file.name for file in ROOT.glob("*.py")}
    wings = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert re.findall(r"^\| `(\w+\.py)`", table, re.M) == SIX
    assert set(re.findall(r"\| `(\w+)/`", table)) == WINGS
    assert files == set(SIX) and wings - {"bench", "recipes"} == WINGS


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "recipes/README.md", *DOCS],
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_every_link_leads_somewhere(page):
    """Files exist, beside the page that names them; headings exist in the page that is named."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, heading = target.partition("#")
        if not name.startswith("http"):
            linked = page.parent / name if name else page
            assert linked.exists(), target
            assert not heading or heading in headings(linked), target


def headings(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_file_and_test_that_is_named_exists():
    pages = "\n".join([README, *DOCS.values()])
    exercises = {"evals/lengths.py", "families/olmo2.py"}  # which the tour's reader writes
    named = set(
        re.findall(r"(?<![\w/])((?:bench|tests|assets|recipes|evals|families)/[\w/]+\.\w+)", pages)
    )
    assert not [name for name in named - exercises if not (ROOT / name).exists()]
    tests = {file.name: file.read_text(encoding="utf-8") for file in ROOT.glob("tests/**/*.py")}
    for line in pages.splitlines():
        for file, functions in re.findall(r"(test_\w+\.py)((?:.*?::\w+)*)", line):
            assert file in tests, file
            for function in re.findall(r"::(\w+)", functions):
                assert f"def {function}(" in tests[file], f"{file}::{function}"


def test_the_prose_stays_short():
    """README at most 10 KB; the docs at most eight pages and 9,200 words outside their tables."""
    assert len(README.encode()) <= 10 * 1024
    prose = [x for text in DOCS.values() for x in text.splitlines() if not x.startswith("|")]
    assert len(DOCS) <= 8 and sum(len(line.split()) for line in prose) <= 9_200
