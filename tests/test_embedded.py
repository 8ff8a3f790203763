"""`torchrun train.py --loss ins_dpo`, the README's first command, and what it leaves."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
PROMPTS = ["What colour is a clear sky?", "What do bees make?", "Where does the sun rise?"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(standard output, run directory) of the first command, into another --out."""
    out = tmp_path_factory.mktemp("embedded") / "ins_dpo"
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [torchrun, "train.py", "--loss", "ins_dpo", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, out


def test_the_exact_win_rate_goes_up_by_20_points_or_more(run):
    stdout, out = run
    before, after = map(float, re.search(r"before ([\d.]+)%, after ([\d.]+)%", stdout).groups())
    assert before == 50.0  # of the start against itself
    assert after >= 70.0
    assert stdout.rstrip().endswith(f"saved: {out / 'final'}")


def test_the_run_leaves_what_the_readme_says(run):
    _, out = run
    for name in ("config.json", "metrics.jsonl", "curves.png", "reference.safetensors"):
        assert (out / name).stat().st_size > 0
    assert (out / "best" / "model.safetensors").exists()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 61))
    evals = [line for line in lines if "eval_loss" in line]
    assert evals[-1]["eval_loss"] < evals[0]["eval_loss"]
    assert evals[-1]["eval_plain_margin"] > evals[0]["eval_plain_margin"]


def test_transformers_gives_the_same_greedy_answers(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    final, answers = run[1] / "final", tmp_path / "answers.jsonl"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    command = [sys.executable, "generate.py", "--model", final, "--data", prompts]
    command += ["--temperature", 0, "--max_new_tokens", 60, "--dtype", "fp32", "--out", answers]
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, capture_output=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(final, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    for prompt, line in zip(PROMPTS, answers.open(), strict=True):
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=60)[0]
        text = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert json.loads(line)["answer"] == text


def test_an_embedded_reward_model_ends_well_without_a_win_rate(ended, tmp_path):
    """It answers nothing, so nothing can be won: the command once failed after its export."""
    words = ["--loss", "reward", "--steps", 1, "--limit", 40, "--eval_pairs", 4]
    out, err, status = ended(train, *words, "--device", "cpu", "--out", tmp_path / "out")
    assert status == 0, err
    assert "win rate" not in out and (tmp_path / "out" / "final" / "config.json").exists()
