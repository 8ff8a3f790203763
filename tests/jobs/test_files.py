"""Rows and items survive a kill; what is written whole is never seen half; processes share."""

import json

import pytest

from jobs import files
from jobs.cli import UserError
from jobs.files import (
    Shared,
    Store,
    append_row,
    open_to_append,
    read_lines,
    replace,
    written_whole,
)

# ----------------------------------------------------------------------------- written whole


def test_a_file_is_replaced_in_one_step(tmp_path):
    """While it is written, and after an error, the old content stands."""
    file = tmp_path / "a.txt"
    replace(file, [b"old"])
    with written_whole(file) as aside:
        aside.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), written_whole(file) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "new" and [f.name for f in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_goes_only_when_the_new_one_is_in(tmp_path, monkeypatch):
    """Also where a kill has left half a folder, or the old one, beside it."""
    final = tmp_path / "best"
    for left in (".best", ".best.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "rubbish").write_text("x")
    for name in ("a", "b"):
        with written_whole(final) as aside:
            aside.mkdir()
            (aside / name).write_text(name)
        assert [f.name for f in final.iterdir()] == [name]
    assert [f.name for f in tmp_path.iterdir()] == ["best"]
    with pytest.raises(OSError), written_whole(final) as aside:
        aside.mkdir()
        raise OSError("disk full")
    assert [f.name for f in final.iterdir()] == ["b"] and len(list(tmp_path.iterdir())) == 1


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    """A folder given as --out of one file stays what it is, with all that is in it."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "kept.json").write_text("{}")
    with pytest.raises(OSError, match="Is a directory"):
        replace(tmp_path / "results", [b"{}"])
    assert [file.name for file in tmp_path.rglob("*")] == ["results", "kept.json"]


def test_everything_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    seen, real = [], files.flush
    monkeypatch.setattr(
        files, "flush", lambda path: seen.append((path, (tmp_path / "d").exists())) or real(path)
    )
    with written_whole(tmp_path / "d") as aside:
        aside.mkdir()
        (aside / "f").write_text("x")
    assert seen == [(aside / "f", False), (aside, False), (tmp_path, True)]


# ----------------------------------------------------------------------------- items by key


def test_a_store_goes_on_behind_a_torn_row(tmp_path):
    file = tmp_path / "deep" / "s.jsonl"
    store = Store(file, ("key", "value"), "--cache")
    store["a"], store["b"] = 1, 2
    store.file.close()
    file.write_bytes(file.read_bytes()[:-3])
    store = Store(file, ("key", "value"), "--cache")
    assert store == {"a": 1}
    store["b"] = [3]
    assert Store(file, ("key", "value"), "--cache") == {"a": 1, "b": [3]}
    assert len(read_lines(file)) == 2


def test_a_value_of_several_parts_and_rows_as_lists(tmp_path):
    file = tmp_path / "s.jsonl"
    file.write_text('["a", "said", [1, 2]]\n{"tokens": null, "key": "b", "text": "so"}\n')
    store = Store(file, ("key", "text", "tokens"), "--cache")
    store["c"] = ("no", [3, 4])
    again = Store(file, ("key", "text", "tokens"), "--cache")
    assert again == {"a": ["said", [1, 2]], "b": ["so", None], "c": ["no", [3, 4]]}


@pytest.mark.parametrize("row", ['{"key": "a"}', "[1]", "7", '"ab"', "", '{"key": [], "value": 1}'])
def test_a_row_of_another_kind_is_named_or_passed_over(tmp_path, row):
    file = tmp_path / "s.jsonl"
    file.write_text(f'["a", 1]\n{row}\n["b", 2]\n')
    with pytest.raises(UserError, match="s.jsonl:2: no row of key, value; mend it"):
        Store(file, ("key", "value"), "--cache")
    assert Store(file, ("key", "value")) == {"a": 1, "b": 2}


def test_owners_share_a_file(tmp_path):
    for model in "ab":
        Store(tmp_path / "s", ("key", "value"), model=model)["k"] = model
    assert [Store(tmp_path / "s", ("key", "value"), model=m) for m in "abc"] == [
        {"k": "a"}, {"k": "b"}, {}
    ]  # fmt: skip


def test_where_nothing_can_be_written_items_last_in_memory(tmp_path):
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "folder", "/dev/null/s"):
        store = Store(place, ("key", "value"))
        store["a"] = 1
        assert store == {"a": 1} and store.file is None
        with pytest.raises(UserError, match=f"--cache {place}: "):
            Store(place, ("key", "value"), "--cache")


# ----------------------------------------------------------------------------- rows


def test_a_torn_line_is_cut_off(tmp_path):
    file = tmp_path / "deep" / "j.jsonl"
    with open_to_append(file, "--out") as opened:
        append_row(opened, {"a": "\u2028 is no newline"})
    with open(file, "ab") as f:
        f.write(b'{"a": "to')
    with open_to_append(file, "--out") as opened:
        assert [json.loads(line) for line in read_lines(file)] == [{"a": "\u2028 is no newline"}]
        append_row(opened, {"a": 2})
    assert [json.loads(line) for line in read_lines(file)][1] == {"a": 2}


def no_check(where, i, row):
    pass


def test_processes_share_and_another_number_of_them_goes_on(tmp_path):
    """3 of 7 rows by two processes; then three processes do the others, whatever their order."""
    file = str(tmp_path / "rows.jsonl")
    for rank, numbers in ((0, [4]), (1, [5, 1])):
        part = Shared(file, 7, no_check, rank, 2)
        for i in numbers:
            part.append(i, {"row": i})
    shares = [Shared(file, 7, no_check, rank, 3) for rank in range(3)]
    assert [share.mine for share in shares] == [[0, 3, 6], [], [2]]
    for share in shares[::-1]:
        for i in share.mine[::-1]:
            share.append(i, {"row": i})
    assert not shares[1].join() and shares[0].join()
    assert [json.loads(line) for line in read_lines(file)] == [{"row": i} for i in range(7)]
    assert [f.name for f in tmp_path.iterdir()] == ["rows.jsonl"]
    assert Shared(file, 7, no_check, 2, 3).mine == []


def test_a_row_that_is_none_of_ours_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    (tmp_path / "rows.jsonl.part0").write_text('{"index": 7, "row": 7}\n')
    with pytest.raises(UserError, match="part0:1: row 7 of 7 prompts"):
        Shared(str(file), 7, no_check)
