"""Whatever a file holds: one line that names file and row, or a counted drop. Never a traceback,
and read = kept + dropped by reason, always."""

import copy
import datetime
import gzip
import json
import re
import subprocess
import sys

import pytest
from dialogues import GOOD, say, write_rows
from published import PUBLISHED

from data import Dataset, Limits
from hub.template import SHIELD, Template
from jobs.cli import UserError, run
from losses import recipe
from pairs.read import Drops, read_pairs


def first(name, **changes):
    """The first row of a published dataset, with changed columns."""
    return PUBLISHED[name][1][0] | changes


H4, HH = "HuggingFaceH4/ultrafeedback_binarized", "Anthropic/hh-rlhf"
RM, UF = "princeton-nlp/llama3-ultrafeedback-armorm", "openbmb/UltraFeedback"
SHP, TREES = "stanfordnlp/SHP", "OpenAssistant/oasst1"
NOTUS = "argilla/ultrafeedback-binarized-preferences"

# what a row is -> (the row, what is told behind "file:2: ")
BROKEN = {
    "half a line": (json.dumps(GOOD)[:-9], "broken JSON .*; mend or delete the row"),
    "two records in a line": (json.dumps(GOOD) * 2, "broken JSON"),
    "a raw NUL byte": ('{"prompt": "a\0"}', "broken JSON"),
    "nesting without end": ("[" * 10**6, "broken JSON"),
    "a number without end": ("1" * 10**5, "broken JSON"),
    "not an object": ("null", "expected an object with named columns"),
    "a list": ("[1]", "expected an object with named columns"),
    "no known columns": ({"question": "a", "answer": "b"}, r"columns \['answer', 'question'\]"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "expected chosen and rejected"),
    "an oasst row without text": ({"message_id": "a", "parent_id": None}, "columns"),
    "a number for a prompt": (GOOD | {"prompt": 7}, "expected text or messages, found int"),
    "an object for an answer": (GOOD | {"chosen": {"text": "a"}}, "found dict"),
    "numbers for messages": (GOOD | {"chosen": [1]}, "a message needs a role and a text content"),
    "a null content": (first(H4, chosen=[{"role": "user", "content": None}]), "text content"),
    "an unhashable role": (GOOD | {"prompt": [{"role": [], "content": "x"}]}, "unknown role"),
    "text against messages": ({"chosen": "a b", "rejected": say("a", "c")}, "needs a `rejected`"),
    "a score in words": (first(H4, score_chosen="high"), "score_chosen is 'high'; expected a fin"),
    "a score that is NaN": (first(H4, score_chosen=float("nan")), "score_chosen is nan; expected"),
    "an infinite score": (
        first(H4, score_rejected=float("inf")),
        "score_rejected is inf; expected",
    ),
    "a true score": (first(H4, score_rejected=True), "score_rejected is True; expected"),
    "a rating that is a list": (first(NOTUS, chosen_avg_rating=[1]), r"chosen_avg_rating is \[1\]"),
    "one score for all": (first(RM, all_rm_scores=0.5), "all_rm_scores is 0.5; expected a list"),
    "a NaN among scores": (first(RM, all_rm_scores=[0.5, float("nan")]), "all_rm_scores is nan"),
    "no instruction": (first(UF, instruction=None), "instruction is None; expected text"),
    "one completion": (first(UF, completions={"response": "a"}), "completions is .*; expected a l"),
    "bare completions": (
        first(UF, completions=["a", "b"]),
        "completions is .*; expected a list of",
    ),
    "an SHP label of 7": (first(SHP, labels=7), "labels is 7; expected 0 or 1"),
    "an SHP label in a list": (first(SHP, labels=[1]), r"labels is \[1\]; expected 0 or 1"),
    "an SHP ratio in words": (first(SHP, score_ratio="big"), "score_ratio is 'big'"),
    "no SHP ratio": (first(SHP, score_ratio=None), "no score_ratio"),
    "an SHP history in parts": (first(SHP, history=["a"]), "a message needs a role"),
    "a list for an id": (first(TREES, message_id=["m"]), r"the message's id is \['m'\]; expected"),
    "a number for a parent": (first(TREES, parent_id=3), "the message's parent is 3; expected"),
    "a message without text": (first(TREES, text=None), "the message's text is None; expected"),
    "a role of another world": (first(TREES, role="system"), "unknown role 'system'"),
    "a rank in words": (first(TREES, rank="best"), "rank is 'best'; expected"),
}

# what a row is -> (the row, the rule that drops it)
DROPPED = {
    "null for the chosen": (GOOD | {"chosen": None}, "empty answer"),
    "null for the rejected": (GOOD | {"rejected": None}, "empty answer"),
    "null for the dialogue": (first(H4, rejected=None), "empty answer"),
    "an empty answer": (GOOD | {"rejected": ""}, "empty answer"),
    "white space for an answer": (GOOD | {"chosen": " \n\t\u2003"}, "empty answer"),
    "no question": (GOOD | {"prompt": " "}, "no prompt"),
    "no question at all": (
        first(H4, chosen=say("", "a"), rejected=say("", "b"), messages=None),
        "no prompt",
    ),
    "identical answers": (GOOD | {"rejected": GOOD["chosen"]}, "identical answers"),
    "differing prompts": (first(H4, chosen=say("Why not?", "a")), "prompts differ"),
    "a lone surrogate": (GOOD | {"chosen": "a\ud800"}, "broken text"),
    "a surrogate in the prompt": (GOOD | {"prompt": "\udfff?"}, "broken text"),
    "an escaped NUL": (GOOD | {"rejected": "a\0b"}, "broken text"),
    "the mark of template.py": (GOOD | {"rejected": f"a{SHIELD}b"}, "broken text"),
    "no completions": (first(UF, completions=[]), "no lower-rated completion"),
}


def told(capsys, read):
    """What a command that reads would print, which must be one line; its exit status must be 2."""
    with pytest.raises(SystemExit) as end:
        run(read)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said.removeprefix("error: ")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_stops_with_file_and_row_or_is_counted(name, tmp_path, capsys):
    row, reason = BROKEN[name]
    file = write_rows(tmp_path, [GOOD, row, GOOD])
    with pytest.raises(UserError, match=reason):
        read_pairs(file, Drops())
    assert told(capsys, lambda: read_pairs(file, Drops())).startswith(f"{file}:2: ")
    drops = Drops()
    assert len(read_pairs(file, drops, bad_rows="drop")) == 2
    assert drops.read == 3 and str(drops) == f"1 broken row ({file}:2)"


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("bad_rows", ["stop", "drop"])
def test_a_row_without_a_pair_is_counted_by_its_rule(name, bad_rows, tmp_path):
    row, rule = DROPPED[name]
    file, drops = write_rows(tmp_path, [GOOD, row, GOOD]), Drops()
    assert len(read_pairs(file, drops, bad_rows=bad_rows)) == 2
    assert drops.read == 3 and str(drops) == f"1 {rule} ({file}:2)"


def test_what_parquet_holds_besides_json_is_told_too(tmp_path, capsys):
    """NaN for a missing score, bytes for text, a date: as pandas and arrow write them."""
    for column, value, reason in (
        ("score_chosen", float("nan"), "score_chosen is nan"),
        ("chosen", b"So.", "found bytes"),
        ("prompt", datetime.date(2024, 2, 29), "found date"),
    ):
        rows = [GOOD | {"score_chosen": 1.0, "score_rejected": 0.5} | {column: value}]
        file = write_rows(tmp_path, rows, "a.parquet")
        assert reason in told(capsys, lambda f=file: read_pairs(f, Drops()))


# ----------------------------------------------------------------------------- files


def long_table(tmp_path, broken_from=None):
    """3,000 rows in row groups of 1,024; one byte of the group behind `broken_from` is flipped."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file, rows = tmp_path / "a.parquet", [GOOD | {"chosen": f"So {i}."} for i in range(3000)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, file, row_group_size=1024, write_page_checksum=True, use_dictionary=False)
    if broken_from is not None:
        column = pq.read_metadata(file).row_group(broken_from).column(1)
        raw = bytearray(file.read_bytes())
        raw[column.data_page_offset + column.total_compressed_size // 2] ^= 1
        file.write_bytes(raw)
    return file


LINES = b"".join(json.dumps(GOOD | {"chosen": f"So {i}."}).encode() + b"\n" for i in range(500))
FILES = {
    "an empty file": ("a.jsonl", b"", ": no usable pairs; dropped: none"),
    "blank lines": ("a.jsonl", b"\n \n", ": no usable pairs; dropped: none"),
    "an empty json": ("a.json", b"", ": broken JSON"),
    "an empty list": ("a.json", b"[]", ": no usable pairs; dropped: none"),
    "an empty gz": ("a.jsonl.gz", b"", ": no usable pairs; dropped: none"),
    "an empty parquet": ("a.parquet", b"", ": not readable as parquet: "),
    "no gz": ("a.jsonl.gz", b"not gzip", ": not readable: Not a gzipped file"),
    "no parquet": ("a.parquet", b"not parquet", ": not readable as parquet: "),
    "not UTF-8": ("a.jsonl", b'{"prompt": "\xe9"}', ":1: not readable: 'utf-8' codec"),
    "UTF-16": ("a.jsonl", json.dumps(GOOD).encode("utf-16"), ":1: not readable: 'utf-8' codec"),
    "a cut gz": ("a.jsonl.gz", gzip.compress(LINES)[:-40], r":\d\d+: not readable: .*; fetch"),
    "a flipped byte in a gz": (
        "a.jsonl.gz",
        gzip.compress(LINES)[:-6] + b"\0" + gzip.compress(LINES)[-5:],
        ":501: not readable: CRC check failed",
    ),
    "a cut json": ("a.json", b"[" + LINES.replace(b"\n", b",\n")[:-99], ": broken JSON"),
    "a cut last line": ("a.jsonl", LINES[:-9], ":500: broken JSON"),
    "an object in json": ("a.json", b'{"rows": []}', r":1: columns \['rows'\]; expected chosen"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_told_in_one_line(name, tmp_path, capsys):
    file, content, reason = FILES[name]
    (tmp_path / file).write_bytes(content)
    file = str(tmp_path / file)
    assert re.match(re.escape(file) + reason, told(capsys, lambda: read_pairs(file, Drops())))


@pytest.mark.parametrize("bad_rows", ["stop", "drop"])
def test_a_damaged_file_stops_also_where_broken_rows_are_dropped(bad_rows, tmp_path, capsys):
    """What lies behind the damage is not known, so it cannot be counted."""
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(LINES)[:-40])
    said = told(capsys, lambda: read_pairs(str(file), Drops(), bad_rows=bad_rows))
    assert ": not readable: Compressed file ended" in said and "fetch the file again" in said
    table = long_table(tmp_path, broken_from=1)
    said = told(capsys, lambda: read_pairs(str(table), Drops(), bad_rows=bad_rows))
    assert said.startswith(f"{table}:1025: not readable as parquet: ")
    assert len(read_pairs(str(table), Drops(), limit=1024)) == 1024


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_cut_parquet_is_told(share, tmp_path, capsys):
    file = long_table(tmp_path)
    raw = file.read_bytes()
    assert len(read_pairs(str(file), Drops())) == 3000
    file.write_bytes(raw[: int(share * len(raw))])
    said = told(capsys, lambda: read_pairs(str(file), Drops()))
    assert said.startswith(f"{file}: not readable as parquet: ")


def test_a_directory_without_data_and_a_file_that_is_not_there(tmp_path, capsys):
    for source in (tmp_path, tmp_path / "none.jsonl", tmp_path / "*.jsonl", f"{tmp_path}:train"):
        said = told(capsys, lambda s=source: read_pairs(str(s), Drops()))
        assert said.startswith(f"--data {source}: no such file; give a path, a glob or a hub")


def test_train_ends_with_that_line_and_status_2(tmp_path, tiny_model_dir):
    file = write_rows(tmp_path, [GOOD] * 20 + ['{"prompt": '])
    command = [sys.executable, "train.py", "--loss", "dpo", "--out", tmp_path / "run"]
    command += ["--model", tiny_model_dir, "--data", file]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert f"error: {file}:21: broken JSON" in ended.stderr


# ----------------------------------------------------------------------------- odd but good


def dataset(tmp_path, template, *rows, max_len=200):
    pairs = read_pairs(write_rows(tmp_path, rows), Drops())
    return Dataset(pairs, template, recipe("dpo"), Limits(max_len, 0.4), "better")


def test_an_answer_of_a_megabyte_is_read_and_cut(tmp_path, tiny_model_dir):
    row = GOOD | {"chosen": "So what. " * 120_000, "rejected": "x" * 2**20}
    data = dataset(tmp_path, Template(tiny_model_dir), row, GOOD)
    assert len(data) == 2 and data.cuts == {"rejected answers": 1, "chosen answers": 1}
    example = data.examples[0]
    assert len(example.prompt) + len(example.chosen) == 200 and not example.closed["chosen"]


def test_the_name_of_a_special_token_inside_an_answer_is_text(tmp_path, tiny_model_dir):
    """Only the template ends a turn: id 258 stands once, at the end; the answer decodes as is."""
    template = Template(tiny_model_dir)
    answer = "Write <|im_end|>\n<|im_start|>user\nHi to end a turn. <|endoftext|>"
    data = dataset(tmp_path, template, GOOD | {"prompt": f"Explain {answer}", "chosen": answer})
    example = data.examples[0]
    chosen = example.chosen.tolist()
    assert chosen.index(258) == len(chosen) - 1 and not {256, 257} & set(chosen)
    assert template.decode(chosen) == answer
    assert example.prompt.tolist().count(258) == 1
    assert f"Explain {answer}" in template.decode(example.prompt, skip_special=False)


# ----------------------------------------------------------------------------- fuzz

VALUES = (None, True, 0, 1, -1, 2**70, 1.5, float("nan"), float("inf"), "", " ", "nan", "N/A", "7",
          "\0", "\ud800", SHIELD, "<|im_end|>", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman:",
          "\n\nAssistant: b", "text", [], [None], [[]], {}, {"role": "user"}, say("a"),
          say("a", "b"), {"role": "assistant", "content": "b"}, {"Rating": "5"}, "m1", "m2",
          "en")  # fmt: skip


def places(value, path=()):
    """The paths to all values inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in inside:
        yield (*path, key)
        if isinstance(child, dict | list):
            yield from places(child, (*path, key))


def reach(row, path):
    for key in path:
        row = row[key]
    return row


def mutate(row, rng):
    """Delete a value, cut a text or list, or put another value in its place."""
    paths = list(places(row))
    if not paths:
        return
    columns = [path for path in paths if len(path) == 1]
    *path, key = rng.choice(rng.choice((paths, columns)))
    parent, how = reach(row, path), rng.randrange(4)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent[key], str | list):
        parent[key] = parent[key][: rng.randrange(len(parent[key]) + 1)]
    elif how == 2:
        parent[key] = copy.deepcopy(reach(row, rng.choice(paths)))
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))


def check_reading(file, n, need_rejected):
    """No traceback; with bad_rows drop all n rows are kept or counted."""
    try:
        read_pairs(file, Drops(), need_rejected=need_rejected)
    except UserError as error:
        assert str(error).startswith(file) and "\n" not in str(error)
    drops, kept = Drops(), []
    try:
        kept = read_pairs(file, drops, need_rejected=need_rejected, bad_rows="drop")
    except UserError as error:
        assert "no usable pairs" in str(error)
    assert drops.read == n == len(kept) + drops.total
    assert not any(p.margin is not None and p.margin != p.margin for p in kept)


def test_mutated_rows_of_every_layout_leave_no_traceback_and_no_lost_row(for_all, tmp_path):
    def check(rng):
        for _, published, _, _ in PUBLISHED.values():
            rows = copy.deepcopy(published)
            for _ in range(rng.randrange(1, 8)):
                mutate(rng.choice(rows), rng)
            file = write_rows(tmp_path, rows, "train.jsonl")
            for need_rejected in (True, False):
                check_reading(file, len(rows), need_rejected)

    for_all(check)


def test_mutated_bytes_leave_no_traceback(for_all, tmp_path):
    """Lines, plain and packed, with bytes cut out, changed or doubled."""

    def check(rng):
        rows = [row for _, rows, _, _ in PUBLISHED.values() for row in rows]
        raw = bytearray("\n".join(json.dumps(rng.choice(rows)) for _ in range(5)).encode())
        packed = rng.random() < 0.3
        raw = bytearray(gzip.compress(raw)) if packed else raw
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randrange(3)] = rng.choice((b"", b"\0", b"\n", b"\xff", raw[:at]))
        file = tmp_path / ("a.jsonl.gz" if packed else rng.choice(("a.jsonl", "a.json")))
        file.write_bytes(raw)
        for bad_rows in ("stop", "drop"):
            drops = Drops()
            try:
                kept = read_pairs(str(file), drops, bad_rows=bad_rows)
            except UserError as error:
                assert str(error).startswith(str(file)) and "\n" not in str(error)
            else:
                assert drops.read == len(kept) + drops.total

    for_all(check)
