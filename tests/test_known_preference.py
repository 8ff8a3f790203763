"""Tests of bench/known_preference.py: the preferences' closed forms, and one run end to end."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from bench import known_preference, known_preference_report, small_world
from bench.prompts import prompts

pytest.importorskip("vaderSentiment", reason="vaderSentiment is in requirements-dev.txt")


@pytest.fixture(autouse=True)
def no_group_is_left():
    """A run here is this process's only rank, which other tests must not find."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        small_world.ranks.cache_clear()


START = Path(__file__).parent.parent / "assets" / "start"
GLAD, SAD = "What a wonderful, happy day!", "This is a terrible, sad failure."


def test_the_prompts_are_600_and_200_without_an_overlap():
    train, test = prompts()["train"], prompts()["test"]
    assert len(set(train)) == 600 and len(set(test)) == 200 and not set(train) & set(test)


@pytest.mark.parametrize("kind", known_preference.KINDS)
def test_a_preference_and_its_reverse_sum_to_one(kind):
    texts = [GLAD, SAD, "I see.", "Why? " * 20, "word " * 40]
    for first in texts:
        for second in texts:
            p, q = (
                known_preference.prefers(kind, first, second),
                known_preference.prefers(kind, second, first),
            )
            assert p + q == pytest.approx(1) and (first != second or p == 0.5)


def test_the_separable_preference_is_bradley_terry_on_sentiment():
    edge = 4 * (known_preference.sentiment(GLAD) - known_preference.sentiment(SAD))
    assert known_preference.prefers("separable", GLAD, SAD) == pytest.approx(
        1 / (1 + math.exp(-edge))
    )
    assert edge > 4


def test_the_intransitive_preference_goes_round_in_a_ring():
    """Three texts that differ in length alone: each beats one and is beaten by the other."""
    short, middle, long = ("word " * n for n in (5, 20, 30))
    assert [known_preference.classes(text)[0] for text in (short, middle, long)] == [0, 1, 2]
    wins = [known_preference.prefers("intransitive", *both)
            for both in ((short, middle), (middle, long), (long, short))]  # fmt: skip
    assert np.allclose(wins, 1 / (1 + math.exp(-1.5)))


def test_one_run_from_samples_to_the_table(tmp_path, monkeypatch):
    """Tuned and measured on the embedded model; results are read again as they were."""
    few = {"train": prompts()["train"][:12], "test": prompts()["test"][:3]}
    monkeypatch.setattr(known_preference, "prompts", lambda: few)
    monkeypatch.setattr(known_preference, "HELD", 4)
    monkeypatch.setattr(known_preference, "DRAW", known_preference.DRAW._replace(max_new_tokens=12))
    s = known_preference.KnownPreferenceFlags(out=str(tmp_path), model=str(START))
    jobs = [known_preference.Job("separable", form, 0, lr)
            for form, lr in (("plain", 1e-4), ("irft, ifsr", 1e-4), ("plain", 5e-5))]  # fmt: skip
    known = {job: known_preference.run(s, job) for job in jobs}
    assert all(0 < rate < 1 for rate in known[jobs[0]]["wins"]["shown"])
    rows = known_preference.labelled(s, "separable", 0)
    assert len(rows) <= 12 and all(row["chosen"] != row["rejected"] for row in rows)
    report, page = known_preference_report, tmp_path / "results.md"
    page.write_text(report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")  # has the marks
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "JSON", tmp_path / "known_preference.json")
    table = report.write(known)
    assert f"{report.MARKS[0]}\n{table}\n{report.MARKS[1]}" in page.read_text(encoding="utf-8")
    assert (tmp_path / "known_preference.png").exists()
    assert table.splitlines()[0].split("|")[4:6] == [" plain ", " irft, ifsr "]
    assert read_results_again(tmp_path, known) == known


def read_results_again(tmp_path, known):
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in known.values()), encoding="utf-8")
    return small_world.read_results(file, known_preference.Job)


def test_the_pair_is_the_one_that_raters_are_surest_of(tmp_path, monkeypatch):
    """Of four answers, the gladdest and the saddest; an empty answer is never one of them."""
    monkeypatch.setattr(known_preference, "asked", lambda seed: ["x"])
    answers = ["", GLAD, "A chair.", SAD]
    monkeypatch.setattr(known_preference, "start_samples", lambda s, seed, n: [answers[n]])
    (row,) = known_preference.labelled(None, "separable", 0)
    assert {row["chosen"], row["rejected"]} == {GLAD, SAD}


def cell(form, kl, wins, seed=0, held=0.7):
    return {"kind": "separable", "form": form, "lr": kl, "seeds": [seed], "kl": [kl],
            "wins": {"plain": [wins]}, "held": [held]}  # fmt: skip


def test_win_rates_at_a_kl_are_read_over_its_root():
    """Between the start, at one half, and the runs; nothing is read behind the last of them."""
    cells = [cell("plain", 4.0, [0.7, 0.9]), cell("plain", 1.0, [0.6, 0.6])]
    at_kl = known_preference_report.at_kl
    assert np.allclose(at_kl(cells, 0.25)[0], [0.55, 0.55])
    assert np.allclose(at_kl(cells, 2.25)[0], [0.65, 0.75])
    assert at_kl(cells, 5.0) == {}


def test_differences_are_paired_and_bold_without_zero():
    report = known_preference_report
    plain = {seed: np.array([0.2, 0.8]) for seed in (0, 1)}
    assert report.difference({s: x + 0.1 for s, x in plain.items()}, plain).startswith("**+10.0")
    assert report.difference({s: x[::-1] for s, x in plain.items()}, plain)[0] != "*"
    assert report.difference({0: plain[0]}, plain) == "-"  # a seed is missing
    best = report.own_rate([cell("ins", 1.0, [0.5], held=0.7), cell("ins", 2.0, [0.5], held=0.6)])
    assert best["lr"] == 2.0


def test_the_page_holds_the_table_of_the_kept_values():
    report = known_preference_report
    cells = json.loads(report.JSON.read_text(encoding="utf-8"))["cells"]
    assert report.results_table(cells) in report.PAGE.read_text(encoding="utf-8")
