"""The token cache: pairs are read, cleaned and tokenised once, and then mapped from disk.

A folder per combination of data (by content), tokenizer, template, limits and rules, under
`$NANOPO_TOKENS`, by default `~/.cache/nanopo/tokens`. Rank 0 prepares it, all ranks map the same
files, so that N processes on a machine hold the tokens once.

    KEY/meta.json                     the report lines, and per set: where, cuts, drops
    KEY/{train,validation}.{ids,starts,lengths,closed}.npy
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from data import Examples
from pairs import Drops

VERSION = 1  # of this layout and of what decides the tokens; raise it when either changes


def folder():
    """Where caches lie."""
    root = os.environ.get("NANOPO_CACHE") or "~/.cache/nanopo"
    return Path(os.environ.get("NANOPO_TOKENS") or Path(root) / "tokens").expanduser()


def key_of(files, template, choices):
    """Digest of the data files' content, the tokenizer and template, and a dict of choices."""
    sha = hashlib.sha256(json.dumps([VERSION, choices], sort_keys=True, default=str).encode())
    for file in [*files, template.directory / "tokenizer.json"]:
        with open(file, "rb") as f:
            sha.update(str(file).encode() + hashlib.file_digest(f, "sha256").digest())
    sha.update(json.dumps([template.source, template.special]).encode())
    return sha.hexdigest()[:32]


def write(key, datasets, lines):
    """{name: Dataset} and report lines -> KEY/, written aside and renamed when whole."""
    folder().mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder()))
    meta = {"lines": lines, "sets": {}}
    for name, dataset in datasets.items():
        examples = dataset.examples
        for array in Examples.ARRAYS:
            np.save(aside / f"{name}.{array}.npy", getattr(examples, array))
        drops = {"rules": dataset.drops.rules, "read": dataset.drops.read}
        meta["sets"][name] = {"where": examples.where, "cuts": dataset.cuts, "drops": drops}
    (aside / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    try:
        aside.rename(folder() / key)
    except OSError:  # another run was faster; what it wrote is the same
        shutil.rmtree(aside)


def read(key):
    """({name: (Examples, Drops, cuts)}, lines), the arrays mapped; None where there is no cache."""
    place = folder() / key
    try:
        meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
        stored = {name: _stored(place, name, entry) for name, entry in meta["sets"].items()}
    except (OSError, ValueError, KeyError):  # none, or damaged: prepared again
        return None
    return stored, meta["lines"]


def _stored(place, name, entry):
    arrays = [np.load(place / f"{name}.{a}.npy", mmap_mode="r") for a in Examples.ARRAYS]
    drops = Drops()
    drops.rules |= entry["drops"]["rules"]
    drops.read = entry["drops"]["read"]
    return Examples(*arrays, entry["where"]), drops, defaultdict(int, entry["cuts"])
