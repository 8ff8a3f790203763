"""Tests of bench/frontier.py: its worlds, one curve end to end, and what its tables read."""

import numpy as np
import pytest

from assets import world
from bench import frontier, frontier_report
from bench.small_world import run_all


def test_labels_are_turned_around_as_often_as_asked():
    job = frontier.Job("dpo", "plain", 1e-4, 0.1, seed=0, pairs=2000)
    right = list(frontier.pairs_of(job))
    wrong = list(frontier.pairs_of(job._replace(flipped=0.2)))
    turned = [a["chosen"] == b["rejected"] for a, b in zip(right, wrong, strict=True)]
    assert 0.17 < np.mean(turned) < 0.23
    assert all(t or a == b for t, a, b in zip(turned, right, wrong, strict=True))


def test_one_curve_in_a_process_of_its_own(tmp_path):
    job = frontier.Job("dpo", "ins turn", 6e-4, 0.1, 0, world.TWO_JUDGES, pairs=96, steps=8)
    file = tmp_path / "results.jsonl"
    known = run_all([job], file, {}, 1, frontier.run)
    assert frontier.read_results(file, frontier.Job) == known
    point = known[job]
    assert [len(point[name]) for name in frontier_report.MEASURES] == [len(frontier.SHARES)] * 5
    assert 0 <= point["kl"][0] < point["kl"][-1]  # the policy moves on along its curve


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Made-up curves: ins wins 2 points more than plain within every KL, give or take a seed."""
    known = {}
    for seed in range(5):
        for form, more in (("plain", 0.0), ("ins", 0.02 + 0.001 * seed)):
            rates = [0.55 + more, 0.65 + more, 0.6 + more, 0.4]
            curve = {"plain": rates, "shown": rates, "refined": rates}
            curve |= dict.fromkeys(("kl", "shown_kl"), [0.2, 0.9, 2.0, 3.0])
            known[frontier.Job("dpo", form, 1e-4, 0.1, seed)] = curve
    page = tmp_path / "results.md"
    page.write_text("before\n" + "\n".join(frontier_report.MARKS) + "\nafter", encoding="utf-8")
    monkeypatch.setattr(frontier_report, "PARTS", {page: frontier_report.results_part})
    monkeypatch.setattr(frontier_report, "JSON", tmp_path / "frontier.json")
    best = {("dpo", form): (1e-4, 0.1, 2) for form in ("plain", "ins")}
    frontier_report.save(known, best)
    return page


def test_forms_are_compared_within_a_kl_and_at_their_own_best(kept):
    tables, more = frontier_report.write(), "**+2.2 [+2.0, +2.4]**"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.splitlines()]
    assert ["dpo", "separable", "plain", "0.25", "56.1", more] in rows  # between two points
    assert ["dpo", "separable", "plain", "0.5", "60.2", more] in rows
    assert ["dpo", "separable", "plain", "1.5", "65.0", more] in rows  # the best of all
    assert ["dpo", "separable", "shown", "own best", "60.0", more] in rows
    assert kept.read_text(encoding="utf-8").startswith("before\n<!--")
    assert kept.with_name("frontier.png").stat().st_size > 10000


def test_a_curve_is_read_between_its_points_and_never_beyond_a_budget():
    """From 1/2 at KL 0: over sqrt(KL) a line to each next point; what falls off is not taken."""
    kl, wins = [0.04, 1.0, 2.25], [0.54, 0.7, 0.6]
    for budget, rate in ((0.01, 0.52), (0.04, 0.54), (0.36, 0.62), (1, 0.7), (2, 0.7), (9, 0.7)):
        assert frontier_report.within(kl, wins, budget) == pytest.approx(rate)
    assert frontier_report.within([2.0, 1.0], [0.4, 0.6], 1.5) == pytest.approx(0.6)  # it came back


def test_the_pages_show_what_is_kept():
    found = frontier_report.Found()
    for file, part in frontier_report.PARTS.items():
        assert part(found) in file.read_text(encoding="utf-8"), file


@pytest.mark.parametrize("file", frontier_report.PARTS, ids=lambda file: file.name)
def test_the_pages_hold_the_tables_of_the_kept_values(file):
    part = frontier_report.PARTS[file](frontier_report.Found())
    assert part in file.read_text(encoding="utf-8")
