"""docs/tour.md: its blocks are run in order, and print what the page shows."""

import contextlib
import io
import re
from pathlib import Path

import data
import losses

PAGE = Path(__file__).parent.parent / "docs" / "tour.md"


def blocks(text):
    """Yields (code, what the page shows behind it, or "") of each python block."""
    for found in re.finditer(r"```python\n(.*?)```\n(?:\n```\n(.*?)```)?", text, re.S):
        yield found.group(1), found.group(2) or ""


def run(text):
    """Runs the blocks in one namespace -> [(code, shown, printed)]."""
    session, outcome = {}, []
    for code, shown in blocks(text):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, str(PAGE), "exec"), session)
        outcome.append((code, shown, out.getvalue()))
    return outcome


def test_the_tour_prints_what_it_shows(monkeypatch):
    monkeypatch.chdir(PAGE.parent.parent)
    outcome = run(PAGE.read_text(encoding="utf-8"))
    assert len(outcome) > 10
    for code, shown, printed in outcome:
        assert printed == shown, code


def test_the_exercises_promise_what_comes(monkeypatch):
    """The numbers that exercises 1 to 3 tell the reader to expect."""
    monkeypatch.chdir(PAGE.parent.parent)
    text = PAGE.read_text(encoding="utf-8")
    promised = text[text.index("## Exercises") :]
    monkeypatch.setitem(losses.CONDITIONS, "averaged_one_sided", ((None, None), ("rejected",) * 2))
    quoted = data.Bridge("Another answer:\n", "\nA better one:\n", ended=False)
    monkeypatch.setitem(data.BRIDGES, "quoted", quoted)
    for recipe, tokens in (
        ('"dpo", condition="averaged_one_sided"', "36 tokens instead of 86"),
        ('"dpo", condition="averaged_one_sided", bridge="turn"', "45 instead of 112"),
        ('"ins_dpo", bridge="quoted"', "9 tokens\n   of `Another answer:`"),
    ):
        printed = "".join(p for *_, p in run(text.split("## 5")[0].replace('"ins_dpo"', recipe)))
        numbers = re.search(r"(\d+) tokens instead of (\d+)", printed).groups()
        assert tokens in promised
        if "instead" in tokens:
            assert tuple(re.findall(r"\d+", tokens)) == numbers
        else:
            assert "9 Another answer:" in printed and "7 \nA better one:" in printed
    margin = re.search(r"margin (-[\d.]+), loss", text).group(1)
    assert f"prints 1 − margin = {1 - float(margin):.4f}" in promised
