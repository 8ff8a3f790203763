"""The report page as text, and in a real browser."""

import base64
import json
import re
import shutil
import struct

import pytest

from evals import report
from evals.answers import Answer
from evals.compare import CompareFlags, compare
from evals.results import draw_lengths
from jobs.cli import UserError, parse

EVIL = '</script><script>document.title = "taken"</script><img src=x onerror=alert(1)> & \u2028 end'


def call(**flags):
    report.report(parse(report.ReportFlags, "", [f"--{k}={v}" for k, v in flags.items()]))


def result_file(place, values, model="m", command="arena", **more):
    model_results = {"n": len(values), "score": [0.5, 0.4, 0.6], "values": values}
    place.write_text(json.dumps({"command": command, "models": {model: model_results}} | more))
    return place


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
        if k:
            rows[2]["draft"] = "first drafted"
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        ids = report.question_ids(report.read_answers(name, ""))
        values = {q: i if k else 10.0 for i, q in enumerate(ids)}
        result_file(tmp_path / f"{k}.json", values, model=name, title=EVIL)
    steps = [{"step": i, "loss": 1 / i, "eval_loss": 2 / i, "margin": i} for i in range(1, 9)]
    torn = '{"step": 9, "lo'
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in steps) + torn)
    flags = {"results": "0.json,1.json", "answers": "plain.jsonl,refined.jsonl"}
    compare(CompareFlags(a="0.json", b="1.json", out="compared.json"))
    flags["results"] += ",compared.json"
    flags |= {"run": ".", "out": "deep/page.html"}
    call(**flags)
    return tmp_path / "deep" / "page.html"


def test_the_page_is_self_contained_and_escaped(page):
    own = r'<img src="data:image/png;base64,[\w+/=]+" alt="[^"<>]+">'  # curves and lengths
    text, pictures = re.subn(own, "", page.read_text(encoding="utf-8"))
    assert pictures == 2
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(", text.replace("src=x", ""))
    assert "<img" not in text and text.count("<script") == text.count("</script>") == 2
    data = re.search(r'id="data">(.*?)</script>', text, re.S).group(1)
    rows = json.loads(data)["rows"]
    assert rows[3]["answers"] == [EVIL, EVIL] and rows[3]["scores"] == [10.0, 3]
    assert "a higher" in text and "50.0% [40.0%, 60.0%]" in text  # as evaluate.py arena prints it
    drafts = [row["drafts"] for row in rows]
    assert drafts[2] == [None, "first drafted"] and drafts[3] == [None, None]


def test_the_charts_are_of_one_size(page):
    """Curves and lengths: the same width, a height that differs by lines of the legend alone."""
    urls = re.findall(r"data:image/png;base64,([\w+/=]+)", page.read_text(encoding="utf-8"))
    sizes = [struct.unpack(">II", base64.b64decode(url)[16:24]) for url in urls]  # of PNG's IHDR
    assert sizes[0][0] == sizes[1][0] and abs(sizes[0][1] - sizes[1][1]) < 60


def test_numbers_bear_the_console_words(tmp_path):
    """Those of `evaluate.py reward`, on answers and on pairs, by subset too; of mtbench."""
    subset = {"n": 2, "win_rate": [0.5, 0.0, 1.0], "ties": 0, "reward": 1.25}
    whole = {"command": "reward", "win_rate": [0.25, 0.0, 1.0], "difference": [0.5, 0.25, 1.0]}
    content = whole | {
        "models": {"a": {"n": 4, "reward": [1.0, 0.5, 2.0]}},
        "subsets": {"x": subset},
    }
    cells = {}
    for _, columns, (row, *_) in report.tables_of("f", content):
        cells |= dict(zip(columns, row, strict=True))
    assert cells["win rate"] == "50.0% [0.0%, 100.0%]" and cells["reward"] == "1.2500"
    assert cells["difference"] == "+0.5000 [+0.2500, +1.0000]"
    content["sections"] = {"Chat": [0.75, 0.5, 1.0]}
    (_, columns, (row,)), *_ = report.tables_of("f", content)
    cells = dict(zip(columns, row, strict=True))
    assert cells["accuracy"] == "25.0% [0.0%, 100.0%]" and "win rate" not in cells
    assert cells["Chat"] == "75.0% [50.0%, 100.0%]"
    model = {
        "score": [7.5, 7.0, 8.0],
        "turns": {"1": [8.0, 7.0, 9.0]},
        "categories": {"math": [6.0, 5.0, 7.0]},
    }
    _, (_, columns, (row,)) = report.tables_of("f", {"command": "mtbench", "models": {"m": model}})
    assert columns == ["model", "score", "turn 1", "math"] and row[2] == "8.00 [7.00, 9.00]"


def test_histograms_count_every_answer(page):
    sides = {name: report.read_answers(name, "") for name in ("plain.jsonl", "refined.jsonl")}
    lengths = {name: [len(answer.text) for answer in rows] for name, rows in sides.items()}
    lengths |= {"empty": [0] * 30, "$_{": [1] * 30}
    counts = draw_lengths(lengths, page.with_suffix(".png"), "characters", "answers")
    assert [sum(n) for n in counts.values()] == [30] * 4


def test_an_answer_that_is_missing_is_shown_as_missing():
    sides = {"a": [_answer("x", "1"), _answer("y", "2")], "b": [_answer("y", "3")]}
    rows = report.side_by_side(sides, {})
    assert [row["answers"] for row in rows] == [["1", None], ["2", "3"]]


def _answer(prompt, text):
    return Answer([{"role": "user", "content": prompt}], text)


def test_report_errors(tmp_path):
    cases = [
        ({}, "nothing to show"),
        ({"run": tmp_path}, "metrics.jsonl: no such file; expected a run directory"),
    ]
    cases.append(({"answers": "no.jsonl"}, "--answers no.jsonl: no such file"))
    for flags, message in cases:
        with pytest.raises(UserError, match=message):
            call(**flags)


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
        count, (card,) = put("search", "first drafted")
        draft = card.find_element("css selector", "details")
        assert count == "1 of 30 prompts" and "draft, 13 characters" in draft.text
        assert draft.find_element("css selector", "mark").text == "first drafted"
        put("search", "")
        _, cards = put("order", "gap")
        assert "why 29 <b>?</b>" in cards[0].text
        assert not browser.get_log("browser")
    finally:
        browser.quit()
