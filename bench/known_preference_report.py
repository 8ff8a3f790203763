"""Writes what bench/known_preference.py found: docs/known_preference.{json,png}, docs/results.md.

Of plain training: means over seeds and test prompts, in percent. Of the other forms: differences to
it on the same seeds and prompts, in points, with a 95% bootstrap interval, both drawn anew, bold
where it leaves out 0. `own rate`: each form at the one of its learning rates that foretells the
held-out pairs of all seeds best. `KL 1`: read over sqrt(KL) between the start, which wins half, and
a form's runs; `-` where a seed's runs do not go as far.
"""

from collections import defaultdict

import numpy as np

from bench.measuring import ROOT, gap, machine, put_between, table
from jobs.files import write_json

JSON = ROOT / "docs" / "known_preference.json"
PAGE = ROOT / "docs" / "results.md"
MARKS = "<!-- bench/known_preference.py -->", "<!-- /bench/known_preference.py -->"
VIEWS = ("plain", "shown", "refined")
KL = 1.0  # nats, at which forms are compared
DIGITS = {"reward": 3, "kl": 2, "length": 1, "held": 3}


def cells_of(known):
    """{Job: result} -> rows {kind, form, lr, seeds, wins {view: (seeds, prompts)}, reward, …}."""
    cells = {}
    for job, result in sorted(known.items(), key=lambda item: item[0].seed):
        fresh = {"kind": job.kind, "form": job.form, "lr": job.lr, "seeds": []}
        fresh |= {"wins": {view: [] for view in VIEWS}} | {name: [] for name in DIGITS}
        cell = cells.setdefault((job.kind, job.form, job.lr), fresh)
        cell["seeds"].append(job.seed)
        for view in VIEWS:
            cell["wins"][view].append(result["wins"][view])
        for name in DIGITS:
            cell[name].append(round(result[name], 4))
    return list(cells.values())


def own_rate(cells):
    """The one of a form's cells that foretells held-out pairs best, of those with every seed."""
    most = max(len(cell["seeds"]) for cell in cells)
    whole = [cell for cell in cells if len(cell["seeds"]) == most]
    return min(whole, key=lambda cell: np.mean(cell["held"]))


def by_seed(cell, view):
    """{seed: (prompts,) win rates} of a cell."""
    return dict(zip(cell["seeds"], map(np.array, cell["wins"][view]), strict=True))


def at_kl(cells, kl):
    """{seed: (prompts,) plain win rates} of a form's cells, one per rate, at a KL to the start."""
    found = {}
    for seed in sorted({seed for cell in cells for seed in cell["seeds"]}):
        runs = [(cell, cell["seeds"].index(seed)) for cell in cells if seed in cell["seeds"]]
        runs.sort(key=lambda run: run[0]["kl"][run[1]])
        far = np.maximum(0, [0.0, *(cell["kl"][n] for cell, n in runs)])
        if far[-1] >= kl:
            wins = np.array([cell["wins"]["plain"][n] for cell, n in runs])
            wins = np.concatenate([np.full_like(wins[:1], 0.5), wins])
            found[seed] = [np.interp(kl**0.5, far**0.5, row) for row in np.eye(len(far))] @ wins
    return found


def difference(values, others, draws=2000):
    """Of two {seed: (prompts,) win rates}: mean difference in points, and its interval."""
    shared = sorted(set(values) & set(others))
    if not shared or len(shared) < len(others):
        return "-"
    gaps = 100 * np.array([values[seed] - others[seed] for seed in shared])
    (n, m), rng = gaps.shape, np.random.default_rng(0)
    means = [gaps[rng.integers(n, size=n)][:, rng.integers(m, size=m)].mean() for _ in range(draws)]
    return gap(gaps.mean(), *np.quantile(means, (0.025, 0.975)))


def rows_of(kind, forms):
    """Table rows of one preference; forms: {form: its cells, one per rate}."""
    best = {form: own_rate(cells) for form, cells in forms.items()}
    wins = {(view, "own rate"): {form: by_seed(cell, view) for form, cell in best.items()}
            for view in VIEWS}  # fmt: skip
    wins["plain", f"KL {KL:g}"] = {form: at_kl(cells, KL) for form, cells in forms.items()}
    for (view, where), found in sorted(wins.items(), key=lambda item: VIEWS.index(item[0][0])):
        plain, *others = found.values()
        mean = f"{100 * np.mean([*plain.values()]):.1f}" if plain else "-"
        yield [kind, view, where, mean, *(difference(other, plain) for other in others)]
    for name, digits in DIGITS.items():
        yield [kind, name, "own rate", *(f"{np.mean(c[name]):.{digits}f}" for c in best.values())]
    yield [kind, "lr", "own rate", *(f"{cell['lr']:g}" for cell in best.values())]


def by_form(cells):
    """{kind: {form: its cells}}."""
    kinds = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        kinds[cell["kind"]][cell["form"]].append(cell)
    return kinds


def results_table(cells):
    kinds = by_form(cells)
    rows = [row for kind, forms in kinds.items() for row in rows_of(kind, forms)]
    return table(["preference", "measure", "at", *next(iter(kinds.values()))], rows)


def draw(cells, file):
    """Win rates against KL: a column per preference, a row per view; small: single runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = by_form(cells)
    size = {"figsize": (5 * len(kinds), 3 * len(VIEWS)), "squeeze": False, "sharex": "col"}
    figure, axes = plt.subplots(len(VIEWS), len(kinds), **size)
    for column, (kind, forms) in enumerate(kinds.items()):
        for axis, view in zip(axes[:, column], VIEWS, strict=True):
            for n, (form, rates) in enumerate(forms.items()):
                runs = [(cell["kl"], 100 * np.array(cell["wins"][view]).mean(1)) for cell in rates]
                means = sorted((np.mean(kl), wins.mean()) for kl, wins in runs)
                if view == "plain":
                    means.insert(0, (0, 50))  # the start
                axis.plot(*zip(*means, strict=True), "o-", color=f"C{n}", label=form)
                for kl, wins in runs:
                    axis.plot(kl, wins, ".", color=f"C{n}", alpha=0.5, ms=4)
            axis.axhline(50, color="k", lw=0.7)
            axis.set(title=f"{kind}, {view}", ylabel="win rate, %")
            axis.set_xscale("function", functions=(lambda kl: np.maximum(kl, 0) ** 0.5, np.square))
            axis.grid(alpha=0.3)
        axis.set(xlabel="KL(prompt-only policy || start), nats", xlim=(0, None))
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    plt.close(figure)


def write(known):
    """The files named above, from {Job: result}; returns the table."""
    cells = cells_of(known)
    if not cells:
        return "no run is done yet"
    write_json(JSON, {"machine": machine(), "cells": cells})
    draw(cells, JSON.with_suffix(".png"))
    put_between(MARKS, results_table(cells), PAGE)
    return results_table(cells)
