"""`--data`: files, globs, folders, hub ids with splits, several with weights; the hub's cache."""

import csv
import gzip
import io
import json
import lzma
from collections import Counter

import pyarrow
import pytest
from dialogues import GOOD, write_rows
from published import TREE

from jobs.cli import UserError
from pairs.read import Drops, data_files, hold_out, of_split, parse_sources, read_pairs, records


def names(directory, files):
    return [file.removeprefix(f"{directory}/") for file in files]


def touch(directory, *files):
    """Files of one pair, whose chosen answer is the file's path."""
    for file in files:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        write_rows(directory, [GOOD | {"chosen": file}], file)


# ----------------------------------------------------------------------------- local


def test_a_folder_gives_what_a_hub_dataset_of_its_names_would(tmp_path):
    """train_prefs, else train, else all files where no name tells a split; two levels down."""
    flat, hub, deep = (tmp_path / name for name in ("flat", "hub", "deep"))
    touch(flat, "b.jsonl", "a.parquet", "c.json", "d.json.gz", "e.jsonl.gz")
    (flat / "notes.txt").write_text("x")
    (flat / "dataset_infos.json").write_text("{}")
    assert names(flat, data_files(str(flat))) == [
        "a.parquet", "b.jsonl", "c.json", "d.json.gz", "e.jsonl.gz"]  # fmt: skip
    touch(hub, "data/train_prefs-0.jsonl", "data/train_sft-0.jsonl", "data/test_prefs-0.jsonl")
    assert names(hub, data_files(str(hub))) == ["data/train_prefs-0.jsonl"]
    assert names(hub, data_files(f"{hub}:test_prefs")) == ["data/test_prefs-0.jsonl"]
    touch(deep, "a/b/train.jsonl", "a/b/c/train.jsonl", "a/b/test.jsonl")
    assert names(deep, data_files(f"{deep}/")) == ["a/b/train.jsonl"]
    assert names(deep, data_files(f"{deep}:b/test")) == ["a/b/test.jsonl"]


def test_a_folder_without_data_is_told_with_what_it_holds(tmp_path):
    with pytest.raises(UserError, match=r"the folder holds no files of split train_prefs or train"):
        data_files(str(tmp_path))
    touch(tmp_path, "test.jsonl")
    with pytest.raises(UserError, match=r"of split dev among \['test.jsonl'\]"):
        data_files(f"{tmp_path}:dev")


def test_a_split_is_a_whole_word_of_a_name_and_a_config_a_whole_folder():
    files = ["all/train-00000-of-00001.parquet", "small/train-00000-of-00001.parquet",
             "small/retrain.parquet", "small/train_sft-0.parquet", "small/test.parquet",
             "small/train.txt"]  # fmt: skip
    assert of_split(files, "train") == files[:2]
    assert of_split(files, "small/train") == files[1:2]
    assert of_split(files, "mall/train") == []
    assert of_split(files, "test") == ["small/test.parquet"]
    assert of_split(["evol_instruct.jsonl", "flan.jsonl", "README.md"]) == [
        "evol_instruct.jsonl", "flan.jsonl"]  # fmt: skip
    assert of_split(["test.jsonl", "flan.jsonl"]) == []


# ----------------------------------------------------------------------------- several, weights


def test_sources_are_joined_by_commas_in_their_order(tmp_path):
    touch(tmp_path, "a.jsonl", "b.jsonl", "c/train.jsonl")
    pairs = read_pairs(f"{tmp_path}/b.jsonl,{tmp_path}/c,{tmp_path}/[a].jsonl", Drops())
    assert [p.chosen for p in pairs] == ["b.jsonl", "c/train.jsonl", "a.jsonl"]


def test_a_weight_repeats_all_pairs_and_draws_a_share(tmp_path):
    file = write_rows(tmp_path, [GOOD | {"chosen": str(i)} for i in range(8)])
    for weight, copies in ((1, 8), (2, 16), (0.25, 2), (2.5, 20), (3.0, 24)):
        drops = Drops()
        pairs = read_pairs(f"{file}@{weight}", drops)
        counts = Counter(p.chosen for p in pairs)
        assert len(pairs) == copies and drops.read == 8 == len(counts) + drops.total
        assert max(counts.values()) - min(counts.values(), default=0) <= 1
    quarter = [p.chosen for p in read_pairs(f"{file}@.25", Drops())]
    assert quarter == sorted(quarter) == [p.chosen for p in read_pairs(f"{file}@.25", Drops())]


def test_copies_of_a_pair_never_stand_on_both_sides_of_the_hold_out(tmp_path):
    file = write_rows(tmp_path, [GOOD | {"prompt": f"{i}?"} for i in range(8)])
    train, held = hold_out(read_pairs(f"{file}@2.5", Drops()), 3, seed=0)
    assert len(held) == len({p.where for p in held}) == 3
    assert not {p.where for p in held} & {p.where for p in train}
    assert len({p.where for p in train}) == 5


@pytest.mark.parametrize("weight", ["0", "0.0", "-1", "x", "1e3", "nan", ""])
def test_a_weight_that_is_none_is_told(weight, tmp_path):
    file = write_rows(tmp_path, [GOOD])
    with pytest.raises(UserError, match="the weight behind @ must be a number above 0"):
        read_pairs(f"{file}@{weight}", Drops())


def test_a_file_name_may_hold_commas_and_at_signs(tmp_path):
    file = write_rows(tmp_path, [GOOD], "a,b@2.jsonl")
    assert [files for files, _ in parse_sources(file)] == [[file]]
    assert len(read_pairs(file, Drops())) == 1


def test_the_limit_counts_what_it_leaves_of_rows_that_had_to_be_read(tmp_path):
    """Over two sources; and of a layout whose rows are all read before the first pair is known."""

    a, b = (write_rows(tmp_path, [GOOD] * 3, name) for name in ("a.jsonl", "b.jsonl"))
    drops = Drops()
    assert len(read_pairs(f"{a},{b}", drops, limit=4)) == 4
    assert drops.read == 4 and not drops.total
    tree, drops = write_rows(tmp_path, TREE, "tree.jsonl"), Drops()
    assert len(read_pairs(tree, drops, limit=1)) == 1
    assert drops.read == len(TREE) == 1 + drops.total
    assert len(drops.rules["beyond --limit"]) == 2


# ----------------------------------------------------------------------------- the hub

COMMIT = "0" * 39 + "1"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """fill(repo, *files): huggingface_hub's own cache as a download leaves it, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def fill(repo, *files, refs=("main",)):
        root = tmp_path / f"datasets--{repo.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        for ref in refs:
            (root / "refs" / ref).write_text(COMMIT)
        for n, file in enumerate(files):
            blob, link = root / "blobs" / f"{n:040x}", root / "snapshots" / COMMIT / file
            blob.parent.mkdir(exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob.write_text(json.dumps(GOOD | {"chosen": file}) + "\n")
            link.symlink_to(blob)

    return fill


def chosen(source, **options):
    return [p.chosen for p in read_pairs(source, Drops(), **options)]


def test_what_the_hub_once_gave_is_read_without_it(cache, capsys):
    cache("lab/one", "data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl",
          "data/test-00000-of-00001.jsonl", "small/train.jsonl")  # fmt: skip
    expected = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert chosen("lab/one") == [*expected, "small/train.jsonl"]
    told = capsys.readouterr().err
    assert told.startswith("lab/one: the hub is out of reach; reading what is cached: ")
    assert "train-00001-of-00002.jsonl" in told and told.count("\n") == 1
    assert chosen("lab/one:test") == ["data/test-00000-of-00001.jsonl"]
    assert chosen("lab/one:small/train") == ["small/train.jsonl"]
    assert chosen("lab/one:data/train@2,lab/one:test") == [
        *expected, *expected, "data/test-00000-of-00001.jsonl"]  # fmt: skip


def test_a_revision_is_found_in_the_cache_and_another_is_not(cache):
    cache("lab/two", "train.jsonl", refs=("main", "v1"))
    assert chosen("lab/two", revision="v1") == chosen("lab/two", revision=COMMIT) == ["train.jsonl"]
    with pytest.raises(UserError, match="--data lab/two: not a file, and the hub did not serve it"):
        chosen("lab/two", revision="v2")


def test_a_half_fetched_split_is_not_read_for_the_whole(cache):
    """Two configurations with equal numbers of shards, one of them incomplete."""
    cache("lab/three", "a/train-00000-of-00002.jsonl", "a/train-00001-of-00002.jsonl",
          "b/train-00001-of-00002.jsonl")  # fmt: skip
    with pytest.raises(UserError, match="the hub did not serve it"):
        chosen("lab/three")
    with pytest.raises(UserError, match="the hub did not serve it"):
        chosen("lab/three:b/train")
    assert len(chosen("lab/three:a/train")) == 2


def test_a_dataset_whose_files_name_no_split_is_read_whole(monkeypatch, tmp_path):
    """openbmb/UltraFeedback: one file per origin of the questions."""
    hub = pytest.importorskip("huggingface_hub")
    files = ["README.md", "flan.jsonl", "evol_instruct.jsonl", ".gitattributes"]
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file, **_: f"/cache/{file}")
    ((found, _),) = parse_sources("openbmb/UltraFeedback")
    assert found == ["/cache/evol_instruct.jsonl", "/cache/flan.jsonl"]


# ----------------------------------------------------------------------------- records


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(name, tmp_path):
    rows = [GOOD | {"chosen": f"Häß {i}"} for i in range(3)]
    file = tmp_path / name
    if name == "a.json.gz":
        file.write_bytes(gzip.compress(json.dumps(rows).encode()))
    else:
        write_rows(tmp_path, rows, name)
    assert list(records(str(file))) == [(f"{file}:{i}", row) for i, row in enumerate(rows, 1)]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n \n"])
def test_a_json_file_may_hold_a_record_per_line(start, tmp_path):
    lines = [json.dumps(GOOD).encode()] * 3
    (tmp_path / "train.json").write_bytes(start + b"\r\n".join(lines))
    rows = [row for _, row in records(str(tmp_path / "train.json"))]
    assert rows == [GOOD] * 3


def test_a_json_file_may_be_printed_over_several_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([GOOD, GOOD], indent=4))
    assert [row for _, row in records(str(tmp_path / "a.json"))] == [GOOD] * 2


@pytest.mark.parametrize("name", ["a.jsonl.xz", "a.json.zst", "a.csv", "a.tsv.gz", "a.csv.zst"])
@pytest.mark.parametrize("bom, end", [("", "\n"), ("\ufeff", "\r\n")])
def test_packed_and_tabular_files_with_bom_and_windows_ends(name, bom, end, tmp_path):
    """Written by csv and json, packed by lzma, gzip and arrow; a field holds both line ends."""
    rows = [GOOD | {"chosen": f'Häß, "{i}"\t{end}So.'} for i in range(3)]
    kind, file = name.split(".")[1], str(tmp_path / name)
    text = io.StringIO(newline="")
    if kind.endswith("sv"):
        table = csv.DictWriter(text, list(GOOD), dialect="excel-tab" if kind == "tsv" else "excel")
        table.writeheader()
        table.writerows(rows)
    else:
        text.write(json.dumps(rows) if kind == "json" else end.join(map(json.dumps, rows)))
    raw = (bom + text.getvalue()).encode()
    if name.endswith("zst"):
        with pyarrow.output_stream(file, compression="zstd") as f:
            f.write(raw)
    else:
        pack = {"xz": lzma.compress, "gz": gzip.compress}.get(name.rsplit(".", 1)[1], bytes)
        (tmp_path / name).write_bytes(pack(raw))
    assert [row for _, row in records(file)] == rows


def test_a_csv_row_of_another_width_is_told(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\na,b\n")
    with pytest.raises(UserError, match="a.csv:1: not as many fields as the header has"):
        read_pairs(str(tmp_path / "a.csv"), Drops())
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\na,b\nWhy?,So.,No.\n")
    pairs = read_pairs(str(tmp_path / "a.csv"), drops := Drops(), bad_rows="drop")
    assert len(pairs) == 1 and str(drops) == f"1 broken row ({tmp_path / 'a.csv'}:1)"


def test_what_datasets_writes_is_what_we_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [GOOD | {"chosen": f"Häß {i}"} for i in range(5)]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict(train=whole, test=whole.select([0])).save_to_disk(tmp_path / "both")
    whole.map(lambda row: row, cache_file_name=str(tmp_path / "saved" / "cache-1.arrow"))
    whole.to_csv(tmp_path / "a.csv", index=False)
    expected = [row["chosen"] for row in rows]
    for source in ("saved", "both", "a.csv"):
        assert chosen(str(tmp_path / source)) == expected
    assert chosen(f"{tmp_path / 'both'}:test") == expected[:1]
    datasets.DatasetDict(mine=whole, yours=whole.select([0])).save_to_disk(tmp_path / "odd")
    assert chosen(f"{tmp_path / 'odd'}:yours") == expected[:1]
    with pytest.raises(UserError, match="--data .*odd: .* no split train of default, but mine, yo"):
        chosen(str(tmp_path / "odd"))


def test_an_arrow_file_is_read_as_a_stream_is(tmp_path):
    table = pyarrow.Table.from_pylist([GOOD, GOOD | {"prompt": "How?"}])
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table)
    assert len(read_pairs(str(tmp_path / "a.arrow"), Drops())) == 2


def test_two_columns_of_one_name_are_refused(tmp_path):
    """Python's csv keeps the last of them alone."""
    (tmp_path / "a.csv").write_text("prompt,prompt,chosen,rejected\nMore.,Why?,So.,No.\n")
    with pytest.raises(UserError, match="a.csv: two columns are called 'prompt'"):
        read_pairs(str(tmp_path / "a.csv"), Drops())


# ----------------------------------------------------------------------------- what a card declares

CARD = """---
license: mit
configs:
- config_name: preference
  data_files:
  - {split: train, path: "preference/train.jsonl"}
  - {split: validation, path: [preference/val*]}
DEFAULT- config_name: edit
  data_files: edit/*.jsonl
- config_name: odd
  data_dir: odd
---
# About
"""


@pytest.fixture
def carded(tmp_path):
    touch(tmp_path, "preference/train.jsonl", "preference/val-0.jsonl", "edit/a.jsonl",
          "edit/b.jsonl", "edit/deep/c.jsonl", "odd/train.jsonl", "odd/test.jsonl")  # fmt: skip

    def write(default):
        (tmp_path / "README.md").write_text(CARD.replace("DEFAULT", default))
        return str(tmp_path)

    return write


def test_a_card_decides_which_files_belong_together(carded):
    """As datasets reads the same folder."""
    folder = carded("  default: true\n")
    expected = {"": ["preference/train.jsonl"], ":validation": ["preference/val-0.jsonl"],
                ":edit": ["edit/a.jsonl", "edit/b.jsonl"], ":odd/test": ["odd/test.jsonl"],
                ":preference/validation": ["preference/val-0.jsonl"]}  # fmt: skip
    for split, files in expected.items():
        assert names(folder, data_files(folder + split)) == files
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    for name, split in (("preference", "train"), ("preference", "validation"), ("edit", "train")):
        theirs = datasets.load_dataset(folder, name, split=split, cache_dir=f"{folder}/.cache")
        assert chosen(f"{folder}:{name}/{split}") == theirs["chosen"]


def test_several_configurations_without_a_default_are_listed_and_not_mixed(carded):
    folder = carded("")
    with pytest.raises(UserError, match="configurations preference, edit, odd; name one"):
        data_files(folder)
    with pytest.raises(UserError, match="no split dev of preference, but train, validation; name"):
        data_files(f"{folder}:preference/dev")


def test_a_hub_dataset_is_read_by_its_card(monkeypatch, carded, tmp_path):
    carded("  default: true\n")
    hub = pytest.importorskip("huggingface_hub")
    listed = ["README.md", "edit/a.jsonl", "odd/train.jsonl", "preference/train.jsonl"]
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda *_, **__: listed)
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file, **_: str(tmp_path / file))
    assert chosen("lab/name") == ["preference/train.jsonl"]
    assert chosen("lab/name:edit") == ["edit/a.jsonl"]
    with pytest.raises(UserError, match="--data lab/name:edit/x: its card declares no split x"):
        chosen("lab/name:edit/x")
