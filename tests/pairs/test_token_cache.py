"""The token cache: the same datasets, made once, and no run depends on it."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from conftest import PAIRS, write_model
from families.llama_guard import Guard
from hub.template import Template
from jobs.cli import parse
from losses import recipe
from pairs import token_cache
from train import TrainFlags, load_data, read_and_tokenise

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty token cache."""
    monkeypatch.setenv("NANOPO_CACHE", str(tmp_path))
    return tmp_path / "tokens"


@pytest.fixture
def made(monkeypatch):
    """A list that grows by one with every tokenisation."""
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return read_and_tokenise(*args, **options)

    monkeypatch.setattr(train, "read_and_tokenise", counted)
    return calls


@pytest.fixture
def start(tiny_model_dir, pairs_file, cache):
    """start(flag=value, …) -> (datasets, lines) as a run of train.py would get them."""

    def start(loss="ins_dpo", model=tiny_model_dir, **flags):
        words = {"model": model, "data": pairs_file, "max_len": 200, "loss": loss} | flags
        s = parse(TrainFlags, "", [w for k, v in words.items() for w in (f"--{k}", str(v))])
        sets, lines = load_data(s, Template(model), recipe(loss))
        return sets, lines

    return start


def same(a, b):
    """Whether two {name: Dataset} are equal bit for bit, in all that a run reads of them."""
    return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)


def _equal(a, b):
    arrays = ("ids", "starts", "lengths", "closed")
    pairs = [(getattr(a.examples, name), getattr(b.examples, name)) for name in arrays]
    told = [(d.examples.where, d.cuts, d.drops.rules, d.drops.read, d.report()) for d in (a, b)]
    paths = [[d.path(i, p) for p in d.recipe.paths for i in range(len(d))] for d in (a, b)]
    segments = [[[s.tolist() for s in path] + [n] for path, n in found] for found in paths]
    equal = all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)
    return equal and told[0] == told[1] and segments[0] == segments[1]


def replace(file, content):
    """Other content under this name; what is mapped keeps the old one."""
    file.unlink()
    file.write_bytes(content)


# ----------------------------------------------------------------------------- once


@pytest.mark.parametrize("loss", ["dpo", "ins_dpo", "ifsr_dpo", "sft", "kto"])
@pytest.mark.parametrize("cut", [False, True])
def test_mapped_datasets_equal_fresh_ones(loss, cut, start, made, tmp_path):
    max_len = (120 if loss == "ifsr_dpo" else 60) if cut else 200
    sets, lines = start(loss, max_len=max_len)
    again, lines_again = start(loss, max_len=max_len)
    os.environ["NANOPO_CACHE"] = str(tmp_path / "other")
    fresh, lines_fresh = start(loss, max_len=max_len)
    assert len(made) == 2 and lines[:-1] == lines_again == lines_fresh[:-1]
    assert same(sets, again) and same(again, fresh)
    assert all(isinstance(d.examples.ids.base, np.memmap) for d in again.values())
    assert any(d.cuts for d in sets.values()) is cut


PROGRAM = """
import hashlib, json, os, sys
import train
from jobs.cli import parse
from losses import recipe
from jobs.processes import Ranks
from train import TrainFlags
from hub.template import Template

def tell(*words):  # in one piece: print's would mix with those of the other rank
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

build = train.read_and_tokenise
def told(*args, **options):
    tell("tokenised by", os.environ["RANK"])
    return build(*args, **options)
train.read_and_tokenise = told
with Ranks("cpu") as ranks:
    s = parse(TrainFlags, "", sys.argv[1:])
    sets, lines = train.load_data(s, Template(s.model), recipe(s.loss), ranks)
    ids = [d.examples[i].chosen.tobytes() for d in sets.values() for i in range(len(d))]
    tell("digest", hashlib.sha256(b"".join(ids)).hexdigest(), len(sets["validation"]))
    if ranks.first:
        tell(lines[-1])
"""


@pytest.mark.parametrize("writable", [True, False])
def test_all_ranks_share_one_tokenisation(writable, tiny_model_dir, pairs_file, tmp_path):
    """Two processes; where the cache cannot be written each tokenises, to the same datasets."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "a_file").write_text("")
    place = tmp_path / ("cache" if writable else "a_file")
    env = {"NANOPO_CACHE": str(place), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += [str(tmp_path / "program.py"), "--model", str(tiny_model_dir), "--max_len", "200"]
    words += ["--data", str(pairs_file), "--loss", "dpo"]
    done = subprocess.run(words, env=os.environ | env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    by = sorted(line[-1] for line in told if line.startswith("tokenised by"))
    digests = [line for line in told if line.startswith("digest")]
    assert by == (["0"] if writable else ["0", "1"])
    assert len(digests) == 2 and len(set(digests)) == 1
    assert writable == (not any("no token cache in" in line for line in told))


# ----------------------------------------------------------------------------- what the key covers


def test_whatever_decides_the_tokens_makes_its_own_cache(start, made, tmp_path, cache):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in PAIRS[:-1]))
    changes = [{}, {"max_len": 201}, {"draft_cap": 0.5}, {"seed": 1}, {"limit": 20}, {"sep": "#"},
               {"eval_pairs": 3}, {"max_answer": 100}, {"data": other},
               {"loss": "dpo"}, {"loss": "ifsr_dpo"}, {"bad_rows": "drop"}]  # fmt: skip
    for change in changes:
        start(**change)
    assert len(made) == len(list(cache.iterdir())) == len(changes)
    for change in changes:
        start(**change)
    assert len(made) == len(changes)


def test_a_cache_that_is_written_says_where_it_lies_and_how_large_it_is(start, cache):
    (*_, first), (*_, second) = (start(loss=loss)[1] for loss in ("ins_dpo", "ifsr_dpo"))
    places = sorted(cache.iterdir(), key=lambda place: place.stat().st_mtime_ns)
    sizes = [sum(file.stat().st_size for file in place.glob("*.npy")) / 1e6 for place in places]
    told = zip((first, second), places, sizes, np.cumsum(sizes), strict=True)
    for line, place, own, whole in told:
        assert line.startswith(f"token cache: {place}, {own:.1f} MB, of all data {whole:.1f} MB")
    assert start()[1][-1].startswith("validation: ")  # read: nothing to be told


def test_changed_content_of_a_file_is_read_again(start, made, tmp_path):
    file = tmp_path / "pairs.jsonl"
    for rows in (PAIRS, PAIRS[::-1]):  # of the same size
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.utime(file, (0, 0))
        sets, _ = start(data=file, eval_pairs=0)
        assert len(sets["train"]) == len(PAIRS)
    assert len(made) == 2


def test_changed_code_tokenises_anew(start, made, tmp_path, monkeypatch):
    """Whoever edits data.py does not train on what the old one cut."""
    start()
    edited = tmp_path / "code"
    for room in ("pairs", "hub"):
        shutil.copytree(ROOT / room, edited / room)
    text = (ROOT / "data.py").read_text(encoding="utf-8")
    (edited / "data.py").write_text(text + "# edited\n")
    monkeypatch.setattr(token_cache, "__file__", str(edited / "pairs" / "token_cache.py"))
    start()
    assert len(made) == 2


def test_the_guard_counts_by_what_it_is(tmp_path, tiny_model_dir, pairs_file):
    """The same weights elsewhere are the same guard; other weights in the same place are not."""

    def key(guard):
        words = ["--model", str(tiny_model_dir), "--data", str(pairs_file), "--guard", str(guard)]
        s = parse(TrainFlags, "", words)
        return train.data_key(s, Template(tiny_model_dir), recipe("dpo"), Guard(guard))

    first = key(write_model(tmp_path / "guard"))
    assert key(write_model(tmp_path / "moved")) == first
    assert key(write_model(tmp_path / "guard", seed=1)) != first


# ----------------------------------------------------------------------------- what may go wrong


@pytest.mark.parametrize("fault", ["a bit", "cut short", "a file is gone", "meta", "not JSON"])
def test_a_damaged_cache_is_made_again(fault, start, made, cache):
    sets, _ = start()
    (place,) = cache.iterdir()
    ids = place / "train.ids.npy"
    content = ids.read_bytes()
    if fault == "a bit":
        replace(ids, content[:-1] + bytes([content[-1] ^ 1]))
    elif fault == "cut short":
        replace(ids, content[: len(content) // 2])
    elif fault == "a file is gone":
        (place / "train.closed.npy").unlink()
    else:
        (place / "meta.json").write_text("{}" if fault == "meta" else "{")
    again, lines = start()
    assert same(sets, again) and len(made) == 2
    assert lines[-2] == "the token cache was damaged: made again"
    assert same(start()[0], sets) and len(made) == 2  # whole again


def test_a_cache_that_cannot_be_written_is_told_and_not_needed(start, made, monkeypatch, tmp_path):
    sets, lines = start()
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("NANOPO_CACHE", str(tmp_path / "a_file"))
    again, told = start()
    assert same(sets, again) and told[:-1] == lines[:-1]
    assert told[-1] == f"no token cache in {tmp_path}/a_file/tokens: Not a directory"
    assert len(made) == 2


def test_a_full_disk_leaves_nothing_and_stops_nothing(start, cache):
    """Files of at most 2,000 bytes: what the system then says is what a full disk says."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        sets, told = start()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told[-1].startswith(f"no token cache in {cache}: ")
    assert list(cache.iterdir()) == []
    again, _ = start()
    assert same(sets, again)


def test_a_run_that_was_killed_while_writing_is_no_cache(start, made, cache):
    start()
    (place,) = cache.iterdir()
    place.rename(cache / f".{place.name}-killed")
    assert token_cache.read(place) is None
    start()
    assert len(made) == 2
