"""Every published layout gives the pairs that were written by hand; and the rules of each."""

import json
import random

import pytest
from dialogues import write_rows
from published import PUBLISHED, TREE, completion, oasst, openbmb, shp

from jobs.cli import UserError
from pairs.read import Drops, read_pairs


def write_published(directory, name):
    """The rows of a published dataset as a file of its kind; SHP's .json holds a row per line."""
    file, rows, *_ = PUBLISHED[name]
    if not file.endswith(".json"):
        return write_rows(directory, rows, file)
    (directory / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory / file)


# ----------------------------------------------------------------------------- the pairs


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_layout_gives_the_pairs_written_by_hand(name, tmp_path):
    _, rows, expected, dropped = PUBLISHED[name]
    drops = Drops()
    pairs = read_pairs(write_published(tmp_path, name), drops)
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [e[:3] for e in expected]
    assert [p.margin for p in pairs] == [pytest.approx(e[3]) for e in expected]
    assert {rule: len(where) for rule, where in drops.rules.items()} == dropped
    assert drops.read == len(rows) == len(pairs) + drops.total


def test_rows_of_all_layouts_may_stand_in_one_file(tmp_path):
    rows = [row for _, rows, _, _ in PUBLISHED.values() for row in rows]
    random.Random(0).shuffle(rows)
    pairs = read_pairs(write_rows(tmp_path, rows), Drops())
    expected = [e[1:3] for _, _, expected, _ in PUBLISHED.values() for e in expected]
    assert sorted((p.chosen, p.rejected) for p in pairs) == sorted(expected)


# ----------------------------------------------------------------------------- rules of a layout


def test_openbmb_sets_the_best_against_a_random_lower_one_that_never_changes(tmp_path):
    """Over many instructions every lower completion is drawn; the same one draws the same."""
    row = [
        completion(text, s) for text, s in (("best", 9), ("second", 7), ("tie", 9), ("third", 2))
    ]
    file = write_rows(tmp_path, [openbmb(f"Question {i}?", *row) for i in range(60)])
    first, again = (read_pairs(file, Drops()) for _ in range(2))
    assert first == again
    assert {p.chosen for p in first} == {"best"}
    counts = {text: sum(p.rejected == text for p in first) for text in ("second", "third")}
    assert sum(counts.values()) == 60 and min(counts.values()) >= 15


def test_shp_takes_five_random_pairs_of_a_prompt_from_training_files_only(tmp_path):
    rows = [shp("Eggs?", f"yes {i}", "no", 1, 3.0) for i in range(9)]
    rows += [shp("Salt?", "yes", "no", 1, 1.5)]
    drops, kept = Drops(), random.Random(0).sample(range(9), 5)
    pairs = read_pairs(write_rows(tmp_path, rows, "train.jsonl"), drops)
    assert [p.chosen for p in pairs] == [f"yes {i}" for i in sorted(kept)]
    assert str(drops).startswith("1 score ratio under 2") and "4 over 5 pairs of a prompt" in str(
        drops
    )
    for name in ("test.jsonl", "validation-00000-of-00001.jsonl"):
        drops = Drops()
        assert len(read_pairs(write_rows(tmp_path, rows, name), drops)) == 10 and drops.total == 0


def test_a_folder_called_test_set_does_not_make_a_training_file_a_test_file(tmp_path):
    folder = tmp_path / "test-runs"
    folder.mkdir()
    drops = Drops()
    with pytest.raises(UserError, match="no usable pairs; dropped: 1 score ratio under 2"):
        read_pairs(write_rows(folder, [shp("Salt?", "yes", "no", 1, 1.5)], "train.jsonl"), drops)


def test_oasst_trees_may_lie_in_any_order_and_over_several_files(tmp_path):
    """A reply before its parent, and in another file of the same source."""
    for i, rows in enumerate((TREE[:6:-1], TREE[6::-1])):
        write_rows(tmp_path, rows, f"{i}.jsonl")
    pairs = read_pairs(str(tmp_path / "*.jsonl"), Drops())
    expected = PUBLISHED["OpenAssistant/oasst1"][2]
    assert sorted((p.chosen, p.rejected) for p in pairs) == sorted(e[1:3] for e in expected)


def test_a_circle_of_parents_is_a_missing_parent(tmp_path):
    rows = [oasst("a", "b", "assistant", "x", 0), oasst("b", "a", "assistant", "y", 1),
            oasst("c", "a", "assistant", "z", 1), oasst("d", "a", "assistant", "z", 0)]  # fmt: skip
    with pytest.raises(UserError, match="2 its parent is missing"):
        read_pairs(write_rows(tmp_path, rows), Drops())


def test_ranks_that_pandas_wrote_as_floats_are_ranks(tmp_path):
    rows = [
        row | {"rank": float("nan") if row["rank"] is None else float(row["rank"])} for row in TREE
    ]
    pairs = read_pairs(write_rows(tmp_path, rows), Drops())
    assert [p.chosen for p in pairs] == [e[1] for e in PUBLISHED["OpenAssistant/oasst1"][2]]
