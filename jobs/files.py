"""Rows of a long job, one JSON line each: appended as they come, read back after a kill.

A row counts from its newline on: the torn last line that a kill leaves is cut off and its work
done again. Several processes write parts of one file, each its own, and the first joins them.
"""

import glob
import json
import os
import time
from pathlib import Path

from jobs.cli import UserError

ASSETS = Path(__file__).parents[1] / "assets"  # the embedded model and data


def read_lines(file):
    """The whole lines of a file as bytes, split at "\\n" alone; [] where there is no file."""
    try:
        return Path(file).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def replace(file, chunks):
    """Write byte chunks beside `file` and rename, so that a reader never sees half of them."""
    aside = Path(f"{file}.tmp")
    with open(aside, "wb") as f:
        f.writelines(chunks)
    os.replace(aside, file)


def to_line(row):
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def read_json(file):
    """A JSON file's content; {} where there is none."""
    if not file.exists():
        return {}
    return parse_json(file.read_text(encoding="utf-8"), str(file))


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers and nesting without end
        raise UserError(f"{where}: broken JSON ({error}); mend or delete the row") from error


def write_json(file, content):
    Path(file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


class Journal:
    """A file of rows to go on with: `rows`, [("file:row", dict)], is what it holds already."""

    def __init__(self, file, flag="--out"):
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            lines = read_lines(file)
            self.file = open(file, "ab")  # noqa: SIM115
            self.file.truncate(sum(len(line) + 1 for line in lines))
        except OSError as error:
            raise UserError(f"{flag} {file}: {error.strerror}") from error
        places = (f"{file}:{n}" for n in range(1, len(lines) + 1))
        self.rows = [(at, parse_json(line, at)) for at, line in zip(places, lines, strict=True)]

    def append(self, row):
        """Add a row, and hand it to the system before the next is begun."""
        self.file.write(to_line(row))
        self.file.flush()


class Shared:
    """Rows 0 to n - 1 of a jsonl file that `world` processes write, whatever order they end in.

    Row i is the work of process i mod world, which appends it with its index to FILE.partRANK;
    `join` makes one file of all parts. done: the rows there already, of any former run, however
    many processes it had. check(where, i, row) raises UserError for a row of another run.
    """

    def __init__(self, file, n, check, rank=0, world=1):
        self.name, self.n, self.rank, self.world = file, n, rank, world
        if rank == 0 and not Path(file).exists():  # tells before any work whether it can be
            Journal(file).file.close()
            os.remove(file)
        self.done = set()
        for where, i, row in self._rows():
            if not isinstance(i, int) or not 0 <= i < n:
                raise UserError(f"{where}: row {i} of {n} prompts: of another run; move it away")
            check(where, i, row)
            self.done.add(i)
        self.mine = [i for i in range(rank, n, world) if i not in self.done]
        self.part = Journal(f"{file}.part{rank}") if self.mine else None

    def _rows(self):
        """("file:row", index, row) of all parts, then of FILE, into which they may be joined."""
        for part in sorted(glob.glob(f"{glob.escape(self.name)}.part*")):
            for k, line in enumerate(read_lines(part), 1):
                row = parse_json(line, f"{part}:{k}")
                index = row.pop("index", None) if isinstance(row, dict) else None
                yield f"{part}:{k}", index, row
        lines = read_lines(self.name)
        if len(lines) > self.n:
            raise UserError(f"{self.name}: {len(lines)} rows for {self.n} prompts; move it away")
        for i, line in enumerate(lines):
            yield f"{self.name}:{i + 1}", i, parse_json(line, f"{self.name}:{i + 1}")

    def append(self, i, row):
        self.part.append({"index": i} | row)
        self.done.add(i)

    def join(self, pause=1.0):
        """Wait for the other processes, and write FILE; only the first process does.

        Returns whether every row is there; where one is not, the parts stay as they are.
        """
        if self.rank:
            return False
        while True:
            lines = {i: to_line(row) for _, i, row in self._rows()}
            if len(lines) == self.n:
                break
            if self.world == 1:
                return False
            time.sleep(pause)
        replace(self.name, (lines[i] for i in range(self.n)))
        for part in glob.glob(f"{glob.escape(self.name)}.part*"):
            os.remove(part)
        return True
