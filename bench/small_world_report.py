"""Writes what bench/small_world.py found: docs/small_world.{json,png}, docs/results.md.

A cell is the mean over seeds, with the standard deviation of one seed behind it. Marks:

    *       differs from the plain form of its base on the same seeds: the 95% t-interval of the
            paired difference leaves out 0
    (n)     Noisy. Validated, and unmarked, is a cell in which every seed's prompt-only win rate is
            above 50% and whose standard deviation is at most 2 points
"""

import json

import numpy as np

from bench.measuring import ROOT, machine, put_between, table
from jobs.files import write_json

JSON = ROOT / "docs" / "small_world.json"
MARKS = "<!-- bench/small_world.py -->", "<!-- /bench/small_world.py -->"
KEY = ("table", "row", "column", "start", "kind")  # of a cell
MEASURES = ("plain", "shown", "refined", "accuracy", "kl", "length", "mass")
SHOWN = {"forms": MEASURES, "stages": MEASURES[:3], "instructions": MEASURES[:3]}
SHOWN |= {"rates": ("plain",)}  # measures of each table
T_4 = 2.776  # 97.5% quantile of Student's t with 4 degrees of freedom: five seeds
WORLDS = [
    (start, kind) for kind in ("separable", "intransitive") for start in ("start", "start-single")
]
TITLES = {
    "start": "start saw further attempts",
    "start-single": "start saw single answers only",
}


# ----------------------------------------------------------------------------- what is kept


def save(results, rates, settings):
    """Results {Job: result} -> docs/small_world.json, the values of every cell by seed."""
    cells = {}
    for job, result in sorted(results.items(), key=lambda item: item[0].seed):
        cell = cells.setdefault((*job.name, job.start, job.kind), {name: [] for name in MEASURES})
        for name in MEASURES:
            cell[name].append(round(result[name], 4))
    rows = [dict(zip(KEY, key, strict=True)) | cell for key, cell in cells.items()]
    minutes = round(sum(result["cpu_seconds"] for result in results.values()) / 60, 1)
    about = {"runs": len(results), "cpu_minutes": minutes, "rates": rates, "machine": machine()}
    write_json(JSON, about | settings | {"cells": rows})


class Found:
    """docs/small_world.json, read."""

    def __init__(self):
        self.about = json.loads(JSON.read_text(encoding="utf-8"))
        self.cells = {tuple(c[n] for n in KEY): c for c in self.about["cells"]}

    def values(self, measure, table, row, column, start="start", kind="separable"):
        """(seeds,) values of one cell."""
        return np.array(self.cells[table, row, column, start, kind][measure])

    def rows(self, table):
        return list(dict.fromkeys(key[1] for key in self.cells if key[0] == table))

    def columns(self, table):
        return list(dict.fromkeys(key[2] for key in self.cells if key[0] == table))


# ----------------------------------------------------------------------------- tables


def spread(values, percent=True):
    """ "81.2 ± 0.4": mean and standard deviation of one seed."""
    scale, digits = (100, 1) if percent else (1, 2)
    return f"{scale * values.mean():.{digits}f} ± {scale * values.std(ddof=1):.{digits}f}"


def validated(plain):
    """The rule at the head of this file, on the prompt-only win rates of a cell's seeds."""
    return plain.min() > 0.5 and plain.std(ddof=1) <= 0.02


def differs(values, others):
    """Whether paired differences over five seeds leave out 0 with 95% confidence."""
    gap = values - others
    return abs(gap.mean()) > T_4 * gap.std(ddof=1) / len(gap) ** 0.5


def cell(found, measure, name, row, column, *world):
    """One cell of a table, with its marks; of the rates the worst of their three forms."""
    values = found.values(measure, name, row, column, *world)
    if name == "rates":
        return f"{100 * values.min():.1f}"
    text = spread(values, measure not in ("kl", "length"))
    if name == "forms":
        plain = found.values(measure, name, row, "plain", *world)
        noisy = measure == "plain" and not validated(values)
        text += ("*" if differs(values, plain) else "") + (" (n)" if noisy else "")
    return text


def pivot(found, measure, name, start, kind):
    """One measure of one table in one world."""
    columns, rows = found.columns(name), found.rows(name)
    lines = [
        [row, *(cell(found, measure, name, row, c, start, kind) for c in columns)] for row in rows
    ]
    return table(["", *columns], lines)


def world_table(found, base):
    """Worlds and ways to ask in rows, forms in columns, one base."""
    forms = found.columns("forms")
    rows = [
        [f"{kind}, `{start}`", view]
        + [cell(found, view, "forms", base, name, start, kind) for name in forms]
        for start, kind in WORLDS
        for view in ("plain", "shown")
    ]
    return table(["world, start", "asked", *forms], rows)


# ----------------------------------------------------------------------------- figure and pages


def draw(found, file):
    """Four worlds: win rate of every base in every form, bare (full) and shown the answer to beat
    (hollow), mean and standard deviation over seeds; what could be reached as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 7.5), sharex=True, sharey=True)
    for axis, (start, kind) in zip(axes.flat, WORLDS, strict=True):
        draw_world(found, axis, start, kind)
    axes[0, 0].legend(frameon=False, ncols=3, fontsize=8, loc="lower left")
    full, hollow = "full: prompt only", "hollow: shown the answer that it is to beat"
    figure.suptitle(
        f"{full} (at best the dashed line); {hollow} (at best the dotted line)", size=10
    )
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_world(found, axis, start, kind):
    """One of the four."""
    forms, bases = found.columns("forms"), found.rows("forms")
    for n, name in enumerate(forms):
        places = np.arange(len(bases)) + (n - (len(forms) - 1) / 2) * 0.12
        for view, full in (("plain", f"C{n}"), ("shown", "none")):
            values = [100 * found.values(view, "forms", b, name, start, kind) for b in bases]
            means, spreads = zip(*[(v.mean(), v.std(ddof=1)) for v in values], strict=True)
            style = {"fmt": "o", "ms": 4.5, "mfc": full, "color": f"C{n}", "elinewidth": 0.8}
            label = name if view == "plain" else None
            axis.errorbar(places, means, spreads, label=label, **style)
    for view, best in found.about["best"][f"{start} {kind}"].items():
        axis.axhline(100 * best, color="k", lw=0.7, ls="--" if view == "plain" else ":")
    axis.axhline(50, color="k", lw=0.7)
    axis.set(title=f"{kind}; {TITLES[start]}", ylabel="exact win rate against the start, %")
    axis.set_xticks(range(len(bases)), bases)
    axis.grid(axis="y", alpha=0.3)


def results_part(found):
    """The table of docs/results.md."""
    return world_table(found, "dpo")


def page(found):
    """All tables, as a page of text; what is measured stands in bench/small_world.py."""
    parts = []
    for name, start, kind in dict.fromkeys((key[0], *key[3:]) for key in found.cells):
        best = found.about["best"].get(f"{start} {kind}", {})
        limits = "".join(f"; {view} at best {rate:.1%}" for view, rate in best.items())
        parts.append(f"## {name}: {kind}, from `{start}`{limits}")
        for measure in SHOWN[name]:
            parts += [f"{measure}:", pivot(found, measure, name, start, kind)]
    return "\n\n".join(parts)


PARTS = {ROOT / "docs" / "results.md": results_part}


def write():
    """docs/small_world.png, and what docs/results.md shows of it between MARKS.

    Returns all tables as a text.
    """
    found = Found()
    draw(found, JSON.with_suffix(".png"))
    for file, part in PARTS.items():
        put_between(MARKS, part(found), file)
    return page(found)
