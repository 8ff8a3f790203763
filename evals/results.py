"""Reads rows and verdicts, counts missing ones, prints tables and writes the numbers as JSON.

A judge argues and then names its verdict in brackets, [[A>B]] or [[7]]. It may name others on the
way ("at first sight [[A>B]], but …"), so the last one in a text counts.

The JSON has {"models": {name: {"n", …, "values": {question id: number or null}}}}; the values
are what `evaluate.py compare` pairs, question by question.
"""

import glob
import os
import re
from pathlib import Path

import numpy as np

from jobs.cli import UserError
from jobs.files import out_file, read_json, write_json
from pairs.read import Drops, records

STRONG = 3  # how often a strong verdict counts in Arena-Hard

VERDICTS = {  # label -> (score of A, weight)
    "A>>B": (1.0, STRONG),
    "A>B": (1.0, 1),
    "A=B": (0.5, 1),
    "B>A": (0.0, 1),
    "B>>A": (0.0, STRONG),
}
SPELLINGS = {"A<<B": "B>>A", "A<B": "B>A", "B=A": "A=B", "B<A": "A>B", "B<<A": "A>>B"}
LETTERS = {"A": "A>B", "B": "B>A", "C": "A=B"}  # MT-Bench's [[A]], [[B]], and [[C]] for a tie


def files_of(text, name):
    """Paths and globs, with commas between them -> list of files; UserError where one has none."""
    files = []
    for part in [text] if os.path.isfile(text) else map(str.strip, text.split(",")):
        found = [part] if os.path.isfile(part) else sorted(filter(os.path.isfile, glob.glob(part)))
        if not found:
            raise UserError(f"{name} {part}: no such file")
        files += found
    return files


def rows_of(text, name):
    """Yields ("file:row", dict) of all the files_of text; UserError for a row that is no object."""
    for file in files_of(text, name):
        for where, row in records(file):
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected an object with named columns")
            yield where, row


def read_results(file):
    """A file of save_results -> dict, "models" {} where it has none; UserError for another file."""
    content = read_json(file)
    known = "models" in content or "command" in content
    if not known or not isinstance(content.setdefault("models", {}), dict):
        raise UserError(f"{file}: no result file; write one with evaluate.py … --out")
    return content


def to_label(text):
    """A label as VERDICTS has it, of that or its mirrored spelling; None for anything else."""
    label = SPELLINGS.get(text, text)
    return label if label in VERDICTS else None


def read_verdict(text):
    """The label of the last verdict in a judge's text; None where there is none.

    In doubled brackets, or in single ones where there are no doubled, as Arena-Hard reads it.

    >>> read_verdict("[[A>B]]? No. My final verdict is: [[B>>A]].")
    'B>>A'
    """
    found = _last(text.upper(), r"\[\[([ABC<>=\s]+)\]\]", r"\[([AB][<>=]+[AB])\]")
    found = found and "".join(found.split())
    return found and to_label(LETTERS.get(found, found))


def read_grade(text):
    """The last [[7]] or [[7.5]] of a judge's text, else its last [7]; None if not from 1 to 10."""
    found = _last(text, r"\[\[\s*(\d+\.?\d*)\s*(?:/\s*10)?\s*\]\]", r"\[(\d+\.?\d*)\]")
    return float(found) if found and 1 <= float(found) <= 10 else None


def _last(text, *patterns):
    """What the first of the patterns that occurs in a text finds last."""
    every = (re.findall(pattern, text) for pattern in patterns)
    return next((found[-1] for found in every if found), None)


def gather(verdicts, none):
    """Verdicts of several models on the same questions -> two dicts by model.

    verdicts: (model, key, (value, or None and what is wrong), "file:row"). They become {model:
    {key: value or None}} and {model: Drops}: a key that comes again is passed over, one that only
    other models have is None. UserError, as `none` says it, without a model.
    """
    models, drops = {}, {}
    for model, key, (value, fault), where in verdicts:
        values, faults = models.setdefault(model, {}), drops.setdefault(model, Drops())
        if fault := "doubled" if key in values else fault:
            faults.add(fault, where)
        values.setdefault(key, value)
    if not models:
        raise UserError(none)
    everything = dict.fromkeys(key for values in models.values() for key in values)
    for model, values in models.items():
        for key in [key for key in everything if key not in values]:
            drops[model].add("without a row", f"question {key}")
            values[key] = None
    return models, drops


def collect(verdicts, s, what, only=""):
    """As `gather`, of --judgments, without the Drops: what is missing is printed.

    UserError where it is too much, and for a model without any `what`.
    """
    models, drops = gather(verdicts, f"--judgments {s.judgments}: no judgments{only}")
    for model, values in models.items():
        refuse(drops[model], len(values), s.max_missing, model)
        if all(value is None for value in values.values()):
            raise UserError(f"{model}: not one {what}")
    return models


def refuse(drops, expected, max_missing, what):
    """Prints what is missing of `expected` values; UserError if its share is over max_missing."""
    if not drops.total:
        return
    print(f"{what}: {drops.total} of {expected} missing or faulty: {drops}")
    if drops.total > max_missing * expected:
        fault = f"{what}: {drops.total / expected:.1%} missing or faulty ({drops})"
        raise UserError(f"{fault}; mend them or raise --max_missing {max_missing}")


def table(rows, forms=""):
    """[{column: text, number or Estimate, None: -}] -> lines, the first column on the left.

    forms: how numbers but whole ones are formatted, as ".1%", of all columns or {column: form}.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    forms = dict.fromkeys(columns, forms) if isinstance(forms, str) else forms

    def cell(value, form):
        form = "" if isinstance(value, str | int) else form
        return "-" if value is None else format(value, form)

    cells, lines = [columns], []
    for row in rows:
        cells.append([cell(row.get(c, ""), forms.get(c, "")) for c in columns])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        line = "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])])
        lines.append(line.rstrip())
    return "\n".join(lines)


def figure_file(file):
    """FILE.png, where the figure beside --out FILE.json goes."""
    if (figure := Path(file).with_suffix(".png")) == Path(file):
        raise UserError(f"--out {file}: name the json file; the figure goes beside it")
    return figure


def save_results(file, results):
    """Writes the numbers as JSON, if a file is wanted; an Estimate becomes [mean, low, high]."""
    if file:
        with out_file(file):
            write_json(file, results)


def draw_lengths(lengths, file, unit, of, limit=None):
    """Draws histograms of {name: (N,) lengths} over each other -> {name: counts}.

    file: a name, or a binary file. unit, of: what the axes count. limit: {name: length} to mark.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state
    from matplotlib.ticker import LogFormatter

    # as wide as the curves of training (jobs/rundir.py), beside which it stands on the report page
    figure, counts = Figure(figsize=(13, 3.6 + 0.2 * len(lengths)), layout="constrained"), {}
    axis = figure.subplots()
    every = np.maximum(np.concatenate(list(lengths.values())), 1)  # a log axis has no 0
    edges = np.geomspace(every.min(), every.max() + 1, 41).round()
    edges = np.unique(edges) - 0.5  # between whole numbers
    for name, values in lengths.items():
        short = name if len(name) < 120 else f"…{name[-119:]}"  # or it is wider than the figure
        short = short.replace("$", r"\$")  # or it is set as a formula
        label = f"median {np.median(values):.0f}, 95% {np.percentile(values, 95):.0f}: {short}"
        look = {"histtype": "step", "label": label, "lw": 1.6}
        counts[name] = axis.hist(np.maximum(values, 1), edges, **look)[0]
    for name, at in (limit or {}).items():
        axis.axvline(at, color="black", lw=0.8, linestyle=":", label=f"{name} {at}")
    axis.set(xscale="log", xlabel=unit, ylabel=of)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.xaxis.set(major_formatter="{x:g}", minor_formatter=LogFormatter())  # 20, not 2 × 10¹
    figure.legend(loc="outside lower left", frameon=False)
    figure.savefig(file, dpi=120)
    return counts
