"""Writes what bench/frontier.py found: docs/frontier.{json,png}, README.md, docs/results.md.

Plain training's cells are means over seeds, in percent. Those of other forms are their differences
to it on the same seeds, in points, with 95% t-intervals, bold where they leave out 0. The number of
cells is not corrected for: of twenty without a difference, one is bold by chance.
"""

import json

import numpy as np

from bench.measuring import ROOT, gap, machine, put_between, table
from bench.small_world_report import T_4
from jobs.files import write_json

JSON = ROOT / "docs" / "frontier.json"
MARKS = "<!-- bench/frontier.py -->", "<!-- /bench/frontier.py -->"
KL = {"plain": "kl", "shown": "shown_kl"}  # of each view
MEASURES = (*KL, "refined", *KL.values())
BUDGETS = (0.25, 0.5, 1.0, 1.5)
SHORT = (0.5, 1.0)  # those of the pages; the first alone in worlds of a single curve
SEEDS = 5  # that an interval is of


def save(results, best):
    """Results {Job: result} -> docs/frontier.json: the points of every curve, by seed."""
    curves = [
        {"world": world_of(job), **job._asdict()} | {name: result[name] for name in MEASURES}
        for job, result in sorted(results.items(), key=lambda item: item[0].seed)
    ]
    kept = [curve for curve in curves if curve["kind"] != "mirrored"]
    own = [[*key, *where] for key, where in best.items()]  # base, form, lr, beta, place
    write_json(JSON, {"machine": machine(), "own_best": own, "curves": kept})


def world_of(job):
    """What a job's world is called."""
    usual, parts = job._field_defaults, []
    parts += [getattr(job, x) for x in ("kind", "start") if getattr(job, x) != usual[x]]
    parts += [f"{job.flipped:.0%} turned around"] if job.flipped else []
    parts += [f"{job.pairs:,} pairs"] if job.pairs != usual["pairs"] else []
    return ", ".join(parts) or "separable"


class Found:
    """docs/frontier.json, read: curves[base, form, world][seed][lr, beta], values by share."""

    def __init__(self):
        about, self.curves = json.loads(JSON.read_text(encoding="utf-8")), {}
        self.best = {(base, form): where for base, form, *where in about["own_best"]}
        for curve in about["curves"]:
            seeds = self.curves.setdefault((curve["base"], curve["form"], curve["world"]), {})
            seeds.setdefault(curve["seed"], {})[curve["lr"], curve["beta"]] = curve

    def within(self, key, view, budgets):
        """{seed: (budgets,) best win rate within each KL}."""
        best = {}
        for seed, settings in self.curves.get(key, {}).items():
            curves = [(curve[KL[view]], curve[view]) for curve in settings.values()]
            rates = [[within(*curve, budget) for budget in budgets] for curve in curves]
            best[seed] = np.max(rates, axis=0)
        return best

    def own(self, base, form, view):
        """{seed: win rate in the separable world at the form's own best setting and share}."""
        *setting, place = self.best[base, form]
        seeds = self.curves[base, form, "separable"].items()
        return {seed: settings[tuple(setting)][view][place] for seed, settings in seeds}

    def names(self, place):
        """The bases (0) or forms (1), in the order of their runs."""
        return list(dict.fromkeys(key[place] for key in self.curves))


def within(kl, wins, budget):
    """The best win rate on a curve from the start (0, 1/2) through points, within a KL."""
    kl, wins = np.array([0.0, *kl]), np.array([0.5, *wins])
    best = wins[kl <= budget].max()
    for ends in zip(range(len(kl) - 1), range(1, len(kl)), strict=True):
        if kl[ends[0]] < budget < kl[ends[1]]:
            best = max(best, np.interp(budget**0.5, kl[[*ends]] ** 0.5, wins[[*ends]]))
    return best


# ----------------------------------------------------------------------------- tables


def difference(values, others):
    """Mean difference, in points, on the seeds that both {seed: win rate} have; its interval."""
    gaps = 100 * np.array([values[seed] - others[seed] for seed in values if seed in others])
    if len(gaps) < SEEDS:
        return "-"
    half = T_4 * gaps.std(ddof=1) / SEEDS**0.5
    return gap(gaps.mean(), gaps.mean() - half, gaps.mean() + half)


def line(head, values):
    """One row from {form: {seed: win rate}}, plain first."""
    plain, *others = values.values()
    mean = f"{100 * np.mean(list(plain.values())):.1f}" if plain else "-"
    return [*head, mean, *(difference(other, plain) for other in others)]


def equal(found, base, world, budgets=BUDGETS, views=tuple(KL)):
    """Rows of win rates within a KL."""
    rows = []
    for view in views:
        best = {f: found.within((base, f, world), view, budgets) for f in found.names(1)}
        for n, most in enumerate(budgets):
            rates = {form: {seed: x[n] for seed, x in best[form].items()} for form in best}
            rows.append(line([base, world, view, f"{most:g}"], rates))
    return rows


def own(found, base):
    """Rows of win rates at each form's own best setting and share."""
    return [
        line([base, "separable", view, "own best"],
             {form: found.own(base, form, view) for form in found.names(1)})
        for view in KL
    ]  # fmt: skip


def readme_part(found):
    """Each objective, prompt-only, within the middle budget."""
    rows = [
        [base, *equal(found, base, "separable", SHORT[1:], ("plain",))[0][4:]]
        for base in found.names(0)
    ]
    caption = (
        f"Exact prompt-only win rate against the start within KL {SHORT[1]:g}, %; forms: "
        f"points more, [95% interval] over {SEEDS} seeds: `bench/frontier.py`."
    )
    return "\n".join([table(["", *found.names(1)], rows), "", caption])


def results_part(found):
    """Every world within the shorter budgets."""
    rows = []
    for base, _, world in panels(found):
        rows += equal(found, base, world, SHORT if world == "separable" else SHORT[:1])
    return table(["loss", "world", "asked", "KL", *found.names(1)], rows)


def page(found):
    """All rows: every world within every budget, and at own best."""
    rows = [row for base, _, world in panels(found) for row in equal(found, base, world)]
    rows += [row for base in found.names(0) for row in own(found, base)]
    return table(["loss", "world", "asked", "KL", *found.names(1)], rows)


PARTS = {ROOT / "README.md": readme_part, ROOT / "docs" / "results.md": results_part}


def panels(found):
    """The keys of plain training: one per base and world."""
    return [key for key in found.curves if key[1] == "plain"]


def draw(found, file):
    """Best win rate within a KL: prompt-only (full) and shown (dotted), a base or world a panel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    budgets = np.linspace(0, 2.5, 51)
    every, across = panels(found), 4
    down = -(-len(every) // across)
    size = {"figsize": (4 * across, 3.5 * down), "squeeze": False}
    figure, axes = plt.subplots(down, across, **size)
    for axis, (base, _, world) in zip(axes.flat, every, strict=False):
        for n, form in enumerate(found.names(1)):
            for view, dashes in (("plain", "-"), ("shown", ":")):
                style = {"color": f"C{n}", "label": form if view == "plain" else None}
                seeds = list(found.within((base, form, world), view, budgets).values())
                if seeds:  # none yet, in a world that is under way
                    axis.plot(budgets, 100 * np.mean(seeds, axis=0), dashes, **style)
        axis.set(title=f"{base}, {world}", xlabel="KL at most, nats", ylabel="win rate, %")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False, fontsize=8, title="full: prompt only; dotted: shown")
    for axis in axes.flat[len(every) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    plt.close(figure)


def write():
    """The files named above, from docs/frontier.json; returns all tables."""
    found = Found()
    draw(found, JSON.with_suffix(".png"))
    for file, part in PARTS.items():
        put_between(MARKS, part(found), file)
    return page(found)
