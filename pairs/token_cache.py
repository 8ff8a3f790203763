"""The token cache: pairs are read, cleaned and tokenised once, and then mapped from disk.

A folder per combination of data (by content), tokenizer, template, limits, rules and the code that
applies them, under `$NANOPO_TOKENS`, by default `~/.cache/nanopo/tokens`. Rank 0 prepares it, all
ranks map the same files, so that N processes on a machine hold the tokens once. What was not used
for longest goes when all of it is over `$NANOPO_TOKENS_GB`, by default 20.

    KEY/meta.json                     the report lines; checksums; per set: where, cuts, drops
    KEY/{train,validation}.{ids,starts,lengths,closed}.npy
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import tokenizers

from data import Examples
from jobs.cli import UserError
from pairs.read import Drops

GIGABYTES = 20
OWN = re.compile(r"[0-9a-f]{32}|\.[0-9a-f]{32}-.*")  # a whole cache, or one that is being written
CODE = ("data.py", "train.py", "hub/template.py", *(f"pairs/{n}.py" for n in
        ("cleaning", "guard", "layouts", "read", "sources", "token_cache")))  # fmt: skip


def folder():
    """Where caches lie."""
    root = os.environ.get("NANOPO_CACHE") or "~/.cache/nanopo"
    return Path(os.environ.get("NANOPO_TOKENS") or Path(root) / "tokens").expanduser()


def limit():
    """Bytes that all caches together may take. UserError where the variable is no number."""
    text = os.environ.get("NANOPO_TOKENS_GB") or GIGABYTES
    try:
        return float(text) * 1e9
    except ValueError:
        raise UserError(f"NANOPO_TOKENS_GB={text}: expected a number of gigabytes") from None


def key_of(files, template, choices):
    """Digest of the data files' content, the tokenizer and template, a dict of choices, and CODE.

    Edited code tokenises anew: nobody who forks the project trains on what the old code cut.
    """
    code = [Path(__file__).parents[1] / name for name in CODE]
    data = [(str(file), digest(file)) for file in files]  # rows are told by their file's name
    rest = [digest(file) for file in (template.directory / "tokenizer.json", *code)]
    template = template.source, template.special, tokenizers.__version__
    text = json.dumps([data, rest, template, choices], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def digest(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ----------------------------------------------------------------------------- out


def write(key, datasets, lines):
    """{name: Dataset} and report lines -> KEY/, written aside and renamed when whole.

    Raises OSError where the folder cannot be written or the disk is full; nothing is left then.
    """
    folder().mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder()))
    try:
        for name, dataset in datasets.items():
            for array in Examples.ARRAYS:
                np.save(aside / f"{name}.{array}.npy", getattr(dataset.examples, array))
        sets = {name: _described(dataset) for name, dataset in datasets.items()}
        sums = {file.name: digest(file) for file in aside.iterdir()}
        meta = json.dumps({"lines": lines, "sums": sums, "sets": sets})
        (aside / "meta.json").write_text(meta, encoding="utf-8")
        shutil.rmtree(folder() / key, ignore_errors=True)  # a damaged one
        aside.rename(folder() / key)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    trim(keep=key)


def _described(dataset):
    """What a Dataset holds beside its arrays, for JSON."""
    drops = {"rules": dataset.drops.rules, "read": dataset.drops.read}
    return {"where": dataset.examples.where, "cuts": dataset.cuts, "drops": drops}


def trim(keep):
    """Drop the caches that were not used for longest until `limit()` holds; never the one kept."""
    own = [place for place in folder().iterdir() if OWN.fullmatch(place.name)]
    sizes = {place: sum(f.stat().st_size for f in place.iterdir()) for place in own}
    total, allowed = sum(sizes.values()), limit()
    for place in sorted(own, key=lambda place: place.stat().st_mtime):
        if total > allowed and place.name != keep:
            shutil.rmtree(place, ignore_errors=True)
            total -= sizes[place]


# ----------------------------------------------------------------------------- in


def read(key, check=True):
    """({name: (Examples, Drops, cuts)}, lines), the arrays mapped; None without a whole cache.

    check: compare the checksums of all files first.
    """
    place = folder() / key
    try:
        meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
        if check and any(digest(place / name) != s for name, s in meta["sums"].items()):
            return None
        stored = {name: _stored(place, name, entry) for name, entry in meta["sets"].items()}
        lines = meta["lines"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: prepared again
        return None
    with contextlib.suppress(OSError):  # a cache that somebody else made
        os.utime(place)  # used just now
    return stored, lines


def _stored(place, name, entry):
    mapped = (np.load(place / f"{name}.{a}.npy", mmap_mode="r") for a in Examples.ARRAYS)
    arrays = [array.view(np.ndarray) for array in mapped]  # slices of these are made faster
    drops = Drops()
    drops.rules |= entry["drops"]["rules"]
    drops.read = entry["drops"]["read"]
    return Examples(*arrays, entry["where"]), drops, defaultdict(int, entry["cuts"])
