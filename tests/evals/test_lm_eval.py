"""General ability: what lm-evaluation-harness needs of an exported model, and the task we bring."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from assets import world
from evals.world import world_probabilities
from generate import load_model
from jobs.files import ASSETS

TASKS = Path(__file__).parents[2] / "bench" / "lm_eval"


@pytest.fixture(scope="module")
def docs():
    pytest.importorskip("datasets")
    spec = importlib.util.spec_from_file_location("facts", TASKS / "facts.py")
    facts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(facts)
    return list(facts.dataset(version=1.0)["test"])


def test_the_choices_differ_in_the_fact_alone(docs):
    """20 questions in 8 ways to greet, reason and close; the right answer comes first."""
    assert len({(doc["question"], *doc["choices"]) for doc in docs}) == len(docs) == 20 * 8
    facts = {question: (right, wrong) for question, right, wrong, _ in world.FACTS}
    for doc in docs:
        right, wrong = facts[doc["question"]]
        assert doc["choices"][0].replace(right, wrong) == doc["choices"][1] != doc["choices"][0]


def accuracy(directory, docs):
    """What the harness computes for its `acc`, by transformers alone, choice by choice."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def loglikelihood(question, choice):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        x, y = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, choice))
        logps = model(torch.tensor([x + y])).logits[0, len(x) - 1 : -1].log_softmax(-1)
        return logps.gather(1, torch.tensor(y)[:, None]).sum().item()

    with torch.no_grad():
        scores = [[loglikelihood(doc["question"], c) for c in doc["choices"]] for doc in docs]
    return sum(right > wrong for right, wrong in scores) / len(scores)


def test_an_exported_model_answers_the_task_in_transformers(docs):
    """The embedded model, loaded as the harness does, and this project's own probabilities of the
    whole answers, which also count the end token: the two agree on nearly every question."""
    start = ASSETS / "start"
    policy = world_probabilities(*load_model(str(start)))  # (20, 16)
    right, wrong = ((world.CHOICES[:, 1] == fact).nonzero()[0] for fact in (1, 0))
    own = (policy[:, right] > policy[:, wrong]).mean()
    assert accuracy(start, docs) == pytest.approx(own, abs=0.05)


@pytest.mark.slow
def test_lm_evaluation_harness_itself(docs, tmp_path):
    """The command of docs/evaluation.md; its accuracy is the one computed here."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed: pip install lm_eval==0.4.13")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--apply_chat_template"]
    command += ["--model_args", f"pretrained={ASSETS / 'start'},dtype=float32", "--device", "cpu"]
    command += ["--tasks", "small_world_facts", "--include_path", str(TASKS)]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path)],
        env=os.environ | offline, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
    found = results["results"]["small_world_facts"]["acc,none"]
    assert found == pytest.approx(accuracy(ASSETS / "start", docs))
