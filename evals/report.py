"""One self-contained page: tables, lengths, answers side by side, training curves.

Everything that comes from files is escaped: tables by jinja2, answers as JSON that the page's
script sets as text. No external resources, so the file can be mailed and opened anywhere.
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import jinja2

from evals.answers import question_ids, read_answers
from evals.results import files_of, read_results
from jobs.cli import UserError, flag, require
from jobs.files import ASSETS
from jobs.rundir import read_metrics

HIDDEN = {"values", "scores", "models", "pairs", "margins", "probabilities"}  # too long for a table
COLOURS = ("#3366cc", "#dc7a12", "#2a9d5c", "#a43fb5", "#c02f3d", "#5f6b7a")
WIDTH, HEIGHT = 300, 130  # of a drawing
BARS = 24


@dataclass
class Settings:
    """Every flag of `evaluate.py report`."""

    results: str | None = flag(None, "json files of --out: paths or globs, with commas between")
    answers: str | None = flag(None, "answer files to show side by side: paths or globs")
    run: str | None = flag(None, "directory of a training run, for its curves")
    title: str = flag("Evaluation", "of the page")
    limit: int | None = flag(None, "only the first N answers of each file")
    out: str = flag("report.html", "the page")


# ----------------------------------------------------------------------------- tables


def cell(value):
    """A number, or a [mean, low, high] -> text; None where it is neither."""
    if isinstance(value, list) and len(value) == 3 and all(map(is_number, value)):
        return "{} [{}, {}]".format(*map(cell, value))
    if isinstance(value, bool | str | int):
        return str(value)
    return f"{value:.4g}" if is_number(value) else None


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def flatten(content, prefix=""):
    """Nested results -> {"turns 1": text}, without what is as long as the data."""
    row = {}
    for key, value in content.items():
        if key in HIDDEN:
            continue
        if isinstance(value, dict):
            row |= flatten(value, f"{prefix}{key} ")
        elif (text := cell(value)) is not None:
            row[f"{prefix}{key}".replace("_", " ")] = text
    return row


def tables_of(file, results):
    """A result file -> list of {title, columns, rows}: what it says of all, of each model, of each
    subset."""
    parts = results.get("subsets") or {}
    whole = {k: v for k, v in results.items() if k not in ("subsets", "answers", "against")}
    found = [
        (file, [flatten(whole)]),
        (f"{file}: models", [{"model": m} | flatten(r) for m, r in results["models"].items()]),
        (f"{file}: subsets", [{"subset": m} | flatten(r) for m, r in parts.items()]),
    ]
    tables = []
    for title, rows in found:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        if columns:
            cells = [[row.get(name, "") for name in columns] for row in rows]
            tables.append({"title": title, "columns": columns, "rows": cells})
    return tables


# ----------------------------------------------------------------------------- drawings


def histograms(sides):
    """{name: list of Answer} -> one drawing of lengths per file, all on one scale."""
    lengths = {name: [len(answer.text) for answer in rows] for name, rows in sides.items()}
    top = max((max(values) for values in lengths.values()), default=0) or 1
    drawings = []
    for number, (name, values) in enumerate(lengths.items()):
        counts = [0] * BARS
        for value in values:
            counts[min(BARS - 1, value * BARS // top)] += 1
        step, scale = WIDTH / BARS, HEIGHT / max(counts)
        bars = [(i * step, HEIGHT - n * scale, step - 1, n * scale, n, i * top // BARS)
                for i, n in enumerate(counts)]  # fmt: skip
        drawings.append({
            "name": name, "n": len(values), "mean": statistics.mean(values), "bars": bars,
            "median": statistics.median(values), "top": top,
            "colour": COLOURS[number % len(COLOURS)],
        })  # fmt: skip
    return drawings


def curves(run):
    """Loss, accuracy and margin of a run's metrics.jsonl -> drawings, as in metrics.py."""
    file = Path(run) / "metrics.jsonl"
    if not file.exists():
        raise UserError(f"--run {run}: no metrics.jsonl; give the --out of a training run")
    drawings, lines = [], read_metrics(file)
    for name in ("loss", "accuracy", "margin"):
        series = {}
        for key in (name, f"eval_{name}", f"eval_plain_{name}"):
            points = [(x["step"], x[key]) for x in lines if is_number(x.get(key)) and "step" in x]
            if points:
                series[key] = points
        if series:
            drawings.append(curve(name, series))
    return drawings


def curve(title, series):
    """{name: [(step, value)]} -> a drawing with its lines scaled to WIDTH x HEIGHT."""
    steps, values = zip(*(point for points in series.values() for point in points), strict=True)
    low, high, last = min(values), max(values), max(max(steps), 1)
    spread = (high - low) or 1.0
    lines = [
        {"name": name, "colour": COLOURS[n % len(COLOURS)], "points": [
            (round(x / last * WIDTH, 1), round(HEIGHT - (y - low) / spread * HEIGHT, 1))
            for x, y in points
        ]}
        for n, (name, points) in enumerate(series.items())
    ]  # fmt: skip
    return {"title": title, "lines": lines, "low": low, "high": high, "last": last}


# ----------------------------------------------------------------------------- answers


def side_by_side(sides, results):
    """[{prompt, subset, answers, scores}] of all prompts; None where a file has no answer.

    scores: of the result files whose model bears the answer file's name (evaluate.py reward).
    """
    values = {
        name: r.get("values", {}) for c in results.values() for name, r in c["models"].items()
    }
    rows = {}
    for k, (name, answers) in enumerate(sides.items()):
        for question, answer in zip(question_ids(answers), answers, strict=True):
            row = rows.setdefault(question, {
                "prompt": [[m["role"], m["content"]] for m in answer.question],
                "subset": answer.subset,
                "answers": [None] * len(sides), "scores": [None] * len(sides),
            })  # fmt: skip
            row["answers"][k] = answer.said
            row["scores"][k] = values.get(name, {}).get(question)
            row["subset"] = row["subset"] or answer.subset
    return list(rows.values())


# ----------------------------------------------------------------------------- the page


def report(s):
    """Write --results, --answers and --run as one self-contained page."""
    if not (s.results or s.answers or s.run):
        raise UserError("nothing to show: give --results, --answers or --run")
    require(s, "out")
    results = {f: read_results(f) for f in files_of(s.results, "--results")} if s.results else {}
    files = files_of(s.answers, "--answers") if s.answers else []
    sides = {file: read_answers(file, "--answers")[: s.limit] for file in files}
    rows = side_by_side(sides, results)
    page = render(
        title=s.title,
        tables=[t for file, content in results.items() for t in tables_of(file, content)],
        histograms=histograms(sides) if sides else [],
        curves=curves(s.run) if s.run else [],
        width=WIDTH,
        height=HEIGHT,
        data={"files": list(sides), "rows": rows, "colours": COLOURS},
    )
    try:
        Path(s.out).parent.mkdir(parents=True, exist_ok=True)
        Path(s.out).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {s.out}: {error.strerror}") from error
    print(f"{s.out}: {len(results)} result files, {len(rows)} prompts, {len(page) / 1e6:.1f} MB")


def render(**content):
    """Fill assets/report.html; every value is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    environment.policies["json.dumps_function"] = json.dumps
    source = (ASSETS / "report.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(content)
