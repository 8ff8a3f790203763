"""Keeps tokenised pairs on disk, so that they are read, cleaned and tokenised once.

A folder per combination of data (by content), tokenizer, template, settings and the code that
applies them, under `~/.cache/nanopo/tokens` (or `$NANOPO_CACHE/tokens`); delete any of them at any
time. The first process of a run makes it and all processes map the same files, so that N of them on
a machine hold the tokens once.

    KEY/SET.NAME.npy     the arrays of a set of pairs (train, validation)
    KEY/meta.json        facts about each set, report lines, and a checksum of every array file
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import tokenizers

from hub.tokenizer import TOKENIZER_FILES
from jobs.files import checksum, publish


def cache_folder(kind):
    """Where things of this kind ("tokens", "guard") are kept between runs."""
    return Path(os.environ.get("NANOPO_CACHE") or "~/.cache/nanopo").expanduser() / kind


def cache_key(files, template, choices):
    """Digest of the data files' content, the tokenizer and template, a dict of choices, and code.

    Edited code tokenises anew: nobody who forks the project trains on what the old code cut.
    """
    root = Path(__file__).parents[1]
    code = [root / name for name in ("data.py", "hub/template.py", "hub/tokenizer.py")]
    code += sorted((root / "pairs").glob("*.py"))
    files_of_tokens = [template.directory / name for name in TOKENIZER_FILES]
    data = [(str(file), checksum(file)) for file in files]  # rows are told by their file's name
    rest = [checksum(file) for file in (*files_of_tokens, *code) if file.exists()]
    decides = [data, rest, template.source, template.special, template.vocab]
    decides += [str(template.tokenizer.pre_tokenizer), tokenizers.__version__, choices]
    text = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cached(key, make, share=lambda work: work()):
    """Returns what `make` makes, from the cache where it is there -> (sets, lines).

    sets: {name: ({array's name: array}, facts for JSON)}; lines: the report. key() is the folder's
    name. share: as Ranks.share. Where the cache cannot be written, each process makes its own.
    """
    made = []

    def first():
        """(Name of the folder, lines about the cache); what could not be kept stays in `made`."""
        name = key()
        place = cache_folder("tokens") / name
        if read(place):
            return name, []
        notes = ["the token cache was damaged: made again"] * place.exists()
        made.append(make(shown=True))
        try:
            write(place, *made[0])
            sizes = {file: file.stat().st_size / 1e6 for file in place.parent.glob("*/*.npy")}
            own = sum(size for file, size in sizes.items() if file.parent == place)
            told = f"{own:.1f} MB, of all data {sum(sizes.values()):.1f} MB; delete it at any time"
            notes.append(f"token cache: {place}, {told}")
        except OSError as error:
            return name, [f"no token cache in {place.parent}: {error.strerror or error}"]
        made.clear()  # its pages are mapped from now on, and shared
        return name, notes

    name, notes = share(first)
    # the first process has just checked the sums; another machine's disk may not have the folder
    found = None if made else read(cache_folder("tokens") / name, check=False)
    sets, lines = found or (made or [make()])[0]
    return sets, [*lines, *notes]


def write(place, sets, lines):
    """Writes a folder of the cache whole; where it cannot, raises OSError and leaves nothing."""
    place.parent.mkdir(parents=True, exist_ok=True)
    # a folder of its own, as many runs on the same data may start at once
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as folder:
        (aside := Path(folder, "whole")).mkdir()
        for name, (arrays, _) in sets.items():
            for part, array in arrays.items():
                np.save(aside / f"{name}.{part}.npy", array)
        sums = {file.name: checksum(file) for file in aside.iterdir()}
        facts = {name: facts for name, (_, facts) in sets.items()}
        meta = json.dumps({"lines": lines, "sums": sums, "sets": facts})
        (aside / "meta.json").write_text(meta, encoding="utf-8")
        publish(aside, place)


def read(place, check=True):
    """Reads a folder of the cache, its arrays mapped -> (sets, lines); None where it is not whole.

    check: compare the checksums of all files first.
    """
    try:
        meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
        if check and any(checksum(place / name) != s for name, s in meta["sums"].items()):
            return None
        sets = {name: ({}, facts) for name, facts in meta["sets"].items()}
        for file in meta["sums"]:
            name, part, _ = file.split(".")
            array = np.load(place / file, mmap_mode="r")
            sets[name][0][part] = array.view(np.ndarray)  # slices of these are made faster
        return sets, meta["lines"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged
        return None
