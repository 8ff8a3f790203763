"""Pairs are read as they lie; what is left out is counted, what is wrong is told by its row."""

import gzip
import json

import pytest
from dialogues import GOOD, reply, say, write_rows

import data
from jobs.cli import UserError
from pairs.layouts import Pair
from pairs.read import Drops, hold_out, read_pairs, told_of_held


def read(directory, *rows, **options):
    """([(prompt, chosen, rejected)], drops as text) of these rows."""
    drops = Drops()
    pairs = read_pairs(write_rows(directory, rows), drops, **options)
    return [(p.prompt, p.chosen, p.rejected) for p in pairs], drops


# ----------------------------------------------------------------------------- layouts

Q, MORE = say("Why?"), say("Hi", "Hello", "Why?")
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: "
ULTRA = {  # HuggingFaceH4/ultrafeedback_binarized: whole dialogues beside the prompt
    "prompt": "Why?",
    "prompt_id": "f0",
    "chosen": say("Why?", "So."),
    "rejected": say("Why?", "No."),
    "messages": say("Why?", "So."),
    "score_chosen": 8.0,
}
LAYOUTS = {
    "explicit strings": ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, Q),
    "explicit messages": (
        {"prompt": MORE, "chosen": reply("So."), "rejected": reply("No.")},
        MORE,
    ),
    "messages and strings": ({"prompt": MORE, "chosen": "So.", "rejected": "No."}, MORE),
    "implicit messages": ({"chosen": [*MORE, *reply("So.")],
                           "rejected": [*MORE, *reply("No.")]}, MORE),
    "implicit strings": ({"chosen": "Why? So.", "rejected": "Why? No."}, Q),
    "hh-rlhf": ({"chosen": HH + "So.", "rejected": HH + "No."}, MORE),
    "hh-rlhf prompt": ({"prompt": HH[:-13], "chosen": "So.", "rejected": "No."}, MORE),
    "ultrafeedback": (ULTRA, Q),
    "system": ({"prompt": say("Why?", system="Be brief"), "chosen": "So.", "rejected": "No."},
               say("Why?", system="Be brief")),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_every_layout_in_every_kind_of_file(name, kind, tmp_path):
    record, prompt = LAYOUTS[name]
    file = write_rows(tmp_path, [record, record], f"pairs.{kind}")
    first, second = read_pairs(file, Drops())
    assert first == Pair(prompt, "So.", "No.", f"{file}:1")
    assert second.where == f"{file}:2"


def test_a_source_alone_gives_pairs(tmp_path):
    """The public form: data.read_pairs."""
    (pair,) = data.read_pairs(write_rows(tmp_path, [ULTRA | {"score_rejected": 5.0}]))
    assert (pair.prompt, pair.chosen, pair.rejected, pair.margin) == (Q, "So.", "No.", 3.0)


def test_implicit_strings_part_at_the_last_white_space_they_share(tmp_path):
    """ "It is s" is common too, but no prompt ends within a word."""
    row = {"chosen": "Q: why?\nA: It is so.", "rejected": "Q: why?\nA: It is simple."}
    assert read(tmp_path, row)[0] == [(say("Q: why?\nA: It is"), "so.", "simple.")]


def test_targets_alone_will_do_where_no_rejected_answer_is_scored(tmp_path):
    rows = {"prompt": "Why?", "chosen": "So."}, {"messages": [*MORE, *reply("So.")]}
    pairs, _ = read(tmp_path, *rows, need_rejected=False)
    assert pairs == [(Q, "So.", None), (MORE, "So.", None)]


def test_the_test_split_of_hh_rlhf(hh_file):
    """Pairs whose dialogues differ before the last answer, and empty answers, are left out; counted
    here by string surgery on the raw lines."""
    with gzip.open(hh_file, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    split = [[row[a].rpartition("\n\nAssistant:") for a in ("chosen", "rejected")] for row in rows]
    differ = sum(w[0] != l[0] for w, l in split)
    empty = sum(w[0] == l[0] and not (w[2].strip() and l[2].strip()) for w, l in split)
    drops = Drops()
    pairs = read_pairs(str(hh_file), drops)
    assert {rule: len(where) for rule, where in drops.rules.items()} == {
        "prompts differ": differ, "empty answer": empty}  # fmt: skip
    assert len(pairs) == len(rows) - differ - empty == 2303
    assert all(p.prompt[0]["role"] == p.prompt[-1]["role"] == "user" for p in pairs)


# ----------------------------------------------------------------------------- drops and errors


def test_what_is_dropped_is_counted_by_rule_and_place(tmp_path):
    differ = {"chosen": say("Why?", "So."), "rejected": say("Why", "No.")}
    empty, silent = GOOD | {"rejected": " \n"}, GOOD | {"prompt": " "}
    apart = {"chosen": "Nothing shared.", "rejected": "At all."}
    hollow = GOOD | {"chosen": ""}
    pairs, drops = read(tmp_path, GOOD, differ, empty, silent, hollow, apart, empty)
    assert len(pairs) == 1
    f = tmp_path / "pairs.jsonl"
    assert str(drops) == (
        f"1 prompts differ ({f}:2); 3 empty answer ({f}:3, {f}:5, …); 2 no prompt ({f}:4, {f}:6)"
    )


def test_a_limit_reads_no_further(tmp_path):
    assert len(read(tmp_path, GOOD, GOOD, GOOD, "broken", limit=2)[0]) == 2


def test_blank_lines_are_nothing_and_odd_line_separators_are_text(tmp_path):
    odd = json.dumps(GOOD | {"chosen": "a\u2028b\x85c"}, ensure_ascii=False)
    pairs, _ = read(tmp_path, "", odd, "  ", GOOD)
    assert [chosen for _, chosen, _ in pairs] == ["a\u2028b\x85c", "So."]


WRONG = {  # and what tests/test_bad_input.py holds
    "no chosen": ({"prompt": "a", "answer": "b"}, r"columns \['answer', 'prompt'\]; expected"),
    "a strange role": (
        GOOD | {"prompt": [{"role": "critic", "content": "x"}]},
        "unknown role 'critic'",
    ),
    "no content": (GOOD | {"prompt": [{"role": "user"}]}, "a message needs a role and a text"),
    "pictures": (GOOD | {"prompt": [{"role": "user", "content": [{}]}]}, "and a text content"),
    "no answer": ({"chosen": say("a"), "rejected": say("a")}, "must be the assistant's answer"),
    "no messages": ({"chosen": [], "rejected": []}, "must be the assistant's answer"),
    "an hh question": ({"chosen": HH[:-13], "rejected": HH}, "does not end with an answer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_told_in_one_line_with_file_and_row(name, tmp_path):
    row, told = WRONG[name]
    with pytest.raises(UserError, match=told) as error:
        read(tmp_path, GOOD, row)
    assert str(error.value).startswith(f"{tmp_path / 'pairs.jsonl'}:2: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["missing.jsonl", "some/missing.jsonl", "*.jsonl", "", "."])
def test_a_missing_file_is_told_with_the_cure(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--data .*: no such file; give a path, a glob or a hub"):
        read_pairs(source, Drops())


def test_a_glob_reads_its_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write_rows(tmp_path, [GOOD | {"chosen": name}], name)
    (tmp_path / "c.jsonl").mkdir()
    pairs = read_pairs(str(tmp_path / "*.jsonl"), Drops())
    assert [p.chosen for p in pairs] == ["a.jsonl", "b.jsonl"]


# ----------------------------------------------------------------------------- the hub

REVISION = "0123abc"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one dataset, `lab/pairs`, of five files; every file names itself as the answer."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    files = ["README.md", "data/train_prefs-0.jsonl", "data/train_prefs-1.jsonl",
             "data/train_sft-0.jsonl", "data/test_prefs-0.jsonl", "data/train-0.jsonl"]  # fmt: skip

    def list_repo_files(self, name, repo_type, revision):
        assert (name, repo_type, revision) == ("lab/pairs", "dataset", REVISION)
        return files

    def download(name, file, repo_type, revision):
        assert (name, repo_type, revision) == ("lab/pairs", "dataset", REVISION)
        return write_rows(tmp_path, [GOOD | {"chosen": file}], file.replace("/", "_"))

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return files


@pytest.mark.parametrize(
    "source, files",
    [
        ("lab/pairs", ["data/train_prefs-0.jsonl", "data/train_prefs-1.jsonl"]),
        ("lab/pairs:test_prefs", ["data/test_prefs-0.jsonl"]),
        ("lab/pairs:train_sft", ["data/train_sft-0.jsonl"]),
    ],
)
def test_a_hub_id_reads_one_split(source, files, hub):
    assert [p.chosen for p in read_pairs(source, Drops(), revision=REVISION)] == files


def test_a_hub_dataset_without_preference_splits_reads_train(hub):
    hub[:] = ["harmless-base/train.jsonl", "harmless-base/test.jsonl", "helpful-base/train.jsonl",
              "retrain.jsonl", "train_sft.jsonl"]  # fmt: skip
    pairs = read_pairs("lab/pairs", Drops(), revision=REVISION)
    assert [p.chosen for p in pairs] == ["harmless-base/train.jsonl", "helpful-base/train.jsonl"]


def test_an_unknown_split_is_told_and_so_is_an_unreachable_hub(hub, monkeypatch):
    with pytest.raises(UserError, match="--data lab/pairs:dev: no files of split dev among"):
        read_pairs("lab/pairs:dev", Drops(), revision=REVISION)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="not a file, and the hub did not serve it: division"):
        read_pairs("lab/pairs", Drops(), revision=REVISION)


# ----------------------------------------------------------------------------- the hold-out


def test_the_hold_out_is_disjoint_complete_and_seeded():
    pairs = [Pair(say(f"{i}?"), str(i), "", f"f:{i}") for i in range(50)]
    train, held = hold_out(pairs, 10, seed=0)
    assert len(held) == 10
    assert sorted(train + held, key=lambda p: int(p.chosen)) == pairs
    assert hold_out(pairs, 10, seed=0) == (train, held)
    assert hold_out(pairs, 10, seed=1)[1] != held
    assert hold_out(pairs, 0, seed=0) == (pairs, [])
    with pytest.raises(UserError, match="--eval_pairs 50 leaves nothing of 50 pairs"):
        hold_out(pairs, 50, seed=0)


@pytest.mark.parametrize("wanted, held_out", [(20, 20), (22, 20), (23, 25), (1, 5), (0, 0)])
def test_no_prompt_of_a_held_out_pair_is_trained_on(wanted, held_out):
    """20 prompts of 5 pairs each, in any order; exact duplicates among them."""
    asked = ("{}, Ä?", "{},  ä?\n")  # the same, up to case and white space
    pairs = [
        Pair(say(asked[i // 50].format(i % 20)), f"{i % 50}", "", f"f:{i}") for i in range(100)
    ]
    train, held = hold_out(pairs, wanted, seed=0)
    assert len(held) == held_out and len(train) == 100 - held_out
    asked = ({int(p.prompt[0]["content"].split(",")[0]) for p in side} for side in (train, held))
    assert not set.intersection(*asked)
    assert train == [p for p in pairs if p in train] and held == [p for p in pairs if p in held]


def test_one_large_prompt_does_not_stand_in_the_way_of_the_wanted_number():
    pairs = [Pair(say("Why?"), str(i), "", f"f:{i}") for i in range(900)]
    pairs += [Pair(say(f"{i}?"), "So.", "", f"g:{i}") for i in range(100)]
    assert all(len(hold_out(pairs, 50, seed)[1]) == 50 for seed in range(5))


def test_pairs_of_one_prompt_are_all_trained_on():
    pairs = [Pair(Q, str(i), "", f"f:{i}") for i in range(50)]
    assert hold_out(pairs, 10, seed=0) == (pairs, [])


def test_the_log_counts_validation_pairs_whose_prompt_is_trained_on():
    pairs = [Pair(say(f"{i // 2}?"), "So.", "No.", f"f:{i}") for i in range(6)]
    told = told_of_held(pairs[:3], pairs[3:], "x", Drops())
    assert told == "validation: 3 pairs of x, dropped: none; prompt trained on too: 1"
    assert told_of_held(*hold_out(pairs, 2, 0), "x", Drops()).endswith("trained on too: 0")
