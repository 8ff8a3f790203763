"""What every evaluation reports: a table to read, one JSON file."""

import json
import pathlib

from cli import UserError


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
