"""A revision reaches the hub, whatever command names it. A stand-in notes what is asked for."""

import json
import signal
import sys

import huggingface_hub
import pytest
from runs import argv, train_here

import evaluate
import generate
import train
from conftest import PAIRS
from hub.weights import pinned
from jobs.cli import UserError, run
from train import TrainFlags

FAST = ["--dtype", "fp32", "--device", "cpu", "--limit", "8"]


@pytest.fixture
def hub(monkeypatch, tiny_model_dir, tmp_path):
    """Serves every model id and every dataset id; returns the set of (id, revision) asked for."""
    asked = set()

    def snapshot(name, allow_patterns, revision):
        asked.add((name, revision))
        return str(tiny_model_dir)

    def listed(self, name, repo_type, revision):
        asked.add((name, revision))
        return ["train.jsonl", "test.jsonl"]

    def download(name, file, repo_type, revision):
        asked.add((name, revision))
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def call(command, *words):
    """A command in this process, which must end well."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command.__name__, *map(str, words)])
        run(command.main)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_train_pins_model_and_data_and_what_names_the_same_ids(hub, tmp_path):
    ids = {"model": "lab/tiny", "revision": "v1", "ref_model": "lab/tiny"}
    ids |= {"data": "lab/pairs:train", "data_revision": "abc", "eval_data": "lab/pairs:test"}
    flags = {"loss": "dpo", "steps": 1, "batch": 2, "limit": 8, "max_len": 256, "eval_pairs": 2}
    call(train, *argv(ids | flags | {"out": tmp_path / "out"}))
    assert hub == {("lab/tiny", "v1"), ("lab/pairs", "abc")}
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["settings"]
    assert settings["model"] == settings["ref_model"] == "lab/tiny@v1"


def test_other_ids_have_revisions_of_their_own(hub, tmp_path):
    ids = {"model": "lab/tiny@v1", "ref_model": "lab/start@refs/pr/2"}
    ids |= {"data": "lab/pairs", "data_revision": "abc"}
    ids |= {"eval_data": "other/pairs:test", "eval_revision": "def"}
    flags = {"loss": "dpo", "steps": 1, "batch": 2, "limit": 8, "max_len": 256, "eval_pairs": 2}
    train_here(ids | flags | {"out": tmp_path / "out"})
    models = {("lab/tiny", "v1"), ("lab/start", "refs/pr/2")}
    assert hub == models | {("lab/pairs", "abc"), ("other/pairs", "def")}


def test_generate_pins_its_model_and_its_rows_say_so(hub, pairs_file, tmp_path):
    out = tmp_path / "answers.jsonl"
    words = ["--model", "lab/tiny", "--revision", "v1", "--max_new_tokens", 2, "--out", out]
    call(generate, *words, *FAST, "--data", pairs_file)
    assert hub == {("lab/tiny", "v1")}
    assert {json.loads(line)["model"] for line in out.open()} == {"lab/tiny@v1"}


@pytest.mark.parametrize("command", ["pairs", "context", "next_token", "attention"])
def test_the_evaluations_pin_their_model_and_its_reference(command, hub, pairs_file):
    ref = ["--ref", "lab/tiny"] if command in ("pairs", "attention") else []
    words = ["--model", "lab/tiny", "--revision", "v1", "--data", pairs_file]
    call(evaluate, command, *words, *ref, *FAST)
    assert hub == {("lab/tiny", "v1")}


def test_reward_models_and_judges_are_pinned(hub, tmp_path, pairs_file, monkeypatch):
    asked = ["--model", "lab/tiny", "--revision", "v1"]
    answers = tmp_path / "answers.jsonl"
    rows = ({"prompt": row["prompt"], "answer": row["chosen"]} for row in PAIRS)
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = ["--answers", answers, "--against", answers, "--max_new_tokens", 1, "--limit", 2]
    with pytest.raises(SystemExit):  # one token is no verdict: it is told after asking
        call(evaluate, "judge", *asked, *judge, "--out", tmp_path / "verdicts.json")
    assert hub == {("lab/tiny", "v1")}
    hub.clear()
    with pytest.raises(SystemExit):  # the stand-in serves no reward model: it is told after loading
        call(evaluate, "reward", *asked, "--pairs", pairs_file, *FAST)
    assert hub == {("lab/tiny", "v1")}


def test_a_revision_of_what_is_no_hub_id_is_refused(tiny_model_dir):
    for source in (str(tiny_model_dir), None, "nowhere"):
        with pytest.raises(UserError, match=f"--revision v1: --model {source} is no hub id"):
            pinned(TrainFlags(model=source, revision="v1"))
    with pytest.raises(UserError, match="--revision v1: --model lab/gpt"):
        pinned(
            generate.GenerateFlags(model="lab/gpt", revision="v1", endpoint="http://127.0.0.1:1/v1")
        )
