"""docs/tour.md: its blocks are run in order, and print what the page shows."""

import contextlib
import io
import re
from pathlib import Path

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
