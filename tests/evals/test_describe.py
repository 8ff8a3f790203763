"""`python evaluate.py describe`: what it counts is what a run trains on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PAIRS
from data import Dataset, Limits
from evals import describe
from evals.describe import DescribeFlags
from hub.template import Template
from jobs.cli import UserError, parse
from losses import CONDITIONS, recipe
from pairs.read import Drops, read_pairs

ROOT = Path(__file__).parents[2]
BROKEN = [{"prompt": "p", "chosen": "same", "rejected": "same"}] * 3 + [
    {"prompt": "p", "chosen": " ", "rejected": "no"}
]


@pytest.fixture
def file(tmp_path):
    """24 good pairs, behind four that are left out."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in BROKEN + PAIRS))
    return file


@pytest.fixture
def tell(tiny_model_dir, file, tmp_path, capsys):
    """tell("--flag", value, …) -> (figures, what was printed, the picture's file)."""

    def tell(*words):
        out = tmp_path / "out" / "told.json"
        words = ["--data", file, "--model", tiny_model_dir, "--out", out, *words]
        describe.describe(parse(DescribeFlags, "", list(map(str, words))))
        told = json.loads(out.read_text(encoding="utf-8"))
        return told, capsys.readouterr().out, out.with_suffix(".png")

    return tell


def test_every_record_is_kept_or_dropped_by_a_named_rule(tell, file):
    told, text, _ = tell()
    assert told["records_read"] == 28 and told["pairs_kept"] == 24
    assert told["dropped"] == {
        "identical answers": {"pairs": 3, "rows": [f"{file}:1", f"{file}:2"]},
        "empty answer": {"pairs": 1, "rows": [f"{file}:4"]},
    }
    assert "read 28 records: kept 24, dropped 4" in text
    assert f"3 identical answers  ({file}:1, {file}:2)" in text
    assert "bridged" not in text and "bridged_chosen" not in told["tokens"], "there are none"


def test_lengths_are_those_of_the_tokenised_pairs_uncut(tell, tiny_model_dir, file):
    """One token per byte, so by hand: the longest answer's letters and its end token."""
    told, text, _ = tell()
    longest = max(len(row["chosen"]) for row in PAIRS) + 1
    assert told["tokens"]["chosen"]["100%"] == longest
    mean = sum(len(row["rejected"]) + 1 for row in PAIRS) / len(PAIRS)
    assert told["tokens"]["rejected"]["mean"] == pytest.approx(mean, abs=0.05)
    cut, _, _ = tell("--max_len", 120)
    assert cut["tokens"] == told["tokens"] and cut["cut"] != told["cut"] == {}
    assert "cut by the limits: none" in text


def test_shares_cut_are_those_of_a_run(tell, tiny_model_dir, file):
    told, text, _ = tell("--max_len", 120, "--loss", "ins_dpo")
    pairs = read_pairs(str(file), Drops())
    template = Template(tiny_model_dir)
    data = Dataset(pairs, template, recipe("ins_dpo"), Limits(120, 0.4), "better")
    assert told["cut"] == {what: n / len(data) for what, n in data.cuts.items()} != {}
    for what, share in told["cut"].items():
        assert f"{share:.1%} {what}" in text


def test_cleaning_counts_beside_reading(tell):
    told, _, _ = tell("--dedup", "--max_answer", 35)
    rules = {rule: entry["pairs"] for rule, entry in told["dropped"].items()}
    assert {"identical answers", "empty answer", "answer over 35 tokens"} <= rules.keys()
    assert told["records_read"] == told["pairs_kept"] + sum(rules.values())


def test_the_rows_of_an_epoch(tell, tiny_model_dir, file):
    told, _, _ = tell("--row_tokens", 1000, "--batch", 6, "--loss", "dpo")
    rule, template = recipe("dpo"), Template(tiny_model_dir)
    data = Dataset(read_pairs(str(file), Drops()), template, rule, Limits(4096, 0.4), "better")
    tokens = sum(len(data.trie(i, rule.paths)) for i in range(len(data)))
    fill = told["row_fill"]
    assert fill["fill"] == pytest.approx(tokens / (fill["rows"] * 1000))
    assert fill["rows"] >= len(data) // 6 and 0 < fill["fill"] <= 1


@pytest.mark.parametrize("bridge", ["sep", "turn"])
def test_what_the_trie_saves(bridge, tell, tiny_model_dir, file):
    """Against the naive count: every path as a sequence of its own."""
    told, _, _ = tell("--bridge", bridge)
    sets, template = told["path_sets"], Template(tiny_model_dir)
    assert sets["bridge"] == bridge and set(sets["conditions"]) == set(CONDITIONS)
    for condition, found in sets["conditions"].items():
        rule = recipe("dpo", condition, bridge)
        data = Dataset(read_pairs(str(file), Drops()), template, rule, Limits(4096, 0.4), "better")
        apart = sum(len(s) for i in range(24) for p in rule.paths for s in data.path(i, p)[0])
        trie = sum(len(data.trie(i, rule.paths)) for i in range(24))
        saved = pytest.approx(1 - trie / apart)
        assert found == {"separate": apart, "trie": trie, "saved": saved}
    assert sets["conditions"]["averaged"]["saved"] > sets["conditions"]["none"]["saved"] > 0


def test_path_sets_are_counted_over_a_sample_and_say_so(tell, monkeypatch):
    monkeypatch.setattr(describe, "SAMPLE", 10)
    told, text, _ = tell()
    assert told["path_sets"]["of_the_first_pairs"] == 10 and told["pairs_kept"] == 24
    assert "tokens of the path sets of the first 10 pairs, bridge sep" in text


@pytest.mark.parametrize("loss", ["dpo", "ins_dpo", "ifsr_dpo", "kto", "sft", "irft"])
def test_every_path_is_shown_decoded(loss, tell):
    """[[ ]] stands around what is scored: the target, behind its context and nothing else."""
    told, text, _ = tell("--loss", loss)
    rule = recipe(loss)
    assert set(told["examples"]) == {str(p) for p in (*rule.paths, *rule.kl_paths,
                                                      *rule.reference_paths)}  # fmt: skip
    first = PAIRS[0]
    for path in rule.paths:
        shown = told["examples"][str(path)]
        context, _, rest = shown.partition("[[")
        assert rest == f"{first[path.target]}<|im_end|>]]"
        assert first["prompt"] in context and f"--- {path} ([[scored]])\n{shown}" in text
        if path.context in ("chosen", "rejected"):
            assert first[path.context] in context


def test_the_picture_is_drawn(tell):
    pillow = pytest.importorskip("PIL.Image")
    _, text, picture = tell()
    with pillow.open(picture) as image:
        assert image.size[0] == 1560 and 400 < image.size[1] < 600
        assert len(image.convert("RGB").getcolors(10**6)) > 50  # lines of three colours, and text
    assert text.splitlines()[-1].endswith(str(picture))


def test_without_out_it_is_a_page_for_people(tiny_model_dir, file, capsys):
    """Tables and texts whose lines are short, and nothing of the JSON."""
    words = ["--data", str(file), "--model", str(tiny_model_dir)]
    describe.describe(parse(DescribeFlags, "", words))
    page = capsys.readouterr().out
    for heading in ("read 28 records", "tokens  ", "path set  ", "paths of the first pair"):
        assert f"\n{heading}" in page
    assert "{" not in page and '"' not in page and "--out FILE.json keeps" in page


@pytest.mark.parametrize(
    "words, told",
    [
        (["--model", "."], "--data is missing"),
        (["--data", "x.jsonl"], "--model is missing"),
    ],
)
def test_what_is_missing_is_told(words, told):
    with pytest.raises(UserError, match=told):
        describe.describe(parse(DescribeFlags, "", words))


def test_as_a_command_it_fails_in_one_line(tiny_model_dir, tmp_path):
    words = [sys.executable, "evaluate.py", "describe", "--model", str(tiny_model_dir)]
    words += ["--data", str(tmp_path / "none.jsonl")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "none.jsonl: no such file" in done.stderr
