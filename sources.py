"""Where data lies: `--data` -> local files -> records, whatever the kind of file.

    --data SOURCE[@WEIGHT][,SOURCE[@WEIGHT]...]

A source is a path, a glob, a folder (the data files directly in it), or a hub dataset id, with
`:split` or `:config/split` behind it. A weight is how often each pair is taken: 2 takes all pairs
twice, 0.25 a random quarter. Hub files come through huggingface_hub's cache, offline once fetched.
"""

import glob
import gzip
import os
import re
import sys
import zlib
from dataclasses import dataclass

from cli import UserError
from template import parse_json

KINDS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Source:
    """name: as the user wrote it; files: local paths in order; weight: copies of each pair."""

    name: str
    files: list
    weight: float = 1.0


def parse_sources(text, revision=None):
    """The value of --data -> list of Source. revision: branch, tag or commit on the hub.

    UserError for a weight that is none, or no files.
    """
    if os.path.exists(text):  # a file name may hold a comma or an @
        return [Source(text, data_files(text))]
    return [_source(part, revision) for part in text.split(",")]


def _source(text, revision):
    name, at, weight = text.rpartition("@")
    if not at or os.path.exists(text):
        return Source(text, data_files(text, revision))
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) or float(weight) == 0:
        raise UserError(f"--data {text}: the weight behind @ must be a number above 0")
    return Source(name, data_files(name, revision), float(weight))


def data_files(source, revision=None):
    """Local path, glob, folder or hub dataset id, with or without a split -> list of local files.

    Raises UserError where there is nothing, in one line that names the source.
    """
    if os.path.isfile(source):
        return [source]
    if found := sorted(filter(os.path.isfile, glob.glob(source))):
        return found
    name, _, split = source.partition(":")
    if os.path.isdir(name):
        files = sorted(os.path.join(name, f) for f in os.listdir(name) if is_data(f))
        if chosen := of_split(files, split) if split else files:
            return chosen
        what = f"of split {split} " if split else ""
        raise UserError(
            f"--data {source}: no such file; give a path, a glob or a hub dataset id "
            f"(the folder holds no data files {what}directly)"
        )
    if HUB_ID.fullmatch(name) and not is_data(name) and not name.endswith(".gz"):
        return hub_files(name, split, revision)
    raise UserError(f"--data {source}: no such file; give a path, a glob or a hub dataset id")


def is_data(file):
    return file.endswith(KINDS)


def of_split(files, split):
    """The files of `split` or `config/split`: by the words of their names and folders."""
    config, _, split = split.rpartition("/")
    inside = [f for f in files if not config or config in os.path.dirname(f).split("/")]
    exact = re.compile(rf"(^|[/_-]){re.escape(split)}([-./]|$)")  # train is not train_sft
    return [f for f in inside if exact.search(f)]


def hub_files(name, split, revision=None):
    """The files of one split of a hub dataset; by default train_prefs, else train.

    Where the hub cannot be reached, those that an earlier run fetched, if they are complete.
    """
    import huggingface_hub

    splits = [split] if split else ["train_prefs", "train"]
    hub, listed = {"repo_type": "dataset", "revision": revision}, []
    try:
        listed = huggingface_hub.HfApi().list_repo_files(name, **hub)
        for wanted in splits:
            if chosen := of_split(list(filter(is_data, listed)), wanted):
                return [huggingface_hub.hf_hub_download(name, f, **hub) for f in chosen]
    except Exception as error:  # the hub client raises some twenty kinds; all mean: not reachable
        if found := cached_files(name, splits, hub):
            print(f"{name}: the hub is out of reach; reading the cached files", file=sys.stderr)
            return found
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--data {name}: not a file, and the hub did not serve it: {reason}"
        ) from error
    files = list(filter(is_data, listed))
    raise UserError(f"--data {name}: no files of split {' or '.join(splits)} among {files[:5]}")


def cached_files(name, splits, hub):
    """A split's files in huggingface_hub's cache, or [] where it is not there or not whole."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(name, local_files_only=True, **hub)
    except Exception:  # nothing of it was ever fetched
        return []
    found = glob.glob("**", root_dir=folder, recursive=True)
    for split in splits:
        chosen = sorted(of_split(list(filter(is_data, found)), split))
        shards = {int(n) for f in chosen for n in re.findall(r"-of-(\d+)", f)}
        if chosen and (not shards or sum(shards) == len(chosen)):
            return [os.path.join(folder, f) for f in chosen]
    return []


# ----------------------------------------------------------------------------- records


def records(file, bad=None):
    """Yield ("file:row", record) for jsonl, jsonl.gz, json and parquet; rows count from 1.

    bad(where) hears of lines that are no JSON, if given; else they raise. UserError, with the row
    where there is one, for a file that is damaged or cut short.
    """
    where = file
    try:
        for where, record in _records(file, bad):
            yield where, record
    except (OSError, EOFError, zlib.error) as error:
        place = file if where == file else f"{where} and beyond"
        raise UserError(f"{place}: not readable: {error}") from error


def _records(file, bad):
    if file.endswith(".parquet"):
        rows = _parquet(file)
    elif file.endswith((".json", ".json.gz")):
        rows = _json(file)
    else:
        yield from _lines(file, bad)
        return
    yield from ((f"{file}:{n}", row) for n, row in enumerate(rows, 1))


def _parquet(file):
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: not readable as parquet: {reason}") from error


def _json(file):
    """A list of records; or records line by line under a .json name, as SHP is published."""
    with _open(file) as f:
        text = _text(f.read(), file)
    first = text.lstrip().partition("\n")[0].strip()
    if first.startswith("{") and first.endswith("}"):
        lines = enumerate(text.split("\n"), 1)
        rows = [parse_json(line, f"{file}:{n}") for n, line in lines if line.strip()]
        if len(rows) > 1:
            return rows
    rows = parse_json(text, file)
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a list of records, found {type(rows).__name__}")
    return rows


def _lines(file, bad):
    with _open(file) as f:
        for n, line in enumerate(f, 1):
            if line.strip():
                where = f"{file}:{n}"
                try:
                    record = parse_json(_text(line, where), where)
                except UserError:
                    if bad is None:
                        raise
                    bad(where)
                else:
                    yield where, record


def _open(file):
    return (gzip.open if file.endswith(".gz") else open)(file, "rb")


def _text(raw, where):
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not readable: {error}") from error
