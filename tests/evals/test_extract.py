"""`evaluate.py extract`: any checkpoint becomes a model, equal to what training itself exports."""

import shutil

from runs import final, furthest, torchrun, train_here

import evaluate


def test_the_last_checkpoint_is_the_final_model(flags, no_plots, call, ended, tmp_path):
    flags |= {"loss": "ins_dpo", "save_every": 2, "keep": 5, "fold_system": True}
    train_here(flags)
    out = flags["out"]
    call(evaluate, "extract", "--run", out, "--out", out / "last")
    assert furthest(final(out), final(out, "last")) == 0
    for file in (out / "final").iterdir():
        assert (out / "last" / file.name).read_bytes() == file.read_bytes(), file.name
    call(evaluate, "extract", "--run", out, "--step", 2, "--out", out / "second")
    assert furthest(final(out), final(out, "second")) > 0
    _, told, status = ended(evaluate, "extract", "--run", out, "--step", 3, "--out", tmp_path / "x")
    assert status == 2 and told == f"error: --run {out}: no checkpoint of step 3; there are: 2, 4\n"
    _, told, status = ended(evaluate, "extract", "--run", out, "--out", out / "last")
    assert status == 2 and "is there already" in told
    shard = out / "checkpoints" / "step-2" / "rank-0.safetensors"
    shutil.copy(out / "checkpoints" / "step-4" / shard.name, shard)
    words = ("--run", out, "--step", 2, "--out", tmp_path / "x")
    _, told, status = ended(evaluate, "extract", *words)
    assert status == 2 and "does not match its checksum" in told and not (tmp_path / "x").exists()


def test_the_shards_of_two_ranks_are_joined(flags, no_plots, call):
    status, _, err = torchrun(2, flags | {"loss": "reward", "steps": 2})
    assert status == 0, err
    call(evaluate, "extract", "--run", flags["out"], "--out", flags["out"] / "last")
    assert furthest(final(flags["out"]), final(flags["out"], "last")) == 0
