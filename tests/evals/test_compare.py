"""Paired comparisons by hand; the report page as text, and in a real browser."""

import json
import re
import shutil

import numpy as np
import pytest

from evals import compare, report
from evals.answers import Answer
from jobs.cli import UserError, parse

EVIL = '</script><script>document.title = "taken"</script><img src=x onerror=alert(1)> & \u2028 end'


def call(module, command, **flags):
    command(parse(module.Settings, "", [f"--{k}={v}" for k, v in flags.items()]))


def result_file(place, values, model="m", command="arena", **more):
    model_results = {"n": len(values), "score": [0.5, 0.4, 0.6], "values": values}
    place.write_text(json.dumps({"command": command, "models": {model: model_results}} | more))
    return place


# ----------------------------------------------------------------------------- compare


@pytest.fixture
def compared(tmp_path):
    """compared(a, b, **flags) -> the JSON of compare on these lists of {question: value}."""

    def go(a, b, **flags):
        for name, seeds in (("a", a), ("b", b)):
            for k, values in enumerate(seeds):
                result_file(tmp_path / f"{name}{k}.json", values)
        files = {name: str(tmp_path / f"{name}*.json") for name in "ab"}
        call(compare, compare.compare, **files, out=tmp_path / "out.json", **flags)
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
    (tmp_path / "c.json").write_text("[]")
    for flags, message in (({"b": b}, "different commands: .'arena', 'mtbench'."),
                           ({"b": tmp_path / "c.json"}, "no result file; write one with"),
                           ({"b": f"{a},nowhere.json"}, "--b nowhere.json: no such file"),
                           ({"b": a, "model_b": "n"}, "no model n; it has m")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            call(compare, compare.compare, a=a, **flags)


# ----------------------------------------------------------------------------- the page


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page of two answer files with scores, one of them with hostile text -> its path."""
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(("plain.jsonl", "refined.jsonl")):
        rows = [
            {"prompt": f"why {i} <b>?</b>", "answer": f"{name[:5]} because {'so ' * i}",
             "subset": "even" if i % 2 == 0 else "odd"} for i in range(30)
        ]  # fmt: skip
        rows[3]["answer"] = EVIL
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        ids = report.question_ids(report.read_answers(name, ""))
        values = {q: i if k else 10.0 for i, q in enumerate(ids)}
        result_file(tmp_path / f"{k}.json", values, model=name, title=EVIL)
    steps = [{"step": i, "loss": 1 / i, "eval_loss": 2 / i, "margin": i} for i in range(1, 9)]
    torn = '{"step": 9, "lo'
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in steps) + torn)
    flags = {"results": "0.json,1.json", "answers": "plain.jsonl,refined.jsonl"}
    call(compare, compare.compare, a="0.json", b="1.json", out="compared.json")
    flags["results"] += ",compared.json"
    flags |= {"run": ".", "out": "deep/page.html"}
    call(report, report.report, **flags)
    return tmp_path / "deep" / "page.html"


def test_the_page_is_self_contained_and_escaped(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(", text.replace("src=x", ""))
    assert "<img" not in text and text.count("<script") == text.count("</script>") == 2
    data = re.search(r'id="data">(.*?)</script>', text, re.S).group(1)
    rows = json.loads(data)["rows"]
    assert rows[3]["answers"] == [EVIL, EVIL] and rows[3]["scores"] == [10.0, 3]
    assert (
        "a higher" in text and "0.5 [0.4, 0.6]" in text and text.count("<polyline") == 3
    )  # loss twice, margin once


def test_histograms_count_every_answer(page):
    sides = {name: report.read_answers(name, "") for name in ("plain.jsonl", "refined.jsonl")}
    for drawing in report.histograms(sides):
        assert sum(bar[4] for bar in drawing["bars"]) == drawing["n"] == 30


def test_an_answer_that_is_missing_is_shown_as_missing():
    sides = {"a": [_answer("x", "1"), _answer("y", "2")], "b": [_answer("y", "3")]}
    rows = report.side_by_side(sides, {})
    assert [row["answers"] for row in rows] == [["1", None], ["2", "3"]]


def _answer(prompt, text):
    return Answer([{"role": "user", "content": prompt}], text)


def test_report_errors(tmp_path):
    cases = [({}, "nothing to show"), ({"run": tmp_path}, "no metrics.jsonl")]
    cases.append(({"answers": "no.jsonl"}, "--answers no.jsonl: no such file"))
    for flags, message in cases:
        with pytest.raises(UserError, match=message):
            call(report, report.report, **flags)


@pytest.mark.slow
def test_the_page_in_a_browser(page):
    """Search, filters, order and paging do what they say; hostile text stays text."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    words = "headless no-sandbox disable-gpu disable-quic no-first-run disable-component-update"
    words += " disable-background-networking disable-sync window-size=1300,1000"
    for word in (*words.split(), f"user-data-dir={page.parent / 'profile'}"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options, service)

    def put(name, value):
        browser.execute_script(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input'));", name, value)  # fmt: skip
        cards = browser.find_elements("css selector", "article")
        return browser.find_element("id", "count").text, cards

    try:
        browser.get(page.as_uri())
        assert browser.title == "Evaluation"
        count, cards = put("search", "")
        assert count == "30 of 30 prompts" and len(cards) == 25
        browser.find_element("id", "more").click()
        assert len(browser.find_elements("css selector", "article")) == 30
        count, cards = put("search", "WHY 17 <b>")
        assert count == "1 of 30 prompts" and cards[0].find_element("css selector", "mark").text
        assert put("search", "document.title")[0] == "1 of 30 prompts"
        put("search", "")
        assert put("subset", "odd")[0] == "15 of 30 prompts"
        assert put("winner", "1")[0] == "10 of 30 prompts"  # odd and above 10
        put("subset", "")
        assert put("winner", "-1")[0] == "1 of 30 prompts"  # 10 is a tie
        put("winner", "")
        _, cards = put("order", "gap")
        assert "why 29 <b>?</b>" in cards[0].text
        assert not browser.get_log("browser")
    finally:
        browser.quit()
