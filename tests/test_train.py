"""A run of train.py: every objective, any number of processes, stopped, resumed, reported."""

import itertools
import json
import math
import random
import shutil
import signal
import time
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import parity
import pytest
import tiny
import torch
from dialogues import say
from runs import command, final, furthest, lines, losses, torchrun, train_here
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid

import train
from conftest import PAIRS, write_model
from data import Dataset, Limits, Plan, build_row
from hub.template import Template
from jobs.cli import run
from losses import PRESETS, recipe
from model import load
from pairs.layouts import Pair

STEP = {"step", "epoch", "loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "lr"}
TIMED = {"seconds", "eval_seconds", "pairs_per_second", "tokens_per_second", "memory_gib"}
STEP |= {"grad_norm", "pairs", "tokens", "row_fill"} | TIMED - {"eval_seconds"}
EVAL = {"step", "eval_loss", "eval_accuracy", "eval_margin", "eval_plain_accuracy"}
EVAL |= {"eval_plain_margin", "eval_seconds"}


# ----------------------------------------------------------------------------- what is trained


@pytest.mark.filterwarnings("error:FSDP2-wrapped module")  # hooks that a view would lose
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(preset, flags, no_plots):
    train_here(flags | {"loss": preset, "steps": 2})
    out = flags["out"]
    assert len(lines(out)) == 2 and losses(out).isfinite().all()
    assert all(math.isfinite(line["eval_loss"]) for line in lines(out, "eval_loss"))
    reward = PRESETS[preset].objective == "reward"
    before = load_file(flags["model"] / "model.safetensors")
    before |= {"score.weight": torch.zeros(1, 32)} if reward else {}
    assert 1e-4 < furthest(before, final(out)) < 1e-2


@pytest.mark.parametrize("family, loss", [("Gemma 2", "ins_dpo"), ("Pythia", "reward")])
def test_other_families_train_and_their_exports_load_in_transformers(
    family, loss, flags, no_plots, tmp_path
):
    pytest.importorskip("transformers")
    source = write_model(tmp_path / "model", parity.CONFIGS[family] | {"dtype": "float32"})
    train_here(flags | {"model": source, "loss": loss, "steps": 2})
    directory, tokens = flags["out"] / "final", parity.ids(1, 40)
    if loss == "reward":
        assert parity.reward(directory) <= 1e-4
        return
    with torch.no_grad():
        expected = parity.theirs(directory)(tokens).logits
        assert (load(directory).logits(tokens) - expected).abs().max() <= 1e-4
        assert (load(source).logits(tokens) - expected).abs().max() > 1e-3, "it was trained"


@pytest.mark.parametrize("objective", ["dpo", "sft", "kto", "simpo", "ld_dpo"])
@pytest.mark.parametrize("condition", ["one_sided", "averaged", "instruct"])
def test_every_condition_composes_with_every_kind_of_objective(
    objective, condition, flags, no_plots
):
    reference = "plain" if condition == "instruct" else "conditioned"
    choice = {"condition": condition, "bridge": "turn", "reference": reference, "steps": 2}
    train_here(flags | choice | {"loss": objective})
    assert losses(flags["out"]).isfinite().all()


def alone(model, segments, n):
    """(n,) log-probabilities of the first tokens of the last segment, the path run by itself."""
    whole = torch.from_numpy(np.concatenate(segments)).long()
    start = len(whole) - len(segments[-1])
    logps = model.logits(whole[None])[0].log_softmax(-1)[start - 1 : start - 1 + n]
    return logps.gather(-1, whole[start : start + n, None]).squeeze(-1)


FORMS = [("ld_dpo", None, None), ("ins_ld_dpo", None, None), ("ifsr_ld_dpo", "averaged", "plain")]


@pytest.mark.parametrize("name, condition, reference", FORMS)
def test_an_objective_of_tokens_equals_a_loop_over_paths_alone(
    name, condition, reference, tiny_model_dir
):
    """Loss and gradient of packed rows; LD-DPO spelled out token by token, each path by itself."""
    rule = recipe(name, condition, reference=reference, alpha=0.3)
    pairs = [Pair(say(row["prompt"]), row["chosen"], row["rejected"], "") for row in PAIRS[:4]]
    dataset = Dataset(pairs, Template(tiny_model_dir), rule, Limits(256, 1.0), "better")
    before, model = load(tiny_model_dir), load(tiny_model_dir).requires_grad_(True)
    torch.manual_seed(0)
    for parameter in before.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)

    def by_path(model, row, paths):
        return dict(zip(paths, row.by_token(model(row)).unbind(1), strict=True))

    total = 0
    for numbers in ([0, 2, 3], [1], []):
        rows = [build_row([dataset.trie(i, paths) for i in numbers], numbers, len(paths))
                for paths in (rule.paths, rule.reference_paths)]  # fmt: skip
        logps, ref = (
            by_path(model, rows[0], rule.paths),
            by_path(before, rows[1], rule.reference_paths),
        )
        counts = dict(zip(rule.paths, rows[0].counts().unbind(1), strict=True))
        total = total + rule(logps, counts, ref).losses.sum()
    total.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = 0
    for i, view in itertools.product(range(4), rule.views):
        ratio = {}
        for answer, path in view.items():
            ref = alone(before, *dataset.path(i, rule.reference_path(path)))
            ratio[answer] = alone(model, *dataset.path(i, path)) - ref
        shared = min(map(len, ratio.values()))
        w, l = (
            sum(v * (1 if k < shared else 0.3) for k, v in enumerate(r)) for r in ratio.values()
        )
        expected = expected - logsigmoid(0.1 * (w - l)) / len(rule.views)
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    for got, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-5)


def test_with_alpha_1_ld_dpo_is_dpo_and_only_its_reference_is_kept_by_token(flags, no_plots):
    outs = {loss: flags["out"] / loss for loss in ("dpo", "ld_dpo")}
    for loss, out in outs.items():
        alpha = {"alpha": 1.0} if loss == "ld_dpo" else {}
        train_here(flags | alpha | {"loss": loss, "out": out, "condition": "averaged"})
    kept = {loss: load_file(out / "reference.safetensors")["train"] for loss, out in outs.items()}
    torch.testing.assert_close(kept["ld_dpo"].sum(2), kept["dpo"], rtol=1e-6, atol=1e-6)
    assert furthest(*map(final, outs.values())) < 1e-6
    for key in ("loss", "margin", "eval_loss", "eval_margin", "eval_plain_margin"):
        ours, theirs = ([row[key] for row in lines(out, key)] for out in outs.values())
        assert ours == pytest.approx(theirs, abs=1e-5) and len(ours) > 1, key


@pytest.mark.parametrize("switch", ["context_grad", "checkpoint_activations"])
@pytest.mark.parametrize("on", [True, False])
def test_bf16_trains_as_fp32_does(switch, on, flags, no_plots):
    """Masters and their updates are fp32 in both, so losses differ by bf16's rounding alone."""
    outs = {dtype: flags["out"] / dtype for dtype in ("fp32", "bf16")}
    for dtype, out in outs.items():
        train_here(flags | {switch: on, "dtype": dtype, "warmup": 0.25, "out": out})
    assert losses(outs["fp32"]).std() > 1e-3
    torch.testing.assert_close(losses(outs["bf16"]), losses(outs["fp32"]), rtol=0.06, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("context_grad", [True, False])
@pytest.mark.parametrize("dtype, rtol", [("fp32", 1e-4), ("bf16", 0.06)])
def test_compiled_blocks_train_as_eager_ones_do(dtype, rtol, context_grad, flags, no_plots):
    torch.compiler.reset()
    flags |= {"context_grad": context_grad, "dtype": dtype, "warmup": 0.25}
    outs = {compiled: flags["out"] / str(compiled) for compiled in (False, True)}
    for compiled, out in outs.items():
        train_here(flags | {"compile": compiled, "out": out})
    torch.testing.assert_close(losses(outs[True]), losses(outs[False]), rtol=rtol, atol=0)


def test_the_loss_at_step_0_tells_the_kinds_of_reference_apart(flags, no_plots):
    """ln 2 where policy and reference score the same paths; InSPO's reference is plain."""
    first = {}
    for loss in ("dpo", "ifsr_dpo", "ins_dpo", "kto"):
        train_here(flags | {"loss": loss, "steps": 1, "out": flags["out"] / loss})
        first[loss] = lines(flags["out"] / loss)[0]["loss"]
    assert abs(first["dpo"] - math.log(2)) < 1e-5
    assert abs(first["ifsr_dpo"] - math.log(2)) < 1e-5
    assert abs(first["kto"] - 1.0) < 1e-5, "one half per side"
    assert abs(first["ins_dpo"] - math.log(2)) > 1e-2


def rates_of(steps=100, **changes):
    """Learning rates of all steps, and of the one behind the last, at a peak of 1."""
    s = SimpleNamespace(
        **{"lr": 1.0, "warmup": 0.1, "final_lr": 0.1, "schedule": "cosine"} | changes
    )
    job = SimpleNamespace(s=s, plan=SimpleNamespace(steps=steps))
    return [train.Run.learning_rate(job, step) for step in range(steps + 1)]


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    rates = rates_of()
    assert rates[0] == 1e-8 and rates[5] == pytest.approx(0.5) and rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_without_a_warm_up_the_first_step_has_the_peak(schedule):
    """Nor has a run a warm-up that is too short for one: it would be its only step."""
    assert rates_of(warmup=0.0, schedule=schedule)[0] == 1.0
    assert rates_of(1, schedule=schedule)[0] == 1.0


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.25])
@pytest.mark.parametrize(
    "schedule, theirs, options",
    [
        ("cosine", "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("linear", "linear", {}),
        ("constant", "constant_with_warmup", {}),
    ],
)
def test_schedules_equal_transformers(schedule, theirs, options, warmup):
    """But for the warm-up's start, 1e-8 (InSPO D.1) instead of 0."""
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    steps = {"num_warmup_steps": round(80 * warmup), "num_training_steps": 80}
    peer = optimization.get_scheduler(theirs, optimizer, **steps, scheduler_specific_kwargs=options)
    rates = []
    for _ in range(81):
        rates.append(peer.get_last_lr()[0])
        optimizer.step()
        peer.step()
    assert rates_of(80, schedule=schedule, warmup=warmup) == pytest.approx(rates, abs=2e-8)


def test_a_linear_run_steps_by_its_schedule_and_says_so(flags, no_plots):
    flags |= {"loss": "simpo", "schedule": "linear", "warmup": 0}
    train_here(flags)
    rates = [line["lr"] for line in lines(flags["out"])]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    config = json.loads((flags["out"] / "config.json").read_text())
    assert config["settings"]["schedule"] == "linear"


# ----------------------------------------------------------------------------- the same numbers


def test_two_processes_equal_one_over_20_steps(flags, no_plots):
    kinds = [{"loss": "dpo", "condition": "averaged", "bridge": "turn"}, {"loss": "irft"}]
    kinds += [{"loss": "ifsr_kto", "batch": 3}, {"loss": "ins_ld_dpo", "batch": 1}]
    kinds += [{"loss": "reward", "batch": 1}]  # a rank without a pair in every step

    def runs(processes):
        outs = [flags["out"] / f"{i}-{processes}" for i in range(len(kinds))]
        return [flags | {"steps": 20, "out": o} | k for o, k in zip(outs, kinds, strict=True)]

    train_here(*runs(1))
    status, _, err = torchrun(2, *runs(2))
    assert status == 0, err
    for a, b in zip(runs(1), runs(2), strict=True):
        assert (losses(a["out"]) - losses(b["out"])).abs().max() <= 1e-4, a["loss"]
        assert furthest(final(a["out"]), final(b["out"])) <= 1e-4, a["loss"]
        for x, y in zip(lines(a["out"]), lines(b["out"]), strict=True):
            assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)
            assert (x["pairs"], x["tokens"]) == (y["pairs"], y["tokens"])


CHANGES = [{"row_tokens": 512}, {"checkpoint_activations": True}, {"offload": True}]


@pytest.mark.parametrize("change", CHANGES)
def test_rows_recomputing_and_offloading_do_not_change_the_numbers(
    change, flags, no_plots, monkeypatch
):
    sizes = []
    build = train.build_row
    monkeypatch.setattr(train, "build_row", lambda *a: sizes.append(len(a[0])) or build(*a))
    flags |= {"loss": "ins_dpo", "batch": 6}
    train_here(flags, flags | change | {"out": flags["out"] / "changed"})
    assert (losses(flags["out"]) - losses(flags["out"] / "changed")).abs().max() <= 1e-5
    assert furthest(final(flags["out"]), final(flags["out"] / "changed")) <= 1e-5
    assert "row_tokens" not in change or len(set(sizes)) > 2, "the batch was split in other ways"


# ----------------------------------------------------------------------------- stopped and resumed


def until_step(process, out, step):
    """Wait until the metrics of this step are written."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len(lines(out)) >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"never came to step {step}: {process.communicate()}")


def steps_and_losses(out):
    """What a run reports, but for the clock and the memory."""
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines(out, "step")]


@pytest.fixture(scope="module")
def whole(tiny_model_dir, pairs_file, tmp_path_factory):
    """The flags of a run that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    flags = {"model": tiny_model_dir, "data": pairs_file, "max_len": 256, "batch": 4, "lr": 1e-3}
    flags |= {"loss": "ins_dpo", "steps": 24, "save_every": 3, "eval_every": 12, "out": out}
    train_here(flags)
    return flags


def assert_the_same_run(a, b):
    for name in ("final", "best"):
        files = [flags["out"] / name / "model.safetensors" for flags in (a, b)]
        assert files[0] != files[1] and files[0].read_bytes() == files[1].read_bytes()
    assert steps_and_losses(a["out"]) == steps_and_losses(b["out"])


def test_a_run_killed_at_a_random_step_resumes_bitwise(whole, tmp_path):
    killed = whole | {"out": tmp_path / "killed"}
    process = command(killed, "held")
    until_step(process, killed["out"], random.randint(1, 20))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed["out"] / "final").exists()
    print("killed after step", lines(killed["out"])[-1]["step"])
    train_here(killed | {"resume": True})
    assert_the_same_run(whole, killed)


def test_sigterm_saves_and_ends_well_and_the_run_resumes_bitwise(whole, tmp_path):
    stopped = whole | {"out": tmp_path / "stopped"}
    process = command(stopped, "held")
    until_step(process, stopped["out"], 4)
    process.terminate()
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, err
    done = lines(stopped["out"])[-1]["step"]
    assert f"stopped by a signal after step {done}; --resume goes on from here" in out
    assert (stopped["out"] / "checkpoints" / f"step-{done}" / "state.json").exists()
    train_here(stopped | {"resume": True})
    assert_the_same_run(whole, stopped)


def train_until(last, flags, monkeypatch):
    """A run in this process that a signal stops after step `last`."""
    step = train.Run.step

    def stop_there(self, number, stopping):
        return step(self, number, stopping or number + 1 == last)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(train.Run, "step", stop_there)
        train_here(flags)
    assert exit.value.code == 128 + signal.SIGTERM


def test_sigterm_where_a_validation_was_due_skips_no_validation(whole, tmp_path, monkeypatch):
    """The validation of the stopped step is made up for, so best cannot miss its step."""
    stopped = whole | {"out": tmp_path / "stopped"}
    train_until(12, stopped, monkeypatch)
    train_here(stopped | {"resume": True})
    assert_the_same_run(whole, stopped)


@pytest.mark.slow
def test_a_compiled_run_resumes_bitwise(whole, tmp_path, monkeypatch):
    """Though its blocks, compiled anew, meet other lengths first."""
    compiled = whole | {"compile": True, "out": tmp_path / "whole"}
    stopped = compiled | {"out": tmp_path / "stopped"}
    torch.compiler.reset()
    train_here(compiled)
    torch.compiler.reset()
    train_until(10, stopped, monkeypatch)
    torch.compiler.reset()
    train_here(stopped | {"resume": True})
    assert_the_same_run(compiled, stopped)


def test_a_non_finite_step_leaves_the_weights_as_they_were(flags, no_plots, monkeypatch, capsys):
    flags |= {"loss": "ins_dpo", "save_every": 1}
    backward, calls = train.Run.backward, []

    def poisoned(self, *args):
        totals = backward(self, *args)
        if len(calls) == 2:
            next(self.model.parameters()).grad.to_local()[0, 0] = math.inf
        calls.append(0)
        return totals

    monkeypatch.setattr(train.Run, "backward", poisoned)
    with pytest.raises(SystemExit):
        run(lambda: train_here(flags))
    assert "step 3: loss" in capsys.readouterr().err and len(lines(flags["out"])) == 2
    monkeypatch.setattr(train.Run, "backward", backward)
    train_here(flags | {"resume": True}, flags | {"out": flags["out"] / "whole"})
    assert furthest(final(flags["out"]), final(flags["out"] / "whole")) == 0


# ----------------------------------------------------------------------------- the reference


def test_the_reference_pass_is_kept_and_done_again_when_it_does_not_fit(flags, no_plots, capsys):
    flags |= {"loss": "dpo", "save_every": 2}
    first, again, other = (flags | {"out": flags["out"] / n} for n in ("first", "again", "other"))
    train_here(first)
    assert [set(x) for x in lines(first["out"], "reference_pairs")] == [
        {"reference_seconds", "reference_pairs"}
    ]
    assert lines(first["out"], "reference_pairs")[0]["reference_pairs"] == 24
    for run_flags in (again, other):
        run_flags["out"].mkdir()
        shutil.copy(first["out"] / "reference.safetensors", run_flags["out"])
    capsys.readouterr()
    train_here(again)
    assert not lines(again["out"], "reference_pairs")
    assert "computing it again" not in capsys.readouterr().out
    assert torch.equal(losses(first["out"]), losses(again["out"]))
    train_here(other | {"seed": 1})
    assert lines(other["out"], "reference_pairs")
    assert "other weights, data or settings; computing it again" in capsys.readouterr().out
    assert lines(other["out"])[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_damaged_reference_is_computed_again(flags, no_plots, capsys):
    flags["out"].mkdir()
    (flags["out"] / "reference.safetensors").write_bytes(b"half a fi")
    train_here(flags | {"loss": "dpo"})
    assert "is damaged; computing it again" in capsys.readouterr().out
    assert lines(flags["out"])[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_reference_may_be_another_model(flags, no_plots, tmp_path):
    other = write_model(tmp_path / "other", tiny.LLAMA | {"dtype": "float32"}, seed=1)
    train_here(flags | {"loss": "dpo", "ref_model": other})
    assert abs(lines(flags["out"])[0]["loss"] - math.log(2)) > 1e-2


# ----------------------------------------------------------------------------- what is left behind


def test_a_run_leaves_metrics_curves_settings_and_a_model(flags):
    """The names are those of DESIGN section 11: flags and formulas."""
    train_here(flags | {"loss": "ins_dpo", "batch": 8, "steps": 3, "eval_every": 2, "warmup": 0.4})
    out = flags["out"]
    assert all(set(line) == STEP for line in lines(out))
    assert [line["step"] for line in lines(out)] == [1, 2, 3]
    assert all(set(line) == EVAL for line in lines(out, "eval_loss"))
    assert [line["step"] for line in lines(out, "eval_loss")] == [0, 2, 3]
    assert set(lines(out, "reference_pairs")[0]) == {"reference_seconds", "reference_pairs"}
    line = lines(out)[1]
    assert line["margin"] == pytest.approx(line["chosen_reward"] - line["rejected_reward"])
    assert (line["pairs"], line["epoch"], line["lr"]) == (8, 0.8, 1e-3)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["loss"] == "ins_dpo" and config["settings"]["row_tokens"] == 2048
    assert config["hyper"] == {"beta": 0.1, "label_smoothing": 0.0}
    assert config["versions"]["torch"] == torch.__version__
    for name in ("config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (out / "final" / name).exists()


def test_every_epoch_takes_every_pair_once(flags, no_plots):
    del flags["steps"]
    train_here(flags | {"loss": "simpo", "epochs": 1.5, "batch": 8})
    assert [line["pairs"] for line in lines(flags["out"])] == [8, 8, 8, 6]  # 1.5 x 20
    seen = [i for step in range(3) for i in Plan(20, 8, 0, 1.5).pairs(step)]
    assert sorted(seen[:20]) == list(range(20))


def test_best_is_the_model_of_the_lowest_validation_loss(flags, no_plots, monkeypatch):
    scripted = iter([0.1, 0.9, 0.5, 0.5, 0.7])  # before the first step it is not a result
    validate = train.Run.validate
    monkeypatch.setattr(
        train.Run, "validate", lambda *a: validate(*a) | {"eval_loss": next(scripted)}
    )
    flags |= {"loss": "ins_dpo", "save_every": 1, "keep": 9}
    train_here(flags | {"eval_every": 1})
    step_2 = load_file(flags["out"] / "checkpoints" / "step-2" / "rank-0.safetensors")
    best = final(flags["out"], "best")
    assert torch.equal(best["model.embed_tokens.weight"], step_2["weight/embed.weight"])
    assert furthest(best, final(flags["out"])) > 0


def test_a_model_from_the_hub_is_trained_and_exported(flags, no_plots, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(flags["model"]))
    train_here(flags | {"loss": "ins_dpo", "model": "someone/tiny", "steps": 1})
    assert (flags["out"] / "final" / "tokenizer.json").exists()


def test_a_tokenizer_without_template_gets_the_plain_one_and_says_so(flags, tmp_path, capsys):
    base = tiny.build(tmp_path / "base", tiny.LLAMA, template=None)
    train_here(flags | {"model": base, "loss": "ifsr_dpo", "steps": 1})
    assert f"{base} has no chat template" in capsys.readouterr().out
