"""Writes one self-contained page: tables, training curves, lengths, answers side by side.

Everything that comes from files is escaped: tables by jinja2, answers as JSON that the page's
script sets as text. Pictures are drawn by matplotlib and embedded. There are no external
resources, so the file can be mailed and opened anywhere.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import jinja2

from evals.answers import question_ids, read_answers
from evals.results import draw_lengths, files_of, out_file, read_results
from jobs.cli import UserError, flag, require
from jobs.files import ASSETS
from jobs.rundir import draw, read_metrics

HIDDEN = {"values", "scores", "models", "pairs", "margins", "probabilities"}  # too long for a table


@dataclass(frozen=True)
class ReportFlags:
    """Every flag of `evaluate.py report`."""

    results: str | None = flag(None, "json files of --out: paths or globs, with commas between")
    answers: str | None = flag(None, "answer files to show side by side: paths or globs")
    run: str | None = flag(None, "directory of a training run, for its curves")
    title: str = flag("Evaluation", "of the page")
    limit: int | None = flag(None, "only the first N answers of each file")
    out: str = flag("report.html", "the page")


def cell_text(value):
    """A number, a text or a [mean, low, high] -> text; None for anything else."""
    if isinstance(value, list) and len(value) == 3 and all(isinstance(x, float) for x in value):
        return "{:.4g} [{:.4g}, {:.4g}]".format(*value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, bool | str | int) else None


def flatten(content, prefix=""):
    """Nested results -> {"turns 1": text}, without what is as long as the data."""
    row = {}
    for key, value in content.items():
        if key in HIDDEN:
            continue
        if isinstance(value, dict):
            row |= flatten(value, f"{prefix}{key} ")
        elif (text := cell_text(value)) is not None:
            row[f"{prefix}{key}".replace("_", " ")] = text
    return row


def tables_of(file, results):
    """A result file -> [{title, columns, rows}]: of all, of each model, of each subset."""
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


def pictures_of(run, sides):
    """[{title, about, source}] of the curves of a run and the lengths of answer files, if given."""
    pictures = []
    if run:
        file = Path(run) / "metrics.jsonl"
        if not file.exists():
            raise UserError(f"--run {run}: no metrics.jsonl; give the --out of a training run")
        about = "loss, accuracy and margin over steps"
        pictures.append(picture("Training", about, draw, {None: read_metrics(file)}))
    if sides:
        lengths = {name: [len(answer.text) for answer in rows] for name, rows in sides.items()}
        title = "Lengths of the answers, in characters"
        about = "histograms of " + ", ".join(f"{k} ({len(v)} answers)" for k, v in lengths.items())
        pictures.append(picture(title, about, draw_lengths, lengths, "characters", "answers"))
    return pictures


def picture(title, about, drawing, content, *options):
    """What drawing(content, file, *options) draws, as a PNG in a data URI."""
    png = io.BytesIO()
    drawing(content, png, *options)
    source = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return {"title": title, "about": about, "source": source}


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


def report(s):
    """Write --results, --answers and --run as one self-contained page."""
    if not (s.results or s.answers or s.run):
        raise UserError("nothing to show: give --results, --answers or --run")
    require(s, "out")
    results = {f: read_results(f) for f in files_of(s.results, "--results")} if s.results else {}
    files = files_of(s.answers, "--answers") if s.answers else []
    sides = {file: read_answers(file, "--answers")[: s.limit] for file in files}
    rows = side_by_side(sides, results)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((ASSETS / "report.html").read_text(encoding="utf-8"))
    page = template.render(
        title=s.title,
        tables=[t for file, content in results.items() for t in tables_of(file, content)],
        pictures=pictures_of(s.run, sides),
        data={"files": list(sides), "rows": rows},
    )
    with out_file(s.out) as file:
        file.write_text(page, encoding="utf-8")
    print(f"{s.out}: {len(results)} result files, {len(rows)} prompts, {len(page) / 1e6:.1f} MB")
