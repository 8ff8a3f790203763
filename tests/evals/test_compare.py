"""Paired comparisons by hand."""

import json

import numpy as np
import pytest

from evals.compare import CompareFlags, compare
from jobs.cli import UserError, parse


def call(**flags):
    compare(parse(CompareFlags, "", [f"--{k}={v}" for k, v in flags.items()]))


def result_file(place, values, model="m", command="arena", **more):
    model_results = {"n": len(values), "score": [0.5, 0.4, 0.6], "values": values}
    place.write_text(json.dumps({"command": command, "models": {model: model_results}} | more))
    return place


@pytest.fixture
def compared(tmp_path):
    """compared(a, b, **flags) -> the JSON of compare on these lists of {question: value}."""

    def go(a, b, **flags):
        for name, seeds in (("a", a), ("b", b)):
            for k, values in enumerate(seeds):
                result_file(tmp_path / f"{name}{k}.json", values)
        files = {name: str(tmp_path / f"{name}*.json") for name in "ab"}
        call(**files, out=tmp_path / "out.json", **flags)
        return json.loads((tmp_path / "out.json").read_text())

    return go


def test_pairs_are_joined_by_question(compared):
    """Differences 1, 1, 1 whatever the order: an interval without width, though values spread."""
    found = compared([{"x": 2, "y": 9, "z": 5}], [{"z": 4, "x": 1, "y": 8}])
    assert found["difference"] == [1, 1, 1] and found["n"] == 3
    assert (found["a_higher"], found["equal"], found["b_higher"]) == (3, 0, 0)
    assert found["a"]["mean"][1] < found["a"]["mean"][0] < found["a"]["mean"][2]


def test_the_paired_interval_is_the_textbook_one(compared):
    rng = np.random.default_rng(0)
    hard, noise = rng.normal(0, 5, 500), rng.normal(0.2, 1, 500)
    a, b = ({str(i): v for i, v in enumerate(x)} for x in (hard + noise, hard))
    mean, low, high = compared([a], [b])["difference"]
    half = 1.96 * noise.std() / 500**0.5
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.05 * half)


def test_seeds_are_averaged_by_question(compared):
    found = compared([{"x": 1, "y": 3}, {"x": 3, "y": 5}], [{"x": 2, "y": 4}])
    assert found["difference"] == [0, 0, 0] and found["equal"] == 2
    assert found["a"]["seeds"] == [2, 4]


def test_nulls_are_counted_and_refused(compared, capsys):
    a = {"x": 1, "y": None, "z": 2, "u": 1}
    b = {"x": 0, "y": 2, "u": float("nan")}
    found = compared([a], [b], max_missing=0.75)
    assert found["n"] == 1
    assert found["nulls"] == {"null in --a": 1, "missing in --b": 1, "null in --b": 1}
    with pytest.raises(UserError, match="questions: 75.0% missing or faulty"):
        compared([a], [b])
    with pytest.raises(UserError, match="share no question"):
        compared([{"x": 1}], [{"y": 1}], max_missing=1)


def test_what_cannot_be_compared(tmp_path):
    a = result_file(tmp_path / "a.json", {"x": 1})
    b = result_file(tmp_path / "b.json", {"x": 1}, command="mtbench")
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / "d.json").write_text("[]")
    for flags, message in (({"b": b}, "different commands: .'arena', 'mtbench'."),
                           ({"b": tmp_path / "c.json"}, "no result file; write one with"),
                           ({"b": tmp_path / "d.json"}, "d.json: not a JSON object"),
                           ({"b": f"{a},nowhere.json"}, "--b nowhere.json: no such file"),
                           ({"b": a, "model_b": "n"}, "no model n; it has m")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            call(a=a, **flags)
