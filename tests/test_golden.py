"""What every objective scores, and behind what, written out for eyes: tests/golden_paths.md.

    PYTHONPATH=.:tests/tools python tests/test_golden.py    writes it again: COMMAND, below

The page is read off packed rows by the attention rule, not off the segments that were put in: what
a path's first scored token sees, and the labels that are scored.
"""

import tempfile
from pathlib import Path

import pytest
from chat_templates import CHATML, LLAMA3, MISTRAL, SPECIAL, write_checkpoint

from data import BRIDGES, Dataset, Limits, build_row
from hub.template import Template
from losses import CONDITIONS, recipe
from model import visible
from pairs.layouts import Pair

COMMAND = "PYTHONPATH=.:tests/tools python tests/test_golden.py"
PAGE = Path(__file__).parent / "golden_paths.md"
BOS, RESERVED = "<|begin_of_text|>", "<|reserved_special_token_0|>"
TEMPLATES = {  # name: (chat template, its first token, further special tokens)
    "ChatML": (CHATML, "<s>", []),
    "Llama-3": (LLAMA3, BOS, [BOS, RESERVED]),
    "Mistral": (MISTRAL, "<s>", []),
    "no template": (None, "<s>", []),
}
PAIR = Pair(  # hh-rlhf, harmless-base, test split, row 649
    [{"role": "user", "content": "Hello, How are you?"}],
    "Hello, I’m doing quite well.",
    "Hello, I am doing well. What is your name?",
    "harmless-base/test.jsonl.gz:649",
)
OTHER = Pair([{"role": "user", "content": "?"}], "(another pair's answer)", "No.", "")
WHO = {"none": "dpo, …", "cross": {"sep": "ins_dpo, …", "turn": "ifsr_dpo, …"}}
HEAD = f"""# What is scored, and behind what

One real pair (hh-rlhf, harmless-base, test, row 649) on every path set, in four chat templates.
Each entry is one log-probability: what its first scored token sees in its row, piece by piece,
and behind `*` the text whose tokens are scored. `↵` is a newline, `·` a space at an end. InSPO Eq.
14-15 are *cross, sep*; IFSR Eq. 4 is *cross, turn*. A reference is scored on the *none* paths where
it is `plain` (`ins_`), else on the policy's own. `kto` also scores, without gradient, the
chosen answer of a pair with another prompt behind each of its contexts.

This page is read off packed rows by `tests/test_golden.py`, which fails when it is no longer true.
After a new condition or bridge write it again, and read what was added:

    {COMMAND}
"""


def load(name, directory):
    source, bos, special = TEMPLATES[name]
    return Template(write_checkpoint(directory, source, [*SPECIAL, *special], bos_token=bos))


def entries(template, condition, bridge, loss="dpo"):
    """[(path, [pieces that the first scored token sees], scored text)] of the pair."""
    rule = recipe(loss, condition, bridge)
    dataset = Dataset([PAIR, OTHER], template, rule, Limits(10_000, 1.0), "better")
    paths = [*rule.paths, *rule.kl_paths]
    row = build_row([dataset.trie(0, paths)], [0], len(paths))
    sees = visible(row.until, row.positions)  # (T, T)
    found = []
    for n, path in enumerate(paths):
        scored = row.path == n
        seen = row.tokens[sees[row.source[scored][0]]].tolist()
        pieces = cut(seen, dataset.path(0, path)[0][:-1])
        texts = [template.decode(piece, skip_special=False) for piece in pieces]
        found.append((path, texts, template.decode(row.label[scored], skip_special=False)))
    return found


def cut(ids, segments):
    """Cut what a token sees where the segments end, so that the page has a line for each."""
    assert len(ids) == sum(map(len, segments))
    ends = [sum(map(len, segments[: n + 1])) for n in range(len(segments))]
    return [ids[end - len(s) : end] for end, s in zip(ends, segments, strict=True)]


def shown(text):
    """The text on one line, with its white space made visible."""
    inner = text.strip(" ")
    start, end = text.index(inner), len(text) - text.index(inner) - len(inner)
    return ("·" * start + inner + "·" * end).replace("\n", "↵")


def section(name, template):
    """The page's part on one template."""
    lines = [f"## {name}"]
    for condition in CONDITIONS:
        contexts = {context for view in CONDITIONS[condition] for context in view}
        free = not contexts & {"chosen", "rejected"}  # no answer in the context: the bridges agree
        for bridge in ("turn",) if free else BRIDGES:
            who = WHO.get(condition, "")
            who = who if isinstance(who, str) else who.get(bridge, "")
            title = condition if free else f"{condition}, {bridge}"
            lines += [f"\n**{title}**" + f" ({who})" * bool(who), "\n```"]
            for path, pieces, scored in entries(template, condition, bridge):
                given = {None: "x", "instruct": "x, i"}.get(path.context, f"x, {path.context}")
                lines.append(f"log π({path.target} | {given})")
                lines += [f"    {shown(piece)}" for piece in pieces]
                lines.append(f"  * {shown(scored)}")
            lines.append("```")
    return "\n".join(lines) + "\n"


def page(directory):
    """The whole of tests/golden_paths.md."""
    sections = [section(name, load(name, Path(directory) / name)) for name in TEMPLATES]
    return "\n".join([HEAD, *sections])


def test_the_page_shows_what_rows_score(tmp_path):
    same = page(tmp_path) == PAGE.read_text(encoding="utf-8")
    assert same, f"is the change meant? then write the page again, and look at it: {COMMAND}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_path_sees_what_it_is_to_say(name, tmp_path):
    """Of the two answers a path sees at most its context, and scores exactly its target."""
    template = load(name, tmp_path)
    texts = {"chosen": PAIR.chosen, "rejected": PAIR.rejected, "mismatched": OTHER.chosen}
    for condition in CONDITIONS:
        for bridge in BRIDGES:
            for path, pieces, scored in entries(template, condition, bridge, "kto"):
                context = "".join(pieces)
                seen = {answer for answer, text in texts.items() if text in context}
                assert seen == {path.context} & texts.keys()
                assert scored.strip() == texts[path.target] + template.end
                assert ("please generate a better response" in context) == (
                    path.context == "instruct" or (bool(seen) and "{turn}" in BRIDGES[bridge].after)
                )


def main():
    with tempfile.TemporaryDirectory() as directory:
        PAGE.write_text(page(directory), encoding="utf-8")


if __name__ == "__main__":
    main()
