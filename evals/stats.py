"""Computes bootstrap intervals, win rates and weighted logistic regressions.

Legend: N prompts, pairs or questions, R resamples, D features.
"""

from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean, or another statistic, and its 95% interval."""

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
    return interval(float(values.mean()), np.concatenate(means))


def interval(value, resampled):
    """A statistic and its (R,) values on resamples -> Estimate, by percentiles."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def t_interval(values):
    """(N,) values, N at least 2, say one per seed -> Estimate of their mean by Student's t.

    The bootstrap's intervals of so few values are too narrow. The quantile is summed up on a grid:
    with t = sqrt(df) tan(a) the density of a goes as cos(a)^(df - 1).
    """
    values = np.asarray(values, dtype=np.float64)
    df = len(values) - 1
    angles = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    mass = (np.cos(angles) ** (df - 1)).cumsum()
    quantile = df**0.5 * np.tan(angles[np.searchsorted(mass, 0.975 * mass[-1])])
    half, mean = quantile * values.std(ddof=1) / len(values) ** 0.5, values.mean()
    return Estimate(float(mean), float(mean - half), float(mean + half))


def win_rate(scores, others, seed=0):
    """Share of prompts whose score is strictly higher -> (Estimate, number of ties, no wins)."""
    return estimate(np.greater(scores, others), seed), int(np.equal(scores, others).sum())


def ratio_of_sums(above, below, seed=0, resamples=10_000):
    """Estimate of sum(above) / sum(below) over N questions that are resampled whole.

    above, below: (N,), say a question's weighted wins and its weights.
    """
    above, below = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    counts = resample(len(above), seed, resamples)  # (R, N)
    return interval(above.sum() / below.sum(), (counts @ above) / (counts @ below))


def resample(n, seed, resamples):
    """How often each of n questions is drawn in each resample: (R, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)


def sigmoid(z):
    return 0.5 * (1 + np.tanh(0.5 * z))


def logistic(x, y, weight, l1=0.0, start=None, steps=100, tolerance=1e-10):
    """Weighted logistic regression without intercept, on soft labels: the (D,) coefficients w of

        min  l1 |w|_1 + sum_i weight_i [log(1 + exp z_i) - y_i z_i],   z = x w

    x (N, D), y (N,) in [0, 1], weight (N,). By Newton steps, each a small lasso where l1 > 0, and
    each halved until it descends. Where the classes can be separated and l1 is 0, w has no
    maximum and stops growing after `steps`.
    """

    def objective(w):
        z = x @ w
        return l1 * np.abs(w).sum() + (weight * (np.logaddexp(0, z) - y * z)).sum()

    w = np.zeros(x.shape[1]) if start is None else start
    value = objective(w)
    for _ in range(steps):
        p = sigmoid(x @ w)
        gradient = x.T @ (weight * (p - y))
        hessian = (x.T * (weight * p * (1 - p))) @ x + 1e-9 * np.eye(len(w))
        step = lasso(hessian, gradient, w, l1) - w if l1 else -np.linalg.solve(hessian, gradient)
        for _ in range(30):
            moved = objective(w + step)
            if moved <= value:
                break
            step = step / 2
        gain = value - moved
        if gain <= tolerance * (abs(value) + 1):
            return w + step if gain >= 0 else w
        w, value = w + step, moved
    return w


def lasso(hessian, gradient, w, l1, sweeps=200):
    """argmin_v of gradient·(v - w) + ½ (v - w)·hessian (v - w) + l1 |v|_1: coordinate descent."""
    h, v = hessian.tolist(), w.tolist()
    linear = (gradient - hessian @ w).tolist()
    coordinates = range(len(v))
    for _ in range(sweeps):
        change = 0.0
        for i in coordinates:
            pull = linear[i] + sum(h[i][j] * v[j] for j in coordinates) - h[i][i] * v[i]
            moved = -np.sign(pull) * max(abs(pull) - l1, 0.0) / h[i][i]
            change, v[i] = max(change, abs(moved - v[i])), float(moved)
        if change < 1e-12:
            break
    return np.array(v)
