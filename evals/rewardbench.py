"""Computes RewardBench: a reward model's accuracy on pairs by section (arXiv 2403.13787).

A pair is won where the chosen answer's score is strictly higher. A section's accuracy weighs its
subsets by the number of their prompts, but that math-prm weighs as much as all the code together
(984, of 447 prompts); the score is the mean of the four sections. Subsets, numbers and weights are
those of the `rewardbench` package's constants. The leaderboard once added a fifth section of older
test sets ("Prior Sets", at half weight), which is not part of it here.
"""

import numpy as np

from evals.results import table
from evals.stats import ratio_of_sums
from jobs.files import ASSETS, read_json

SECTIONS = read_json(ASSETS / "rewardbench.json")  # {section: {subset: weight}}
RESAMPLES = 2_000  # of the bootstrap over pairs


def sections(subsets, wins, seed=0):
    """{section: Estimate} of the sections whose subsets are all there, and "score" if all four are.

    subsets: (N,) names, of which others than RewardBench's are passed over; wins: (N,) 0 or 1.
    Prints them, and the subsets that are missing from sections of which some are there.
    """
    subsets, wins = np.asarray(subsets), np.asarray(wins, dtype=np.float64)
    counts = dict(zip(*np.unique(subsets, return_counts=True), strict=True))
    parts, missing, found, weights = {}, [], {}, np.zeros(len(wins))
    for section, shares in SECTIONS.items():
        lacking = [subset for subset in shares if subset not in counts]
        if lacking:
            missing += lacking if len(lacking) < len(shares) else []
            continue
        parts[section] = part = np.isin(subsets, list(shares))
        total = sum(shares.values())
        weights[part] = [shares[name] / counts[name] / total for name in subsets[part]]
    if len(parts) == len(SECTIONS):
        parts["score"] = weights > 0
    for name, part in parts.items():
        found[name] = ratio_of_sums((wins * weights)[part], weights[part], seed, RESAMPLES)
    if found:
        rows = [{"RewardBench": name, "accuracy": share} for name, share in found.items()]
        print(table(rows, ".1%"))
    if missing:
        print(f"RewardBench: sections left out for want of {', '.join(missing)}")
    return found
