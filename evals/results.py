"""What every evaluation reads and reports: rows of files, what is missing, a table, one JSON file.

The JSON has {"models": {name: {"n", …, "values": {question id: number or null}}}}; the values are
what `evaluate.py compare` pairs, question by question.
"""

import glob
import json
import math
import os
import pathlib

from jobs.cli import UserError
from jobs.files import parse_json
from pairs.read import Drops
from pairs.sources import records


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
    """Yield ("file:row", dict) of all the files_of text; UserError for a row that is no object."""
    for file in files_of(text, name):
        for where, row in records(file):
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected an object with named columns")
            yield where, row


def collect(verdicts):
    """(model, key, (value, or None and what is wrong), "file:row") -> two dicts by model.

    They are {model: {key: value or None}} and {model: Drops}. What comes again is doubled, and
    passed over; what other models have and a model lacks is missing there, and None.
    """
    models, drops = {}, {}
    for model, key, (value, fault), where in verdicts:
        values, faults = models.setdefault(model, {}), drops.setdefault(model, Drops())
        if key in values:
            faults.add("doubled", where)
            continue
        values[key] = value
        if fault:
            faults.add(fault, where)
    everything = dict.fromkeys(key for values in models.values() for key in values)
    for model, values in models.items():
        for key in everything:
            if key not in values:
                drops[model].add("without a row", f"question {key}")
                values[key] = None
    return models, drops


def refuse(drops, expected, max_missing, what):
    """Print what is missing of `expected` verdicts or scores; UserError if it is too large a share.

    drops: pairs.Drops; max_missing: a share in [0, 1].
    """
    missing = sum(len(where) for where in drops.rules.values())
    if not missing:
        return
    print(f"{what}: {missing} of {expected} missing or faulty: {drops}")
    if missing > max_missing * expected:
        raise UserError(
            f"{what}: {missing / expected:.1%} missing or faulty ({drops}); "
            f"mend them or raise --max_missing {max_missing}"
        )


def number(value):
    """A finite number, or text that is one, as float; None for all else: that is no verdict."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def table(rows):
    """[{column: text or number}] -> aligned lines, the first column on the left."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns] + [[str(row.get(name, "")) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    )


def save(file, results):
    """Write the numbers as JSON, if a file is wanted; an Estimate becomes [mean, low, high]."""
    if file:
        try:
            pathlib.Path(file).parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
            pathlib.Path(file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {file}: {error.strerror}") from error


def read_results(file):
    """A file of `save` -> dict, "models" being empty where it has none; UserError for another."""
    try:
        with open(file, encoding="utf-8") as f:
            content = parse_json(f.read(), file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable: {error}") from error
    known = isinstance(content, dict) and ("models" in content or "command" in content)
    if not known or not isinstance(content.setdefault("models", {}), dict):
        raise UserError(f"{file}: no result file; write one with evaluate.py … --out")
    return content
