"""Reads preference pairs: --data -> local files -> records -> pairs, whatever the kind of file.

    --data SOURCE[@WEIGHT][,SOURCE[@WEIGHT]...]

A source is a file, a glob, a folder, or a hub dataset id; behind the latter two `:split` or
`:config/split`. A weight is how often each pair is taken: 2 takes all pairs twice, 0.25 a random
quarter. Hub files come through huggingface_hub's cache, offline once fetched. What gives no pair is
counted, by reason; what columns mean is layouts.py's. docs/data.md.
"""

import contextlib
import csv
import functools
import glob
import gzip
import io
import itertools
import lzma
import os
import re
import sys
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import huggingface_hub
import numpy as np
from fsspec.utils import glob_translate

from jobs.cli import UserError
from jobs.files import parse_json, read_json
from pairs.columns import account, squeezed
from pairs.layouts import TABLES, Dropped, make_pair, one_pair, recognise
from pairs.messages import all_said

KINDS = r"\.(parquet|arrow|(jsonl|ndjson|json|csv|tsv)(\.(gz|xz|zst))?)"
ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # no records
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DEFAULT_SPLITS = ("train_prefs", "train")
NAMES_A_SPLIT = re.compile(r"(^|[/_-])(train|test|validation|valid|val|dev|eval)([-_./]|$)")
HOLD_OUT = 2**32 - 1  # the seed's stream for the hold-out, apart from those of the epochs


class Drops:
    """Counts records that gave no pair: {rule: ["file:row", …]}, and how many were `read`.

    After read_pairs: read = kept + dropped, always; the copies that a weight makes count once.
    unread: {columns that hold text and were not read}; rendered: places of rows whose texts hold
    control tokens of a chat template.
    """

    def __init__(self, rules=(), read=0, unread=(), rendered=()):
        self.rules, self.read = defaultdict(list, rules), read
        self.unread, self.rendered = dict(unread), list(rendered)

    def add(self, rule, where):
        self.rules[rule].append(where)

    def sift(self, pairs, reasons):
        """The pairs whose reason is None; the others are added by theirs."""
        told = zip(pairs, reasons, strict=True)  # `add` gives None
        return [pair for pair, why in told if why is None or self.add(why, pair.where)]

    @property
    def total(self):
        return sum(map(len, self.rules.values()))

    def __str__(self):
        few = {rule: ", ".join([*w[:2], "…"][: len(w)]) for rule, w in self.rules.items()}
        return "; ".join(f"{len(self.rules[rule])} {rule} ({few[rule]})" for rule in few) or "none"


def read_pairs(source, drops=None, limit=None, need_rejected=True, bad_rows="stop", revision=None,
               ignore=None):  # fmt: skip
    """Reads all pairs of the sources in `source` (grammar above) -> list of Pair.

    limit: stop after that many. need_rejected: False takes rows without a rejected answer too, for
    supervised training. bad_rows: a row that is broken or of no known layout raises UserError
    ("stop") or is counted in `drops` ("drop"). revision: branch, tag or commit of hub datasets.
    ignore: names of columns, with commas, that are taken for absent. UserError for a missing or
    damaged file, and where no pair is left.
    """
    pairs, drops = [], Drops() if drops is None else drops
    ignored = frozenset(filter(None, (ignore or "").split(",")))
    for files, weight in parse_sources(source, revision):
        rest = sys.maxsize if limit is None else max(0, limit - len(pairs))
        found = pairs_of(files, rest, drops, need_rejected, bad_rows, ignored)
        pairs += weighted(found, weight, drops)
    if not pairs:
        raise UserError(f"{source}: no usable pairs; dropped: {drops}")
    if drops.unread:
        say_once(f"{source}: columns that were not read: {', '.join(drops.unread)}")
    if drops.rendered:
        fault = f"{source}: {len(drops.rendered)} pairs hold control tokens of a chat template"
        say_once(f"{fault} ({drops.rendered[0]}, …); they are read as text: give messages instead")
    return pairs[:limit]


def pairs_of(files, limit, drops, need_rejected, bad_rows, ignored=frozenset()):
    """The pairs of these files, at most `limit` of them; no row is read beyond those.

    Layouts whose pairs depend on other rows come last, in one piece.
    """
    pairs, gathered = [], defaultdict(list)  # gathered: gather -> what `read` gave

    @contextlib.contextmanager
    def counted(where):
        """Counts a row that gives no pair."""
        try:
            yield
        except Dropped as reason:
            drops.add(str(reason), where)
        except (UserError, RecursionError) as error:
            if bad_rows == "stop" and isinstance(error, UserError):
                raise
            if bad_rows == "stop":
                raise UserError(f"{where}: nested too deeply; mend or delete the row") from error
            drops.add("broken row", where)

    rows = (row for file in files for row in records(file, broken=True))
    while len(pairs) < limit and (row := next(rows, None)):
        drops.read += 1
        where, record = row
        with counted(where):
            if isinstance(record, UserError):  # a line that is no JSON
                raise record
            if ignored and isinstance(record, dict):
                record = {column: v for column, v in record.items() if column not in ignored}
            name, read, gather = recognise(record, where, need_rejected)
            if gather:
                drops.unread |= dict.fromkeys(account(record, TABLES[name][0], (), where))
                gathered[gather].append(read(record, where))
            else:
                pairs.append(one_pair(read, record, where, drops, need_rejected, ties=False))
    for gather, group in gathered.items():
        for raw in gather(group, drops):
            with counted(raw.where):
                pairs.append(make_pair(raw, need_rejected, ties=False))
    for pair in pairs[limit:]:
        drops.add("beyond --limit", pair.where)
    return pairs[:limit]


def weighted(pairs, weight, drops):
    """Takes each pair `weight` times: whole parts repeat all, the fraction adds a random share."""
    whole, share = divmod(weight, 1)
    order = np.random.default_rng((0, len(pairs))).permutation(len(pairs)).tolist()
    drawn = set(order[: round(share * len(pairs))])
    if whole:
        return pairs * int(whole) + [pairs[i] for i in sorted(drawn)]
    places = range(len(pairs))
    return drops.sift(pairs, (None if i in drawn else "left out by the weight" for i in places))


def asked_of(pair):
    """What tells prompts apart: who says what, up to case and white space."""
    return tuple((m["role"], squeezed(all_said(m)).casefold()) for m in pair.prompt)


def hold_out(pairs, n, seed):
    """Splits off about n random pairs for validation, by whole prompts -> (train, held out).

    All pairs of a prompt fall on one side, and so do the copies that a weight made. Prompts are
    taken in random order as long as that comes nearer to n.
    """
    places = list(dict.fromkeys(pair.where for pair in pairs))
    if n >= len(places):
        raise UserError(f"--eval_pairs {n} leaves nothing of {len(places)} pairs to train on")
    groups = defaultdict(dict)  # prompt -> {place: pair}
    for pair in pairs:
        groups[asked_of(pair)].setdefault(pair.where, pair)
    order, held = [*groups.values()], {}
    for i in np.random.default_rng((seed, HOLD_OUT)).permutation(len(order)).tolist():
        if abs(len(held) + len(order[i]) - n) < abs(len(held) - n) and len(order) > 1:
            held |= order[i]
    least = min(order, key=len)
    if n and not held and 2 * len(least) <= len(places):  # no prompt has few enough
        held = least
    return [p for p in pairs if p.where not in held], [held[w] for w in places if w in held]


def told_of_held(train, held, source, drops):
    """One line on the validation pairs, and how many of them ask what a training pair asks."""
    known = set(map(asked_of, train))
    shared = sum(asked_of(pair) in known for pair in held)
    told = f"validation: {len(held)} pairs of {source}, dropped: {drops}"
    return f"{told}; prompt trained on too: {shared}"


def parse_sources(text, revision=None):
    """The value of --data -> list of (local paths, copies of each pair)."""
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
    try:
        if os.path.isdir(name):
            found, configs = folder_files(name), configs_of(os.path.join(name, "README.md"))
            if splits := read_json(Path(name, "dataset_dict.json")).get("splits"):  # save_to_disk
                parts = [{"split": part, "path": f"{part}/*"} for part in splits]
                configs = configs or {"default": {"data_files": parts}}
            if chosen := of_split(found, split, configs):
                return [os.path.join(name, f) for f in chosen]
            advice += f" (the folder holds {missing(split, found)})"
        elif HUB_ID.fullmatch(name) and not re.search(f"{KINDS}$|\\.gz$", name):
            return hub_files(name, split, revision)
    except UserError as error:
        advice = error
    raise UserError(f"--data {source}: {advice}")


def is_data(file):
    name = os.path.basename(file)  # a cache is what datasets' map left in a folder
    return bool(re.search(f"{KINDS}$", name)) and name not in ABOUT and name[:6] != "cache-"


def folder_files(folder):
    """Data files in a local folder and up to two below it, as hub datasets have them, relative."""
    found = [f for depth in ("*", "*/*", "*/*/*") for f in glob.glob(depth, root_dir=folder)]
    return [f for f in found if is_data(f) and os.path.isfile(os.path.join(folder, f))]


def configs_of(card):
    """The configurations that a dataset's card declares -> {name: its entry}, {} without any."""
    try:
        told = (huggingface_hub.metadata_load(card) or {}) if os.path.isfile(card) else {}
    except Exception as error:  # of the YAML reader, or not UTF-8
        raise UserError(f"{card}: its front matter is not readable: {error!r:.80}") from error
    found = [c for c in told.get("configs") or () if isinstance(c, dict) and "config_name" in c]
    return {str(config["config_name"]): config for config in found}


def declared(files, split, configs):
    """The files of `split`, `config` or `config/split` as the card's `configs` declare them."""
    config, _, split = (f"{split}/" if split in configs else split).rpartition("/")
    if not config:
        default = [name for name, c in configs.items() if c.get("default") or name == "default"]
        config = default[0] if default else next(iter(configs)) if len(configs) == 1 else ""
    if config not in configs:
        told = f"its card declares the configurations {', '.join(configs)}"
        raise UserError(f"{told}; name one behind a colon, as :CONFIG or :CONFIG/SPLIT")
    folder, parts = configs[config].get("data_dir"), configs[config].get("data_files")
    if not parts:
        inside = [f for f in files if not folder or f.startswith(f"{folder}/")]
        return of_split(inside, split)
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        parts = [{"split": "train", "path": parts}]  # as datasets takes patterns without a split
    paths = {str(part.get("split")): part.get("path") for part in parts}
    chosen = split or next((name for name in DEFAULT_SPLITS if name in paths), None)
    if chosen not in paths:
        fault = f"its card declares no split {chosen or 'train'} of {config}"
        raise UserError(f"{fault}, but {', '.join(paths)}; name one, as :{config}/{[*paths][0]}")
    patterns = [paths[chosen]] if isinstance(paths[chosen], str) else paths[chosen]
    patterns = [os.path.normpath(os.path.join(folder or "", pattern)) for pattern in patterns]
    patterns = [*map(glob_translate, patterns)]
    return [f for f in files if any(re.match(pattern, f) for pattern in patterns)]


def of_split(files, split="", configs=None):
    """The data files of `split` or `config/split`, as the card declares them, sorted.

    Without a card that does, by the words of their names and folders. Without a split: those of
    train_prefs, else of train, else all, if no name tells a split.
    """
    files = sorted(filter(is_data, files))
    if configs:
        return declared(files, split, configs)
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
    hub = {"repo_type": "dataset", "revision": revision}
    try:
        listed = huggingface_hub.HfApi().list_repo_files(name, **hub)
        fetch = functools.partial(huggingface_hub.hf_hub_download, name, **hub)
        card = fetch("README.md") if "README.md" in listed else ""
        if chosen := of_split(listed, split, configs_of(card)):
            return [fetch(f) for f in chosen]
    except UserError:
        raise
    except Exception as error:  # the hub client raises some twenty kinds; all mean: not reachable
        if found := cached_files(name, split, hub):
            names = ", ".join(map(os.path.basename, found))
            say_once(f"{name}: the hub is out of reach; reading what is cached: {names}")
            return found
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fault = "not a file, and the hub did not serve it"
        raise UserError(f"{fault}: {reason}") from error
    raise UserError(missing(split, filter(is_data, listed)))


def missing(split, files):
    return f"no files of split {split or ' or '.join(DEFAULT_SPLITS)} among {sorted(files)[:5]}"


@functools.cache
def say_once(line):
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def cached_files(name, split, hub):
    """A split's files in huggingface_hub's cache, or [] where it is not there or lacks a shard."""
    try:
        folder = huggingface_hub.snapshot_download(name, local_files_only=True, **hub)
    except Exception:  # nothing of it was ever fetched
        return []
    found = of_split(folder_files(folder), split, configs_of(os.path.join(folder, "README.md")))
    present = Counter(shard for f in found for shard in re.findall(r"^(.*)-\d+-of-(\d+)", f))
    whole = all(n == int(total) for (_, total), n in present.items())
    return [os.path.join(folder, f) for f in found] if whole else []


def records(file, broken=False):
    """Yields ("file:row", record) of a file of any of the KINDS; rows count from 1.

    broken: for a line that is no JSON yield the UserError in the record's place, which else is
    raised. UserError, with the row where there is one, for a file that is damaged or cut short:
    what follows is not known.
    """
    n = 0
    try:
        for n, row in enumerate(_rows(file), 1):
            where = f"{file}:{n}"
            try:
                if isinstance(row, UserError):
                    raise row
                if not isinstance(row, bytes):
                    yield where, row
                elif row.strip():
                    yield where, _parse(row, where)
            except UserError as error:
                if not broken:
                    raise
                yield where, error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error) as error:
        place, kind = f"{file}:{n + 1}" if n else file, file.endswith(".parquet") * " as parquet"
        reason = " ".join(str(error).split())
        raise UserError(f"{place}: not readable{kind}: {reason}; fetch the file again") from error


def _rows(file):
    """Yields the records of a file, or in their place the bytes of its lines."""
    if file.endswith((".parquet", ".arrow")):
        import pyarrow.parquet

        try:
            if file.endswith(".arrow"):  # a stream, as datasets' save_to_disk writes it, or a file
                with open(file, "rb") as f:
                    whole, ipc = f.read(6) == b"ARROW1", pyarrow.ipc
                batches = (
                    ipc.open_file(file).read_all().to_batches() if whole else ipc.open_stream(file)
                )
            else:
                table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
                batches = table.iter_batches(1024)
            for batch in batches:
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            raise OSError(str(error)) from error
        return
    kind = re.search(f"{KINDS}$|$", file)[2]
    with _opened(file) as f:
        if kind == "json":
            two = list(itertools.islice(filter(None, map(bytes.strip, f)), 2))
        elif kind and kind.endswith("sv"):
            text = io.TextIOWrapper(f, encoding="utf-8-sig", newline="")
            yield from csv_records(text, file, "\t" if kind == "tsv" else ",")
            return
        else:
            yield from f
            return
    with _opened(file) as f:
        # SHP's and UltraFeedback's .json hold a record per line
        if len(two) == 2 and re.fullmatch(rb"(\xef\xbb\xbf)?\{.*\}", two[0]):
            yield from f
            return
        content = _parse(f.read(), file)
    content = [content] if isinstance(content, dict) else content
    if not isinstance(content, list):
        kind = type(content).__name__
        raise UserError(f"{file}: expected a list of records, found {kind}")
    yield from content


def _opened(file):
    """The bytes of a file, unpacked by the ending of its name."""
    if file.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))
    return {".gz": gzip.open, ".xz": lzma.open}.get(os.path.splitext(file)[1], open)(file, "rb")


def csv_records(text, where, delimiter=","):
    """Yields {column: text or None} of a csv with a header; in a broken row's place a UserError."""
    csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        if twice := [c for c, n in Counter(reader.fieldnames or ()).items() if n > 1]:
            raise UserError(f"{where}: two columns are called {twice[0]!r}; rename or delete one")
        for n, row in enumerate(reader, 1):
            if None in row or None in row.values():
                yield UserError(f"{where}:{n}: not as many fields as the header has; mend the row")
            else:
                yield {column: value or None for column, value in row.items()}
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not readable: {error}") from error


def _parse(raw, where):
    try:
        return parse_json(raw.decode("utf-8").removeprefix("\ufeff"), where)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not readable: {error}") from error
