"""A user's mistakes are told in one line that names the cure, and leave OUT as it was."""

import json
import shutil

import pytest
import tiny
import torch
from runs import argv, command, lines, losses, train_here
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from conftest import PAIRS, write_model
from jobs import checkpoint
from jobs.files import write_json


@pytest.fixture
def mistake(ended):
    """Run `train.py FLAGS` in this process; it must exit with 2 and one line, which is returned."""

    def run_it(flags, *more):
        _, told, status = ended(train, *argv(flags), *more)
        told = told.rpartition("\r")[2]  # what follows the progress bars
        assert status == 2 and told.startswith("error: ") and told.count("\n") == 1
        return told

    return run_it


def test_mistakes_in_flags(flags, mistake):
    assert "--loss nope: unknown objective; choose from dpo" in mistake(flags | {"loss": "nope"})
    told = mistake(flags | {"loss": "ins_dpo", "gamma": 1.0})
    assert "--gamma does not apply to --loss ins_dpo; its flags are: --beta" in told
    assert "--betta" in mistake(flags, "--betta", "1")
    assert "--lr" in mistake(flags, "--lr", "fast")
    assert "cuda" in mistake(flags | {"device": "cuda"}) or torch.cuda.is_available()


def test_mistakes_in_the_data(flags, mistake, tmp_path):
    missing = tmp_path / "none.jsonl"
    assert f"--data {missing}: no such file" in mistake(flags | {"data": missing})
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(PAIRS[0]) + "\n" + '{"prompt": "half a\n')
    assert f"{broken}:2: broken JSON" in mistake(flags | {"data": broken})
    broken.write_text(json.dumps({"question": "?", "answer": "!"}) + "\n")
    assert f"{broken}:1: columns ['answer', 'question']" in mistake(flags | {"data": broken})
    assert "--eval_pairs 24 leaves nothing" in mistake(flags | {"eval_pairs": 24})
    assert "--row_tokens 64: the longest pair takes" in mistake(flags | {"row_tokens": 64})


def test_mistakes_in_the_model(flags, mistake, tmp_path, tiny_model_dir):
    assert "--model nowhere: no such directory" in mistake(flags | {"model": "nowhere"})
    copy = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    assert "no tokenizer.json" in mistake(flags | {"model": copy})
    (copy / "model.safetensors").unlink()
    flags |= {"out": tmp_path / "another"}
    assert "no model.safetensors; weights must be" in mistake(flags | {"model": copy})
    ref = {"ref_model": "nowhere", "loss": "dpo"}
    assert "--ref_model nowhere: no such directory" in mistake(flags | ref)


@pytest.fixture
def no_data(monkeypatch):
    def read(*args):
        raise AssertionError("data is read before the models are looked through")

    monkeypatch.setattr(train, "load_data", read)


def test_models_are_looked_through_before_data_is_read(flags, mistake, tmp_path, no_data):
    """The policy and the reference: what they are, their files, their tokens, their positions."""
    model = flags["model"]

    def other(name, change):
        copy = shutil.copytree(model, tmp_path / name)
        change(copy)
        return copy

    def without(copy):
        (copy / "model.safetensors").unlink()
        torch.save({}, copy / "pytorch_model.bin")

    def cut(copy):
        tensors = load_file(copy / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:9].clone()
        save_file(tensors, copy / "model.safetensors")

    def adapter(copy):
        write_json(copy / "adapter_config.json", {"base_model_name_or_path": "x"})

    def renamed(copy):
        file = copy / "tokenizer.json"
        file.write_text(file.read_text().replace("<|endoftext|>", "<|pad|>"))

    def smaller(copy):
        shutil.rmtree(copy)
        write_model(copy, tiny.LLAMA | {"vocab_size": 258})

    told = {
        "pytorch_model.bin is a pickle": other("pickle", without),
        "model.norm.weight is (9,), expected (32,)": other("cut", cut),
        "is an adapter (LoRA) of x": other("adapter", adapter),
    }
    for fault, copy in told.items():
        assert fault in mistake(flags | {"model": copy})
        assert fault in mistake(flags | {"ref_model": copy, "loss": "dpo"})
    reward = write_model(tmp_path / "reward", tiny.REWARD)
    told = mistake(flags | {"ref_model": reward, "loss": "dpo"})
    assert f"--ref_model {reward} is a reward model" in told
    told = mistake(flags | {"ref_model": other("renamed", renamed), "loss": "dpo"})
    assert "renamed: '<|endoftext|>' has id None, not 256" in told
    told = mistake(flags | {"ref_model": other("smaller", smaller), "loss": "dpo"})
    assert "smaller: it has 258 embeddings, not 260" in told
    (tmp_path / "smaller" / "tokenizer.json").unlink()
    told = mistake(flags | {"ref_model": tmp_path / "smaller", "loss": "dpo"})
    assert "smaller: no tokenizer.json" in told
    told = mistake(flags | {"max_len": 2049})
    assert f"--max_len 2049: {model} was made for 2048 positions" in told


def test_max_len_is_the_positions_of_the_model_by_default(flags, tmp_path):
    """Of the one that has fewer; and every path of the data holds to it."""
    short = write_model(tmp_path / "short", tiny.LLAMA | {"max_position_embeddings": 80})
    flags = {k: v for k, v in flags.items() if k != "max_len"} | {"loss": "dpo", "steps": 1}
    train_here(flags | {"ref_model": short})
    settings = json.loads((flags["out"] / "config.json").read_text())["settings"]
    assert settings["max_len"] == 80


def test_a_failed_start_can_be_corrected_in_the_same_out(flags, mistake, no_plots, tmp_path):
    """Nothing of it claims OUT, however far it came: the last one fails after the set-up."""
    flags |= {"loss": "dpo", "steps": 2}
    bare = shutil.copytree(flags["model"], tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    judge = write_model(tmp_path / "judge", tiny.REWARD)
    for name, source in (("model", "nowhere"), ("model", bare), ("ref_model", judge)):
        assert str(source) in mistake(flags | {name: source})
        assert (flags["out"]).is_dir() and not (flags["out"] / "config.json").exists()
    train_here(flags | {"lr": 1e-4})
    assert len(lines(flags["out"])) == 2 and len(lines(flags["out"], "reference_pairs")) == 1
    (flags["out"] / "config.json").unlink()  # what holds checkpoints is no place for another run
    assert "holds a run; add --resume" in mistake(flags)


def test_a_reference_that_is_not_the_start_ends_the_run_before_step_1(flags, mistake, no_plots):
    """A cache with the right key and checksum, but other values than the policy has."""
    flags |= {"loss": "dpo", "steps": 1}
    done = flags | {"out": flags["out"] / "done"}
    train_here(done)
    file, wrong = done["out"] / "reference.safetensors", flags["out"] / "reference.safetensors"
    with safe_open(file, "pt") as cached:
        key = cached.metadata()["key"]
    values = {name: tensor - 1.0 for name, tensor in load_file(file).items()}
    checkpoint.write_keyed(values, wrong, key)
    told = mistake(flags)
    assert "step 0: policy and reference differ by" in told and str(wrong) in told
    assert not (flags["out"] / "metrics.jsonl").exists()
    wrong.unlink()  # as the message says
    train_here(flags)
    assert losses(flags["out"]) == losses(done["out"])


def test_a_run_directory_is_neither_reused_nor_resumed_with_other_settings(flags, mistake):
    flags |= {"loss": "simpo"}
    train_here(flags)
    kept = (flags["out"] / "metrics.jsonl").read_text()
    assert "holds a run; add --resume" in mistake(flags)
    config = flags["out"] / "config.json"
    whole = config.read_text()
    config.write_text("{}")
    assert f"{config}: holds no settings" in mistake(flags | {"resume": True})
    config.write_text(whole)
    told = mistake(flags | {"resume": True, "max_len": 200})
    assert "--max_len is 200, but" in told and "has 256" in told
    assert (flags["out"] / "metrics.jsonl").read_text() == kept


def test_the_command_tells_a_mistake_in_one_line(flags):
    process = command(flags | {"loss": "nope"})
    out, err = process.communicate()
    assert process.returncode == 2 and out == ""
    assert err.startswith("error: --loss nope") and err.count("\n") == 1
