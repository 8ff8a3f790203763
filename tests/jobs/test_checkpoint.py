"""A checkpoint is whole or it is not used, and any number of processes may go on from it."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from runs import argv, final, furthest, lines, losses, torchrun, train_here

import train
from conftest import PAIRS, write_model
from jobs import checkpoint
from jobs.checkpoint import newest, saved
from jobs.cli import UserError, parse
from jobs.processes import Ranks, rows_of_shard
from train import TrainFlags, build_model, resolve_flags


@pytest.fixture(scope="module")
def whole(tiny_model_dir, pairs_file, tmp_path_factory):
    """The flags of a run of 6 steps that kept its checkpoints at 2, 4 and 6."""
    out = tmp_path_factory.mktemp("whole") / "out"
    flags = {"model": tiny_model_dir, "data": pairs_file, "max_len": 256, "batch": 4, "lr": 1e-3}
    flags |= {"loss": "ins_dpo", "steps": 6, "save_every": 2, "eval_every": 2, "keep": 3}
    train_here(flags | {"out": out})
    return flags | {"out": out}


@pytest.fixture
def stopped(whole, tmp_path):
    """The same run as it was when it had saved step 4."""
    flags = whole | {"out": shutil.copytree(whole["out"], tmp_path / "out"), "resume": True}
    for left in ("final", "best", "checkpoints/step-6"):
        shutil.rmtree(flags["out"] / left)
    return flags


@pytest.fixture
def alone():
    """A process group of one."""
    ranks = Ranks("cpu")
    yield ranks
    dist.destroy_process_group()


@pytest.fixture
def fresh(alone, tiny_model_dir):
    """() -> an untrained model with its optimizer."""

    def make():
        s = parse(TrainFlags, "", ["--model", str(tiny_model_dir), "--data", "none"])
        s, _ = resolve_flags(s, "cpu")
        model = build_model(s, alone, tiny_model_dir, "logps")
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    return make


def save(directory, model, optimizer, state, keep=2, owner=None):
    """Write a checkpoint and wait until it is published."""
    saver = checkpoint.Saver(directory, owner or {}, keep)
    saver.save(model, optimizer, state)
    saver.wait()


def train_a_step(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def content(model, optimizer):
    return {n: t.full_tensor() for n, t in checkpoint._tensors(model, optimizer).items()}


# ----------------------------------------------------------------------------- there and back


def test_weights_and_moments_come_back_bitwise_and_training_goes_on_alike(fresh, tmp_path):
    model, optimizer = fresh()
    for _ in range(3):
        train_a_step(model, optimizer)
    save(tmp_path, model, optimizer, {"step": 3, "best": 0.25})
    path, state = newest(tmp_path)
    assert (path.name, state["step"], state["best"], state["world"]) == ("step-3", 3, 0.25, 1)
    other, its_optimizer = fresh()
    checkpoint.restore(path, state, other, its_optimizer)
    before, after = content(model, optimizer), content(other, its_optimizer)
    assert len(after) == 3 * len(list(model.parameters()))
    assert all(torch.equal(before[name], after[name]) for name in before)
    for pair in ((model, optimizer), (other, its_optimizer)):  # the step count decides the update
        torch.manual_seed(0)
        train_a_step(*pair)
    before, after = content(model, optimizer), content(other, its_optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_the_newest_are_kept(fresh, tmp_path):
    model, optimizer = fresh()
    train_a_step(model, optimizer)
    for step in (8, 9, 10, 11):  # numbers, not names, decide what is newest
        save(tmp_path, model, optimizer, {"step": step})
    assert [path.name for path in saved(tmp_path)] == ["step-11", "step-10"]
    assert sorted(os.listdir(tmp_path)) == ["step-10", "step-11"]


@pytest.mark.parametrize("n, world", [(1, 2), (2, 2), (5, 2), (7, 3), (3, 4), (9, 4), (260, 8)])
def test_rows_of_ranks_are_those_of_fsdp(n, world):
    """fully_shard splits as torch.chunk does; ranks beyond the last chunk hold nothing."""
    chunks = torch.arange(n).chunk(world)
    for rank in range(world):
        expected = chunks[rank].tolist() if rank < len(chunks) else []
        assert torch.arange(n)[rows_of_shard(n, rank, world)].tolist() == expected


def test_one_process_goes_on_as_two_and_two_as_one(stopped, whole, tmp_path):
    """Saved by 1 after step 4, resumed by 2; their checkpoint of step 5, resumed by 1."""
    flags = stopped | {"save_every": 1}
    status, _, err = torchrun(2, flags)
    assert status == 0, err
    assert furthest(final(whole["out"]), final(flags["out"])) <= 1e-5
    state = json.loads((flags["out"] / "checkpoints" / "step-5" / "state.json").read_text())
    assert state["world"] == 2 and len(state["sha256"]) == 2
    again = flags | {"out": shutil.copytree(flags["out"], tmp_path / "again")}
    for left in ("final", "checkpoints/step-6"):
        shutil.rmtree(again["out"] / left)
    train_here(again)
    for out in (flags["out"], again["out"]):
        assert [line["step"] for line in lines(out)] == [1, 2, 3, 4, 5, 6]
        assert (losses(whole["out"]) - losses(out)).abs().max() <= 1e-4
    assert furthest(final(whole["out"]), final(again["out"])) <= 1e-5


# ----------------------------------------------------------------------------- damage


def flipped_bit(path):
    file = path / "rank-0.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return "rank-0.safetensors does not match its checksum"


def truncated(path):
    file = path / "rank-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return "rank-0.safetensors does not match its checksum"


def missing_rank(path):
    (path / "rank-0.safetensors").unlink()
    return "rank-0.safetensors is missing"


def a_link(path):
    file = path / "rank-0.safetensors"
    shutil.move(file, path.parent / "elsewhere")
    file.symlink_to(path.parent / "elsewhere")
    return "rank-0.safetensors is a link"


def missing_state(path):
    (path / "state.json").unlink()
    return "not readable"


def broken_state(path):
    (path / "state.json").write_text('{"step": 6')
    return "not readable"


def stateless(path):
    (path / "state.json").write_text("{}")
    return "not readable"


DAMAGE = [flipped_bit, truncated, missing_rank, missing_state, broken_state, stateless]
DAMAGE += [a_link]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(damage, whole, tmp_path, alone):
    directory = shutil.copytree(whole["out"] / "checkpoints", tmp_path / "checkpoints")
    said = []
    path, state = newest(directory, say=said.append)
    assert path.name == "step-6" and said == [f"resuming from {path}"]
    owner = state["owner"]
    assert [*owner] == ["model", "objective", "reference", "train data", "validation data", "plan"]
    said.clear()
    message = damage(directory / "step-6")
    path, state = newest(directory, owner, said.append)
    assert (path.name, state["step"]) == ("step-4", 4)
    assert len(said) == 2 and message in said[0] and "step-6" in said[0]
    for older in ("step-4", "step-2"):
        damage(directory / older)
    assert newest(directory, owner, said.append) is None and len(said) == 6


# ----------------------------------------------------------------------------- another run's


@pytest.fixture
def resumed(whole, tmp_path, no_plots, ended):
    """resumed(**flags) goes on with a copy of the run, without its config.json -> as `ended`."""

    def go(**changes):
        out = shutil.copytree(whole["out"], tmp_path / "out", dirs_exist_ok=True)
        (out / "config.json").unlink()  # which compares the flags
        return ended(train, *argv(whole | {"out": out, "resume": True} | changes))

    return go


def before_and_after(out):
    return [(out / name).read_text() for name in ("metrics.jsonl", "checkpoints/step-6/state.json")]


@pytest.mark.parametrize("of", ["data", "validation", "order", "seed", "reference", "objective"])
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(
    of, whole, resumed, tmp_path, tiny_model_dir
):
    rows = Path(whole["data"]).read_text().splitlines(keepends=True)
    rows[0] = json.dumps(PAIRS[0] | {"chosen": "Another answer."}) + "\n"
    (tmp_path / "data.jsonl").write_text("".join(rows))
    (tmp_path / "few.jsonl").write_text("".join(rows[:2]))
    other = write_model(tmp_path / "other", tiny.LLAMA | {"tie_word_embeddings": True}, seed=5)
    changes, told = {
        "data": ({"data": tmp_path / "data.jsonl"}, "another train data ("),
        "validation": ({"eval_data": tmp_path / "few.jsonl"}, "validation data ("),
        "order": ({"batch": 6}, "another plan (batch 4, seed 0, now batch 6, seed 0)"),
        "seed": ({"seed": 1}, "plan (batch 4, seed 0, now batch 4, seed 1)"),
        "reference": ({"ref_model": other}, "another reference ("),
        "objective": ({"loss": "dpo"}, "another objective (ins_dpo"),
    }[of]
    _, error, status = resumed(**changes)
    error = error.rpartition("\r")[2]
    assert status == 2 and error.count("\n") == 1 and told in error
    assert f"--resume: {tmp_path / 'out' / 'checkpoints' / 'step-6'} belongs to another" in error
    assert before_and_after(tmp_path / "out") == before_and_after(whole["out"])


def test_the_same_pairs_in_another_file_are_the_same_data(resumed, whole, tmp_path):
    shutil.copy(whole["data"], tmp_path / "moved.jsonl")
    out, error, status = resumed(data=tmp_path / "moved.jsonl")
    assert status == 0 and "resuming from" in out, error


def test_a_checkpoint_of_an_older_version_says_what_is_not_compared(whole, tmp_path, alone):
    directory, said = shutil.copytree(whole["out"] / "checkpoints", tmp_path / "checkpoints"), []
    _, state = newest(directory, say=said.append)
    owner = state["owner"]
    assert [*owner] == ["model", "objective", "reference", "train data", "validation data", "plan"]
    old = state | {"owner": {name: owner[name] for name in ("model", "objective")}}
    (directory / "step-6" / "state.json").write_text(json.dumps(old))
    said.clear()
    assert newest(directory, owner, said.append)[0].name == "step-6"
    told = "of an older version; not compared: reference, train data, validation data, plan"
    assert len(said) == 2 and told in said[0]
    with pytest.raises(UserError, match="belongs to another model .*, now 0123"):
        newest(directory, owner | {"model": "0123"}, said.append)


def test_the_best_is_kept_beside_the_newest(fresh, tmp_path):
    model, optimizer = fresh()
    train_a_step(model, optimizer)
    for step, best in ((1, None), (2, 1), (3, 1), (4, 1), (5, 4)):
        save(tmp_path, model, optimizer, {"step": step, "best_step": best})
        newest_two = {f"step-{step}", f"step-{step - 1}"} - {"step-0"}
        assert set(os.listdir(tmp_path)) == newest_two | ({f"step-{best}"} if best else set())


def test_training_goes_on_while_a_checkpoint_is_written(fresh, tmp_path, monkeypatch):
    """What is written are the values at the call, and nothing has its name until it is whole."""
    model, optimizer = fresh()
    train_a_step(model, optimizer)
    before = {n: t.clone() for n, t in content(model, optimizer).items()}
    go_on, write = threading.Event(), checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *a: go_on.wait(600) and write(*a))
    saver = checkpoint.Saver(tmp_path, {}, keep=2)
    saver.save(model, optimizer, {"step": 1})
    train_a_step(model, optimizer)
    assert saved(tmp_path) == []
    go_on.set()
    saver.wait()
    path, state = newest(tmp_path)
    checkpoint.restore(path, state, model, optimizer)
    after = content(model, optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_full_disk_is_said_leaves_the_older_and_the_next_save_tries_again(
    fresh, tmp_path, monkeypatch
):
    model, optimizer = fresh()
    train_a_step(model, optimizer)
    save(tmp_path, model, optimizer, {"step": 1}, keep=1)
    said, write = [], checkpoint.save_file

    def full(tensors, file):
        file.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    saver = checkpoint.Saver(tmp_path, {}, 1, said.append)
    saver.save(model, optimizer, {"step": 2})
    with pytest.raises(UserError, match="step-2 was not written: .*No space left on device"):
        saver.wait()
    assert os.listdir(tmp_path) == ["step-1"] and newest(tmp_path)[0].name == "step-1"
    assert len(said) == 1 and "the next save tries again" in said[0]
    monkeypatch.setattr(checkpoint, "save_file", write)
    saver.save(model, optimizer, {"step": 3})
    saver.wait()
    assert os.listdir(tmp_path) == ["step-3"]


def test_a_resumed_run_passes_over_a_damaged_checkpoint(whole, tmp_path, capsys):
    flags = whole | {"out": shutil.copytree(whole["out"], tmp_path / "out"), "resume": True}
    flipped_bit(flags["out"] / "checkpoints" / "step-6")
    train_here(flags)
    out = capsys.readouterr().out
    assert "does not match its checksum; trying the one before" in out
    assert f"resuming from {flags['out'] / 'checkpoints' / 'step-4'}" in out
    assert furthest(final(whole["out"]), final(flags["out"])) == 0
    assert [line["step"] for line in lines(flags["out"])] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_that_was_being_written_is_never_read(stopped, whole, capsys):
    """Killed while step 5 was written: what lies aside is ignored, and written over later."""
    aside = stopped["out"] / "checkpoints" / ".step-6"
    shutil.copytree(stopped["out"] / "checkpoints" / "step-4", aside)
    (aside / "state.json").unlink()
    (aside / "rank-1.safetensors").write_bytes(b"half a file of a second rank")
    train_here(stopped)
    assert "step-4" in capsys.readouterr().out.partition("resuming from")[2].splitlines()[0]
    assert furthest(final(whole["out"]), final(stopped["out"])) == 0
    assert [line["step"] for line in lines(stopped["out"], "eval_loss")] == [0, 2, 4, 6]
    found = sorted(os.listdir(stopped["out"] / "checkpoints"))
    assert found == ["step-2", "step-4", "step-6"]
    assert sorted(os.listdir(stopped["out"] / "checkpoints" / "step-6")) == [
        "rank-0.safetensors",
        "state.json",
    ]


def test_a_resumed_run_without_a_whole_checkpoint_starts_over_and_says_so(stopped, whole, capsys):
    for path in saved(stopped["out"] / "checkpoints"):
        flipped_bit(path)
    train_here(stopped)
    steps = [line["step"] for line in lines(stopped["out"], "step")]
    assert steps == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6], "each step, and each validation, once"
    assert "no whole checkpoint" in capsys.readouterr().out
    assert furthest(final(whole["out"]), final(stopped["out"])) == 0
