"""Dialogues, and rows of pairs as files of every kind that is read."""

import csv
import gzip
import json

GOOD = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}


def say(*texts, system=None):
    """Texts by turns of user and assistant -> messages."""
    roles = ("user", "assistant") * len(texts)
    turns = [{"role": r, "content": c} for r, c in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}] * (system is not None) + turns


def reply(text):
    return [{"role": "assistant", "content": text}]


def write_rows(directory, rows, name="pairs.jsonl"):
    """Rows as a file of the kind that its name says; strings are written as they are."""
    file = directory / name
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
        return str(file)
    if name.endswith(".csv"):
        with open(file, "w", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return str(file)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    if name.endswith(".json"):
        file.write_text("[" + ",\n".join(lines) + "]", encoding="utf-8")
    else:
        opened = gzip.open if name.endswith(".gz") else open
        with opened(file, "wt", encoding="utf-8") as f:
            f.write("\n".join(lines) + "\n")
    return str(file)
