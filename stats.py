"""What a mean is worth: intervals by the bootstrap, win rates.

Legend: N prompts, pairs or questions, R resamples.
"""

from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    def __format__(self, form):
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


def estimate(values, seed=0, resamples=10_000):
    """(N,) values -> Estimate of their mean, by the percentile bootstrap (Efron 1979).

    The interval of a difference or a win rate is that of the per-prompt differences or wins, so
    both sides are always resampled together. Equal seeds resample equally many values alike.
    """
    values, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    block = max(1, 2**22 // len(values))  # resamples at a time
    means = [
        values[rng.integers(len(values), size=(min(block, resamples - done), len(values)))].mean(1)
        for done in range(0, resamples, block)
    ]  # (R,) in all
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def win_rate(scores, others, seed=0):
    """Share of prompts whose score is strictly higher -> (Estimate, number of ties, no wins)."""
    scores, others = np.asarray(scores), np.asarray(others)
    return estimate(scores > others, seed), int((scores == others).sum())
