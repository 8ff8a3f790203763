"""Where data lies: `--data` -> local files -> records, whatever the kind of file.

    --data SOURCE[@WEIGHT][,SOURCE[@WEIGHT]...]

A source is a file, a glob, a folder, or a hub dataset id; behind the latter two `:split` or
`:config/split`. A weight is how often each pair is taken: 2 takes all pairs twice, 0.25 a random
quarter. Hub files come through huggingface_hub's cache, offline once fetched. docs/data.md.
"""

import functools
import glob
import gzip
import itertools
import os
import re
import sys
import zlib
from collections import Counter

from jobs.cli import UserError
from jobs.files import parse_json

KINDS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # no records
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DEFAULT_SPLITS = ("train_prefs", "train")
NAMES_A_SPLIT = re.compile(r"(^|[/_-])(train|test|validation|valid|val|dev|eval)([-_./]|$)")


def parse_sources(text, revision=None):
    """The value of --data -> list of (local paths, copies of each pair).

    revision: branch, tag or commit on the hub.
    """
    sources = []
    for part in [text] if os.path.exists(text) else text.split(","):
        name, at, weight = part.rpartition("@")
        if not at or os.path.exists(part):  # a file name may hold a comma or an @
            name, weight = part, "1"
        if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) or float(weight) == 0:
            raise UserError(f"--data {part}: the weight behind @ must be a number above 0")
        sources.append((data_files(name, revision), float(weight)))
    return sources


def data_files(source, revision=None):
    """Local path, glob, folder or hub dataset id, with or without split -> list of local files."""
    if os.path.isfile(source):
        return [source]
    if found := sorted(filter(os.path.isfile, glob.glob(source))):
        return found
    name, _, split = source.partition(":")
    advice = "no such file; give a path, a glob or a hub dataset id"
    if os.path.isdir(name):
        found = folder_files(name)
        if chosen := of_split(found, split):
            return [os.path.join(name, f) for f in chosen]
        advice += f" (the folder holds {missing(split, found)})"
    elif HUB_ID.fullmatch(name) and not is_data(name) and not name.endswith(".gz"):
        return hub_files(name, split, revision)
    raise UserError(f"--data {source}: {advice}")


def is_data(file):
    return file.endswith(KINDS) and os.path.basename(file) not in ABOUT


def folder_files(folder):
    """Data files in a local folder and up to two below it, as hub datasets have them, relative."""
    found = [f for depth in ("*", "*/*", "*/*/*") for f in glob.glob(depth, root_dir=folder)]
    return [f for f in found if is_data(f) and os.path.isfile(os.path.join(folder, f))]


def of_split(files, split=""):
    """The data files of `split` or `config/split`, by the words of their names and folders, sorted.

    Without a split: those of train_prefs, else of train, else all, if no name tells a split.
    """
    files = sorted(filter(is_data, files))
    if not split:
        named = (of_split(files, default) for default in DEFAULT_SPLITS)
        return next(filter(None, named), [] if any(map(NAMES_A_SPLIT.search, files)) else files)
    config, _, split = split.rpartition("/")
    inside = [f for f in files if not config or config in os.path.dirname(f).split("/")]
    exact = re.compile(rf"(^|[/_-]){re.escape(split)}([-./]|$)")  # train is not train_sft
    return [f for f in inside if exact.search(f)]


def hub_files(name, split, revision=None):
    """The files of one split of a hub dataset, through huggingface_hub's cache.

    Where the hub cannot be reached, those that an earlier run fetched, if they are complete.
    """
    import huggingface_hub

    hub = {"repo_type": "dataset", "revision": revision}
    try:
        listed = huggingface_hub.HfApi().list_repo_files(name, **hub)
        if chosen := of_split(listed, split):
            return [huggingface_hub.hf_hub_download(name, f, **hub) for f in chosen]
    except Exception as error:  # the hub client raises some twenty kinds; all mean: not reachable
        if found := cached_files(name, split, hub):
            names = ", ".join(map(os.path.basename, found))
            say_once(f"{name}: the hub is out of reach; reading what is cached: {names}")
            return found
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fault = "not a file, and the hub did not serve it"
        raise UserError(f"--data {name}: {fault}: {reason}") from error
    raise UserError(f"--data {name}: {missing(split, filter(is_data, listed))}")


def missing(split, files):
    return f"no files of split {split or ' or '.join(DEFAULT_SPLITS)} among {sorted(files)[:5]}"


@functools.cache
def say_once(line):
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def cached_files(name, split, hub):
    """A split's files in huggingface_hub's cache, or [] where it is not there or lacks a shard."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(name, local_files_only=True, **hub)
    except Exception:  # nothing of it was ever fetched
        return []
    found = of_split(folder_files(folder), split)
    shards = [re.match(r"(.*)-\d+-of-(\d+)", f) for f in found]
    present = Counter(shard.groups() for shard in shards if shard)
    whole = all(n == int(total) for (_, total), n in present.items())
    return [os.path.join(folder, f) for f in found] if whole else []


def records(file, broken=False):
    """Yields ("file:row", record) for jsonl, jsonl.gz, json and parquet; rows count from 1.

    broken: for a line that is no JSON yield the UserError in the record's place, which else is
    raised. UserError, with the row where there is one, for a file that is damaged or cut short:
    what follows is not known.
    """
    n = 0
    try:
        for n, row in enumerate(_rows(file), 1):
            where = f"{file}:{n}"
            if isinstance(row, bytes):
                if not row.strip():
                    continue
                try:
                    row = _parse(row, where)
                except UserError as error:
                    if not broken:
                        raise
                    row = error
            yield where, row
    except (OSError, EOFError, zlib.error) as error:
        place, kind = f"{file}:{n + 1}" if n else file, file.endswith(".parquet") * " as parquet"
        reason = " ".join(str(error).split())
        raise UserError(f"{place}: not readable{kind}: {reason}; fetch the file again") from error


def _rows(file):
    """Yields the records of a file, or in their place the bytes of its lines."""
    if file.endswith(".parquet"):
        yield from _parquet(file)
        return
    with (gzip.open if file.endswith(".gz") else open)(file, "rb") as f:
        content = f
        if file.endswith((".json", ".json.gz")):
            two = list(itertools.islice(filter(None, map(bytes.strip, f)), 2))
            f.seek(0)
            # SHP's and UltraFeedback's .json hold a record per line
            if len(two) < 2 or not re.fullmatch(rb"(\xef\xbb\xbf)?\{.*\}", two[0]):
                content = _parse(f.read(), file)
                if not isinstance(content, list):
                    kind = type(content).__name__
                    raise UserError(f"{file}: expected a list of records, found {kind}")
        yield from content


def _parquet(file):
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        for batch in table.iter_batches(1024):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise OSError(str(error)) from error


def _parse(raw, where):
    try:
        return parse_json(raw.decode("utf-8").removeprefix("\ufeff"), where)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not readable: {error}") from error
