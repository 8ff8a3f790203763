"""The documents of the task in small_world_facts.yaml, for lm-evaluation-harness."""

import sys
from pathlib import Path

import datasets

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from assets.world import CHOICES, answers, questions  # noqa: E402


def dataset(**metadata):
    """{"test": Dataset of {question, choices}}: the right answer first, and the wrong one.

    The two differ in the fact alone; every question comes in each of the 8 ways to greet, reason
    and close. Chance is one half. metadata: the task's own, which the harness hands in.
    """
    wrong, right = ((CHOICES[:, 1] == fact).nonzero()[0] for fact in (0, 1))
    rows = [
        {"question": question, "choices": [answers(question)[i] for i in pair]}
        for question in questions()
        for pair in zip(right, wrong, strict=True)
    ]
    return {"test": datasets.Dataset.from_list(rows)}
