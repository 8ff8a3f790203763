"""Writes what bench/known_preference.py found: docs/known_preference.{json,png}, docs/results.md.

A cell is the mean over seeds and test prompts with its 95% bootstrap interval, both drawn anew;
`*`: the difference to the plain form, on the same seeds and prompts, has an interval without 0.
"""

import numpy as np

from bench.measuring import ROOT, machine, put_between, table
from jobs.files import write_json

JSON = ROOT / "docs" / "known_preference.json"
PAGE = ROOT / "docs" / "results.md"
MARKS = "<!-- bench/known_preference.py -->", "<!-- /bench/known_preference.py -->"
VIEWS = ("plain", "shown", "refined")
DIGITS = {"reward": 3, "kl": 2, "length": 0}


def cells_of(known):
    """{Job: result} -> rows {kind, form, lr, seeds, wins {view: (seeds, prompts)}, reward, …}."""
    cells = {}
    for job, result in sorted(known.items(), key=lambda item: item[0].seed):
        if "wins" in result:
            fresh = {"kind": job.kind, "form": job.form, "lr": job.lr, "seeds": []}
            fresh |= {"wins": {view: [] for view in VIEWS}} | {name: [] for name in DIGITS}
            cell = cells.setdefault((job.kind, job.form), fresh)
            cell["seeds"].append(job.seed)
            for view in VIEWS:
                cell["wins"][view].append(result["wins"][view])
            for name in DIGITS:
                cell[name].append(round(result[name], 4))
    return list(cells.values())


def interval(values, draws=2000):
    """95% bootstrap interval of the mean of (seeds, prompts) values, both drawn anew."""
    values, rng = np.array(values), np.random.default_rng(0)
    n, m = values.shape
    means = [
        values[rng.integers(n, size=n)][:, rng.integers(m, size=m)].mean() for _ in range(draws)
    ]
    return np.quantile(means, (0.025, 0.975))


def rate(cell, plain, view):
    """One win rate in percent, with its interval and mark."""
    values = np.array(cell["wins"][view])
    low, high = interval(values)
    text = f"{100 * values.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    shared = [seed for seed in cell["seeds"] if seed in plain["seeds"]]
    if cell is plain or not shared:
        return text
    own, its = (
        np.array([c["wins"][view][c["seeds"].index(seed)] for seed in shared])
        for c in (cell, plain)
    )
    low, high = interval(own - its)
    return text + ("*" if low > 0 or high < 0 else "")


def tables(cells):
    """One table per kind of preference."""
    parts = []
    for kind in dict.fromkeys(cell["kind"] for cell in cells):
        own = [cell for cell in cells if cell["kind"] == kind]
        plain = next((cell for cell in own if cell["form"] == "plain"), own[0])
        rows = [
            [cell["form"], f"{cell['lr']:g}", str(len(cell["seeds"]))]
            + [rate(cell, plain, view) for view in VIEWS]
            + [f"{np.mean(cell[name]):.{digits}f}" for name, digits in DIGITS.items()]
            for cell in own
        ]
        head = [kind, "lr", "seeds", *(f"{view}, %" for view in VIEWS), *DIGITS]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def draw(cells, file):
    """Win rate against KL: prompt-only (full) and shown the answer to beat (hollow), by seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(cell["kind"] for cell in cells))
    figure, axes = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 4.2), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        for n, cell in enumerate(cell for cell in cells if cell["kind"] == kind):
            for view, full in (("plain", f"C{n}"), ("shown", "none")):
                rates = 100 * np.array(cell["wins"][view]).mean(1)
                label = cell["form"] if view == "plain" else None
                axis.plot(cell["kl"], rates, "o", color=f"C{n}", mfc=full, label=label)
        axis.axhline(50, color="k", lw=0.7)
        axis.set(title=kind, xlabel="KL(policy || start), nats", ylabel="win rate, %")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False, fontsize=8, title="full: prompt only; hollow: shown")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def write(known):
    """The files named above, from {Job: result}; returns the tables."""
    cells = cells_of(known)
    if not cells:
        return "no run is done yet"
    write_json(JSON, {"machine": machine(), "cells": cells})
    draw(cells, JSON.with_suffix(".png"))
    put_between(MARKS, tables(cells), PAGE)
    return tables(cells)
