"""Bootstrap intervals are the textbook's, and a tie is no win."""

import numpy as np
import pytest

from evals.stats import Estimate, estimate, win_rate


def test_bootstrap_of_two_values_by_hand():
    """Means of two draws from (0, 1) are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    assert estimate([0, 1]) == Estimate(0.5, 0.0, 1.0)
    assert estimate([3, 3, 3]) == Estimate(3.0, 3.0, 3.0)
    assert f"{Estimate(0.5, 0.25, 0.75):.0%}" == "50% [25%, 75%]"


def test_bootstrap_is_the_normal_interval():
    """mean ± 1.96 std / sqrt(n), for many values; by 4% at 10,000 resamples."""
    rng = np.random.default_rng(0)
    for values in (rng.normal(2, 3, 2000), rng.random(2000) < 0.3, rng.exponential(size=2000)):
        mean, low, high = estimate(values, seed=1)
        half = 1.96 * values.std() / 2000**0.5
        assert mean == pytest.approx(values.mean())
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.04 * half)


def test_bootstrap_covers_the_truth():
    """95% of the intervals hold the mean of what was sampled, to chance and small n."""
    rng = np.random.default_rng(0)
    samples = [estimate(rng.normal(size=60), seed, 1000) for seed in range(300)]
    assert 0.91 < np.mean([e.low < 0 < e.high for e in samples]) < 0.98


def test_bootstrap_repeats_with_its_seed():
    values = np.random.default_rng(0).normal(size=3000)  # more than one block of resamples
    assert estimate(values, 5) == estimate(values, 5) != estimate(values, 6)


def test_a_tie_is_no_win():
    """Two wins, one tie, one loss."""
    wins, ties = win_rate([1.0, 2.0, 3.0, 0.0], [0.5, 1.5, 3.0, 1.0])
    assert (wins.mean, ties) == (0.5, 1)
    wins, ties = win_rate([3.0, 3.0], [3.0, 3.0])
    assert (wins, ties) == (Estimate(0.0, 0.0, 0.0), 2)
