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
from evals.stats import Estimate
from jobs.cli import UserError, flag, require
from jobs.files import ASSETS, read_text
from jobs.rundir import draw, read_metrics

HIDDEN = {"values", "scores", "models", "pairs", "margins", "probabilities"}  # too long for a table
CONSOLE = {  # command: {key of its results: (what the console calls it, and how it prints it)}
    "reward": {"win_rate": ("win rate", ".1%"), "reward": ("reward", ".4f"), "std": ("std", ".4f"),
               "difference": ("difference", "+.4f"), "sections": ("", ".1%")},
    "alpaca": {"win_rate": ("win rate", ".2f"), "standard_error": ("SE", ".2f"),
               "length_controlled_winrate": ("LC", ".2f"), "avg_length": ("length", ".0f")},
    "arena": {view: (view.replace("_", " "), ".1%") for view in ("score", "controlled",
                                                                 "equal_style")},
    "mtbench": {"score": ("score", ".2f"), "turns": ("turn", ".2f"), "categories": ("", ".2f")},
    "compare": {"difference": ("a - b", "+.4f"), "mean": ("mean", ".4f")},
}  # fmt: skip


@dataclass(frozen=True)
class ReportFlags:
    results: str | None = flag(None, "json files of --out: paths or globs, with commas between")
    answers: str | None = flag(None, "answer files to show side by side: paths or globs")
    run: str | None = flag(None, "directory of a training run, for its curves")
    title: str = flag("Evaluation", "of the page")
    limit: int | None = flag(None, "only the first N answers of each file", least=1)
    out: str = flag("report.html", "the page")


def flatten(content, words, prefix="", form=".4g"):
    """Nested results -> {"turn 1": text}, without what is as long as the data.

    Numbers, texts and [mean, low, high] become text; anything else is left out. words: {key: (name,
    form of its numbers)} where the console has others than the key and `form`.
    """
    row = {}
    for key, value in content.items():
        word, own = words.get(key, (key.replace("_", " "), form))
        name = f"{prefix}{word}".strip()
        if key in HIDDEN:
            continue
        if isinstance(value, dict):
            row |= flatten(value, words, f"{name} ", own)
        elif isinstance(value, list) and [*map(type, value)] == [float] * 3:
            row[name] = f"{Estimate(*value):{own}}"
        elif isinstance(value, bool | str | int | float):
            row[name] = f"{value:{own}}" if isinstance(value, float) else str(value)
    return row


def tables_of(file, results):
    """Yields (title, columns, rows of cells) of a result file: of all, each model, each subset."""
    whole = {k: v for k, v in results.items() if k not in ("subsets", "answers", "against")}
    words = CONSOLE.get(results.get("command"), {})
    if "sections" in results:  # of evaluate.py reward --pairs
        words = words | {"win_rate": ("accuracy", ".1%")}
    found = {file: [flatten(whole, words)]}
    for name, parts in (("model", results["models"]), ("subset", results.get("subsets") or {})):
        found[f"{file}: {name}s"] = [{name: part} | flatten(r, words) for part, r in parts.items()]
    for title, rows in found.items():
        if columns := list(dict.fromkeys(name for row in rows for name in row)):
            yield title, columns, [[row.get(name, "") for name in columns] for row in rows]


def pictures_of(run, sides):
    """Yields (title, about, PNG as data URI) of a run's curves and the lengths of answer files."""
    if run:
        picture = embedded(draw, {None: read_metrics(Path(run) / "metrics.jsonl")})
        yield "Training", "loss, accuracy and margin over steps", picture
    if sides:
        lengths = {name: [len(answer.text) for answer in rows] for name, rows in sides.items()}
        about = "histograms of " + ", ".join(f"{k} ({len(v)} answers)" for k, v in lengths.items())
        picture = embedded(draw_lengths, lengths, unit="characters", of="answers")
        yield "Lengths of the answers, in characters", about, picture


def embedded(drawing, content, **axes):
    png = io.BytesIO()
    drawing(content, png, **axes)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def side_by_side(sides, results):
    """[{prompt, subset, answers, scores, drafts}] of all prompts; None where a file has no answer.

    scores: of the result files whose model bears the answer file's name (evaluate.py reward).
    """
    rows, models, none = {}, {}, [None] * len(sides)
    for content in results.values():
        models |= content["models"]
    for k, (name, answers) in enumerate(sides.items()):
        values = models.get(name, {}).get("values", {})
        for question, answer in zip(question_ids(answers), answers, strict=True):
            prompt = [[m["role"], m["content"]] for m in answer.question]
            new = {name: [*none] for name in ("answers", "scores", "drafts")}
            row = rows.setdefault(question, {"prompt": prompt, "subset": ""} | new)
            row["answers"][k], row["scores"][k] = answer.said, values.get(question)
            row["drafts"][k] = answer.draft
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
    text, strict = read_text(ASSETS / "report.html"), jinja2.StrictUndefined
    page = jinja2.Template(text, autoescape=True, undefined=strict).render(
        title=s.title,
        tables=[t for file, content in results.items() for t in tables_of(file, content)],
        pictures=list(pictures_of(s.run, sides)),
        data={"files": list(sides), "rows": rows},
    )
    with out_file(s.out) as file:
        file.write_text(page, encoding="utf-8")
    print(f"{s.out}: {len(results)} result files, {len(rows)} prompts, {len(page) / 1e6:.1f} MB")
