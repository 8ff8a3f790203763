"""The measurements of bench/ run, count what they say they count, and tell it in whole tables.

No time is asserted. Every command runs here with a tiny model, in this process where it would start
others.
"""

import ctypes
import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from bench import (
    busy,
    context_grad,
    data_preparation,
    defaults,
    generation,
    growth,
    inputs,
    measuring,
    memory,
    pairs_per_second,
    profile_step,
    row_fill,
    small_world,
    small_world_report,
    training,
    trl_dpo,
)
from bench.measuring import Flops
from data import build_row, lay_out
from hub.template import Template
from jobs.cli import UserError, parser_of
from model import load
from train import TrainFlags

ROOT = Path(__file__).parent.parent
FILES = [file for file in (ROOT / "bench").glob("[a-z]*.py") if "\ndef main(" in file.read_text()]
COMMANDS = {file.stem: importlib.import_module(f"bench.{file.stem}") for file in FILES}


@pytest.fixture
def in_process(monkeypatch):
    """What would be measured in processes of their own is measured here; small matrices."""

    def here(function, processes=1, env=None, **arguments):
        arguments = json.loads(json.dumps(arguments, default=str))
        return getattr(modules[function.partition(".")[0]], function.partition(".")[2])(**arguments)

    modules = {"training": training, "trl_dpo": trl_dpo}
    monkeypatch.setattr(measuring, "fresh", here)
    monkeypatch.setitem(measuring.SQUARE, "cpu", 64)


@pytest.fixture
def measured(monkeypatch, capsys, tmp_path):
    """measured(module, flags) runs a command -> (lines of its tables, its JSON), all finite."""

    def call(module, flags):
        file = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["bench", *shlex.split(flags), f"--out={file}"])
        module.main()
        written = json.loads(file.read_text(encoding="utf-8"))
        assert {"torch", "python"} <= written["machine"]["versions"].keys()
        assert all(math.isfinite(number) for number in numbers(written["figures"]))
        shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return [[c.strip() for c in line.strip("|").split("|")] for line in shown], written

    return call


def numbers(value):
    """Every number in nested lists and dicts."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, int | float):
        yield value


def first_column(lines):
    return [line[0] for line in lines if line[0] != "---"]


# ----------------------------------------------------------------------------- what is counted


def count(function):
    """{operation: FLOPs} of torch's own counter; attention as plain matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}


def test_flops_are_those_that_torch_counts(tiny_model_dir):
    """Its counter knows no mask, so its T^2 score products are scaled to the visible pairs."""
    model, size = load(tiny_model_dir), 24
    ids = torch.randint(0, 256, (size,), dtype=torch.int32).numpy()
    trie = lay_out([([ids[:8], ids[8:]], size - 8)])
    row = build_row([trie], [0], 1)
    counted = count(lambda: model(row))
    scores = sum(n for op, n in counted.items() if "bmm" in op)
    flops, c = Flops(model.config), model.config
    assert flops.visible(trie) == c.n_layers * size * (size + 1) // 2
    assert scores == 4 * c.n_layers * c.heads * c.head_width * size**2
    visible = scores * (size + 1) // (2 * size)
    assert flops.forward(trie) == sum(counted.values()) - scores + visible


def test_training_is_three_forwards(tiny_model_dir):
    """Of the linear layers torch counts, forward and backward, 6 N per token."""
    mlp, size = load(tiny_model_dir).blocks[0].mlp.requires_grad_(True), 16
    x = torch.randn(1, size, 32, requires_grad=True)
    counted = sum(count(lambda: mlp(x).sum().backward()).values())
    assert counted == 6 * size * sum(p.numel() for p in mlp.parameters())


def chain(size):
    """The trie of one path of `size` tokens, scored from the fifth on."""
    ids = torch.arange(size, dtype=torch.int32).numpy()
    return lay_out([([ids[:4], ids[4:]], size - 4)])


def test_a_window_hides_pairs(tiny_model_dir):
    c = load(tiny_model_dir).config
    assert Flops(c).visible(chain(10)) == 2 * 55
    narrow = dataclasses.replace(c, windows=(3, None))
    assert Flops(narrow).visible(chain(10)) == 55 + (1 + 2 + 8 * 3)


def test_of_pairs_counts_training_and_reference_once(tiny_model_dir, pairs_file):
    """Of ins_dpo: three forwards of the cross trie and one of the plain one."""
    given = {"model": str(tiny_model_dir), "data": str(pairs_file), "max_len": 256}
    with training.opened(TrainFlags(loss="ins_dpo", batch=4, steps=1, **given)) as (job, _):
        flops, data, recipe = Flops(job.model.config), job.train, job.recipe
        cross, plain = data.trie(5, recipe.paths), data.trie(5, recipe.reference_paths)
        assert flops.of_pairs(data, [5], recipe) == (3 * flops.forward(cross), flops.forward(plain))


@pytest.mark.parametrize("mix", inputs.MIXES)
def test_synthetic_pairs_have_the_lengths_of_their_mix(tiny_model_dir, mix):
    template, wanted = Template(tiny_model_dir), inputs.MIXES[mix]
    rows = inputs.pairs_of(wanted, 60, template)
    prompts = [template.render([{"role": "user", "content": r["prompt"]}], True) for r in rows]
    for part, texts, extra in (
        ("prompt", prompts, 0),
        ("chosen", [r["chosen"] for r in rows], len(template.end_ids)),
        ("rejected", [r["rejected"] for r in rows], len(template.end_ids)),
    ):
        mean = sum(map(len, template.encode(texts))) / 60 + extra
        assert mean == pytest.approx(getattr(wanted, part), rel=0.15), part
    same = inputs.pairs_of(wanted, 3, template, spread=0.0)
    assert len({len(row["chosen"]) for row in same}) == 1


def test_filled_rows_hold_their_pairs():
    for length in (256, 512, 2048, 4096, 16384):
        pairs, mix = inputs.filling(length)
        trie = mix.prompt + 2 * (mix.chosen + mix.rejected) + 4 * 2  # separators are two tokens
        assert 0.9 * length < pairs * trie <= length


def test_noise_is_a_model(tmp_path):
    raw = inputs.resized(inputs.SMALL, layers=1, width=64, vocab=512)
    model = load(inputs.write_noise(tmp_path / "noise", raw))
    logps = model(build_row([chain(12)], [0], 1))
    assert (logps + math.log(512)).abs().max() < 2 and logps.std() > 0
    assert model.config.width == 64 and model.config.n_layers == 1
    with pytest.raises(UserError, match="choose from small, .*llama-3-8b"):
        inputs.published("llama-9")


def test_a_recompilation_is_an_error():
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    compiled(torch.ones(2))
    with training.compiled_once(True), pytest.raises(torch._dynamo.exc.RecompileError):
        compiled(torch.ones(3))
    compiled(torch.ones(3))


def test_matmul_rate_is_work_over_time(monkeypatch):
    monkeypatch.setattr(measuring, "median_seconds", lambda *args: 0.5)
    rate = measuring.matmul_rate([(8, 4), (2, 4)], 16, torch.float32)
    assert rate == 3 * 2 * 16 * 4 * (8 + 2) / (6 * 0.5)


def test_tables():
    assert measuring.table(("a", "b"), [(1234, 0.12345), ("x", None)]).splitlines() == [
        "| a | b |", "| --- | --- |", "| 1,234 | 0.123 |", "| x | - |",
    ]  # fmt: skip
    assert measuring.median([{"v": 1.0, "w": 1}, {"v": 3.0, "w": None}]) == {"v": 2.0, "w": None}
    assert measuring.percent(1, 4) == "25%" and measuring.percent(1, None) is None
    assert measuring.chosen("b; a", ("a", "b", "c")) == ["a", "b"]
    with pytest.raises(UserError, match="d: choose from a; b"):
        measuring.chosen("d", ("a", "b"))


# ----------------------------------------------------------------------------- the commands


def test_a_process_of_its_own_measures_a_run(tiny_model_dir, pairs_file):
    flags = {"loss": "ins_dpo", "model": tiny_model_dir, "data": pairs_file, "max_len": 256}
    found = measuring.fresh("training.measure", **flags, batch=8, steps=3, uncounted=1)
    assert found["pairs"] == 24 and found["tokens_per_pair"] > found["reference_tokens_per_pair"]
    assert found["step seconds"] > 0 and found["peak_gib"] > 0.1
    assert math.isclose(
        1 / found["pairs_per_second"],
        found["step_seconds_per_pair"] + found["reference_seconds_per_pair"],
    )


def test_a_process_that_fails_says_why():
    with pytest.raises(UserError, match="(?s)inputs.published failed.*llama-9: unknown"):
        measuring.fresh("inputs.published", name="llama-9")


def test_pairs_per_second(measured, in_process, tiny_model_dir, pairs_file):
    flags = f"--model {tiny_model_dir} --data {pairs_file} --pairs 8 --batch 4 --max_len 256"
    lines, written = measured(pairs_per_second, flags + " --repeat 2 --only 'dpo; ins_dpo'")
    assert first_column(lines)[:3] == ["contender", "dpo", "ins_dpo"]
    assert {name: len(runs) for name, runs in written["figures"]["runs"].items()} == {
        "matmul rate": 2, "dpo": 2, "ins_dpo": 2,
    }  # fmt: skip
    stages = [line for line in lines if line[0] in training.STAGES]
    assert [line[0] for line in stages] == list(training.STAGES)
    assert all(len(line) == 3 and float(line[1]) > 0 for line in stages)


def test_work_of_a_condition(measured, in_process):
    flags = "--shape small --mix hh --only 'dpo; ins_dpo; averaged, turn' --pairs 4 --batch 2"
    lines, written = measured(pairs_per_second, flags + " --max_len 8192 --no-train")
    assert first_column(lines) == ["contender", "dpo", "ins_dpo", "averaged, turn"]
    counts = written["figures"]["work"]
    assert counts["dpo"]["tokens"] == counts["dpo"]["reference_tokens"]
    assert counts["ins_dpo"]["reference_tokens"] == counts["dpo"]["tokens"]
    assert counts["dpo"]["tokens"] < counts["ins_dpo"]["tokens"]
    assert counts["dpo"]["work"] < counts["ins_dpo"]["work"] < counts["ins_dpo"]["alone"]
    assert lines[2][3] == "1.00x"


UTILISATION = "--fill --utilisation --only row_tokens --layers 1 --width 0 --vocab 300 --steps 1 "


def test_utilisation(measured, in_process):
    lines, written = measured(growth, UTILISATION + "--row_tokens 256,512")
    assert first_column(lines) == ["", "row_tokens 256", "row_tokens 512"] * 3
    assert lines[10][2].endswith("%")
    mean, largest = written["figures"]["gap"]
    assert 0 <= mean <= largest < 1e-3


def test_utilisation_refuses_wrong_log_probabilities(measured, in_process, monkeypatch):
    monkeypatch.setitem(growth.FARTHEST, "fp32", (-1.0, -1.0))
    with pytest.raises(UserError, match="nats from the reference"):
        measured(growth, UTILISATION + "--row_tokens 256")


def test_memory_of_a_step(measured, in_process):
    flags = "--fill --only 'row_tokens; vocab' --layers 1 --width 64 --vocab 300,600"
    lines, _ = measured(growth, flags + " --row_tokens 256,512 --steps 1")
    names = ["row_tokens 256", "row_tokens 512", "vocab 300", "vocab 600"]
    assert first_column(lines)[6:] == names
    logits = [float(line[-1]) for line in lines[-4:]]
    assert logits[0] == logits[2] == pytest.approx(logits[3] / 2, rel=1e-2)
    assert logits[1] == pytest.approx(2 * logits[0], rel=0.1)


def test_growth(measured, in_process):
    flags = "--pairs 8,16 --row_tokens 1024,2048 --width 64 --processes 1 --batch 4 --steps 1"
    lines, _ = measured(growth, flags)
    names = ["pairs 8", "pairs 16", "row_tokens 1,024", "row_tokens 2,048", "width 64"]
    assert first_column(lines)[1:7] == [*names, "processes 1"]


def test_activations_and_loading(measured):
    """In processes of their own, where memory is theirs."""
    lines, written = measured(memory, "activations --tokens 64 --shapes llama-3.2-1b")
    assert first_column(lines) == ["two layers of", "llama-3.2-1b"]
    found = written["figures"]["llama-3.2-1b"]
    assert 0.5 < found["kept"] / found["kept: plan"] < 2
    assert 0 <= found["recomputed"] < found["kept"]
    lines, written = measured(memory, "loading --shape small --processes 1")
    assert first_column(lines) == ["", "1 process"]
    with pytest.raises(UserError, match="activations or loading"):
        measured(memory, "everything")


def test_data_preparation(measured, tiny_model_dir, pairs_file):
    flags = f"--model {tiny_model_dir} --source {pairs_file} --sizes 8 --peer_pairs 0"
    lines, written = measured(data_preparation, flags)
    assert [line[:2] for line in lines[2:]] == [["8, first", "8"], ["8, cached", "8"]]


def test_rows_of_a_steps_own_length_are_fuller(measured, pairs_file):
    lines, _ = measured(row_fill, f"--data {pairs_file} --losses dpo --batch 8 --row_tokens 1024")
    assert [line[1] for line in lines[2:]] == ["8", "16"]
    assert all(float(limit) < float(alike) <= 1 for _, _, limit, alike, _ in lines[2:])


def test_gradients_without_contexts(measured, tiny_model_dir, pairs_file):
    flags = f"--model {tiny_model_dir} --data {pairs_file} --pairs 2 --seeds 0"
    lines, written = measured(context_grad, flags)
    assert first_column(lines)[1:] == list(context_grad.FORMS)
    assert all(0 < cosine < 1 for cosine, _ in written["figures"]["gradient"].values())


@pytest.fixture
def few(tiny_model_dir, pairs_file):
    """Flags of bench.defaults: two steps of two pairs."""
    return f"--model {tiny_model_dir} --data {pairs_file} --batch 2 --steps 2 --max_len 256 "


def test_defaults_are_held_against_the_plain_rule(measured, few, monkeypatch):
    """In bf16; and defaults that see beyond a branch move the weights elsewhere: an error."""
    lines, _ = measured(defaults, few + "--only plain --dtype bf16")
    assert first_column(lines)[1:] == ["plain rule in fp32", "plain rule", "defaults"]
    assert lines[3][1:] == lines[4][1:] != lines[2][1:], "on a CPU the plain rule is the default"
    trained = defaults.trained

    def broken(flags):
        attend = train.chains.attend
        if flags.get("compile") is None:
            monkeypatch.setattr(train.chains, "attend", lambda row, c: attend(beyond(row), c))
        return trained(flags)

    def beyond(row):
        return dataclasses.replace(row, until=row.until + 1)

    monkeypatch.setattr(defaults, "trained", broken)
    with pytest.raises(UserError, match="of the defaults are .* where rounding explains 0"):
        measured(defaults, few + "--only plain")


@pytest.mark.slow  # four processes that each import torch
def test_a_stopped_run_goes_on_bitwise_on_a_cpu(measured, few):
    lines, _ = measured(defaults, few + "--only resume")
    assert first_column(lines)[1:] == ["stopped and resumed, bitwise equal"]
    assert len(lines[2][1].split()) == 4 and lines[2][2:] == ["0.00%", "0.00%"]


def test_savers_of_memory_are_measured_where_they_are_named(measured, in_process):
    flags = "--shape small --mix hh --pairs 2 --batch 1 --repeat 1 --max_len 256"
    lines, _ = measured(pairs_per_second, flags + " --only 'ins_dpo, recomputed; ins_dpo, offload'")
    assert first_column(lines)[1:3] == ["ins_dpo, recomputed", "ins_dpo, offload"]


@pytest.mark.parametrize("outcome", ["ok", "failed", "out of time"])
def test_a_part_of_the_gpu_script_that_fails_leaves_the_others_theirs(outcome, tmp_path):
    """In order of worth, within ten minutes; the commands are stood in for."""
    script = (ROOT / "bench" / "gpu.sh").read_text(encoding="utf-8")
    parts = re.findall(r"^measure (\d+) (\w+)", script, re.M)
    assert sum(int(limit) for limit, _ in parts) <= 590
    names = [name for _, name in parts]
    assert names[:4] == ["plain", "resume", "utilisation", "trl"]
    assert names[4:] == ["offload", "recomputation", "generation"]
    stand_in, status = tmp_path / "python", {"ok": 0, "failed": 1, "out of time": 124}[outcome]
    stand_in.write_text(f"#!/bin/sh\ncase $* in *utilisation*) exit {status};; esac\necho table\n")
    stand_in.chmod(0o755)
    words = ["bash", str(ROOT / "bench" / "gpu.sh"), str(tmp_path / "out")]
    env = os.environ | {"PYTHON": str(stand_in)}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    told = [f"{name}: {outcome if name == 'utilisation' else 'ok'}" for name in names]
    assert done.stdout.split("== summary\n")[1].splitlines() == told
    assert (done.returncode == 0) is (outcome == "ok")
    assert (tmp_path / "out" / "generation.md").read_text() == "table\n"


def test_a_run_in_the_small_world(tmp_path):
    """Every number is told, and what is kept of a run is read again as it was."""
    stages = (small_world.Stage("ins_dpo", 3e-4, steps=1),)
    job = small_world.Job(("forms", "dpo", "ins"), "start", "separable", 0, stages)
    file = tmp_path / "results.jsonl"
    known = small_world.run_all([job], file, {}, 1)
    assert small_world.read_results(file, small_world.as_job) == known
    assert known[job].keys() >= {*small_world_report.MEASURES, "cpu_seconds"}
    assert 0.9 < known[job]["mass"] <= 1 and 0.3 < known[job]["plain"] < 0.7


def test_the_small_worlds_tables_are_those_of_its_data():
    found = small_world_report.Found()
    page = small_world_report.page(found)
    for file, part in small_world_report.PARTS.items():
        assert part(found) in file.read_text(encoding="utf-8"), file
    assert page.count("| dpo |") == 4 * len(small_world_report.MEASURES) + 1


def test_a_moment_belongs_to_the_part_whose_forward_it_answers():
    """A hand-made profile, in microseconds: node 7 answers the MLP, node 8 is nobody's."""

    def event(name, own, parent=None, sequence_nr=-1):
        return SimpleNamespace(name=name, self_cpu_time_total=own, cpu_parent=parent,
                               sequence_nr=sequence_nr)  # fmt: skip

    step = event("host", 1)
    mlp = event("MLP", 2, step)
    nodes = [event(f"autograd::engine::evaluate_function: {n}", 20, None, n) for n in (7, 8)]
    events = [step, mlp, event("aten::mm", 4, mlp, 7), event("aten::add", 8, step, 9), *nodes]
    events += [event("MmBackward0", 100, nodes[0], 7), event("aten::mm", 200, nodes[1], 8)]
    events += [event("Optimizer.step#AdamW.step", 1000, step), event("FSDP::pre_forward", 2000)]
    spent = {"host": 9, "MLP": 126, "rest of the model": 220, "optimizer": 1000, "sharding": 2000}
    assert profile_step.attribute(events) == pytest.approx({k: v / 1e6 for k, v in spent.items()})


def test_profile_counts_every_recorded_moment_once(
    measured, tiny_model_dir, pairs_file, monkeypatch
):
    attribute, recorded = profile_step.attribute, []
    monkeypatch.setattr(
        profile_step, "attribute", lambda *args: recorded.append(args[0]) or attribute(*args)
    )
    flags = f"--model {tiny_model_dir} --data {pairs_file} --pairs 8 --batch 8 --max_len 256"
    lines, written = measured(profile_step, flags)
    for spent, events in zip(written["figures"].values(), recorded, strict=True):
        roots = [e for e in events if e.cpu_parent is None and not e.is_async]  # those overlap
        whole = sum(e.cpu_time_total for e in roots) / 1e6
        assert sum(spent[p] for p in profile_step.PARTS) == pytest.approx(whole, rel=1e-3)
        busy = ("attention: projections", "attention: scores", "MLP", "head", "optimizer", "clip")
        assert all(spent[part] > 0 for part in busy)
    assert lines[0] == ["part", "dpo", "ins_dpo"]


def test_generation_agrees_with_transformers(measured, tiny_model_dir, pairs_file):
    pytest.importorskip("transformers")
    flags = f"--model {tiny_model_dir} --data {pairs_file} --pairs 4 --batches 1,3"
    lines, _ = measured(generation, flags + " --max_new_tokens 6 --repeat 1")
    assert [line[-1] for line in lines[2:]] == ["-", "1 of 1", "-", "4 of 4"]


@pytest.mark.slow
def test_the_peer_is_measured_beside_us(measured, tiny_model_dir, pairs_file):
    pytest.importorskip("trl")
    flags = f"--model {tiny_model_dir} --data {pairs_file} --pairs 8 --batch 4 --micro 2"
    flags += " --repeat 1 --max_len 256 --only 'dpo; TRL dpo, reference precomputed'"
    lines, written = measured(pairs_per_second, flags)
    assert lines[3][:1] == ["TRL dpo, reference precomputed"] and lines[3][2] == "1.00x"


# ----------------------------------------------------------------------------- what the docs say


def calls():
    """Every call of bench/ in gpu.sh, the docs and the files' own heads -> (name, flags)."""
    script = (ROOT / "bench" / "gpu.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    for name, words in re.findall(r"^(\w+)=\((.*)\)$", script, re.M):
        script = script.replace(f'"${{{name}[@]}}"', words)
    yield from re.findall(r"^measure \d+ \w+ (\w+) (.*)$", script, re.M)
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for text in (*texts, *(Path(m.__file__) for m in COMMANDS.values())):
        text = text.read_text(encoding="utf-8").replace("\\\n", " ")
        yield from re.findall(r"python -m bench\.(\w+)([^\n`#]*)", text)
        assert "python bench/" not in text


def flags_of(module):
    """The dataclass of a command's flags."""
    return next(
        value
        for name, value in vars(module).items()
        if name.endswith("Flags") and value.__module__ == module.__name__
    )


def test_every_flag_of_every_call_exists():
    found = list(calls())
    assert {name for name, _ in found} == set(COMMANDS)
    for name, words in found:
        options = parser_of(flags_of(COMMANDS[name]), "")._option_string_actions
        for word in re.findall(r"(?<!\S)--[\w-]+", words):
            assert word in options, f"{name}: {word}"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc 2.33 or later")
@pytest.mark.parametrize("keep", [True, False])
def test_a_run_keeps_freed_memory_and_the_benchmarks_do_not_count_it_as_held(keep):
    """256 MB taken and freed, in a process with Ranks and in one without."""
    program = "import torch; from bench.measuring import kept_bytes; "
    program += "from jobs.processes import Ranks; " + "Ranks('cpu'); " * keep
    program += "x = torch.ones(2**26); del x; print(kept_bytes())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (int(done.stdout) >= 2**28) is keep, done.stderr


# ----------------------------------------------------------------------------- a busy machine


def test_what_busy_processes_cost_is_told_by_ratios(monkeypatch, tmp_path, capsys):
    seconds = {(): {0: 10.0, 2: 25.0}, ("GOMP_SPINCOUNT",): {0: 8.0, 2: 80.0}}

    def scripted(s, variables, loops):
        return {"run": seconds[tuple(variables)][loops], "step": None, "load": 0.0}

    monkeypatch.setattr(busy, "measure", scripted)
    words = ["--only", "chosen here; as OpenMP does", "--out", str(tmp_path / "busy.json")]
    monkeypatch.setattr(sys, "argv", ["busy", *words])
    busy.main()
    rows = [line.strip("| ").split(" | ")[5:] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["10", "25", "2.50x", "1.25x"], ["8", "80", "10.00x", "1.00x"]]


def test_the_busy_loops_end_with_their_block():
    with busy.busy(1) as (loop,):
        assert loop.poll() is None
    assert loop.poll() is not None
