"""Files of a long job: rows appended as they come, items kept by key, and files written whole.

Rows are JSON lines, read back after a kill. A row counts from its newline on: the torn last line
that a kill leaves is cut off and its work done again. Several processes write parts of one file,
each its own, and the first joins them.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

from jobs.cli import UserError

ASSETS = Path(__file__).parents[1] / "assets"  # the embedded model and data


@contextlib.contextmanager
def written_whole(final):
    """Gives a name beside `final` for a file or folder to be written under, then publishes it.

    Use: `with written_whole(file) as aside: …`. After an error `final` is as it was before.
    """
    aside = Path(final).with_name(f".{Path(final).name}")
    remove(aside)  # what a kill left
    try:
        yield aside
        publish(aside, final)
    except BaseException:
        remove(aside)
        raise


def publish(aside, final):
    """Renames a file or folder that is whole: no reader, and no power cut, ever sees half of one.

    A folder cannot replace another in one step: the old one goes only when the new one is in. A
    file never replaces a folder: OSError.
    """
    old = Path(final).with_name(f".{Path(final).name}.old")
    remove(old)
    for path in (*Path(aside).rglob("*"), aside):  # rename may reach the disk before the content
        flush(path)
    if os.path.isdir(final) and os.path.isdir(aside):
        os.rename(final, old)
    os.replace(aside, final)
    flush(old.parent)
    remove(old)


def flush(path):
    """fsync of a file or directory: after it, a power cut cannot lose what was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path):
    """Deletes a file or folder, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        Path(path).unlink(missing_ok=True)


def checksum(file):
    """sha256 of a file's content."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def replace(file, chunks):
    """Writes byte chunks as the new content of `file`."""
    with written_whole(file) as aside, open(aside, "wb") as f:
        f.writelines(chunks)


@contextlib.contextmanager
def out_file(file, flag="--out"):
    """Gives a file to write to, its folder made; UserError, naming `flag`, where it cannot be."""
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        yield Path(file)
    except OSError as error:
        raise UserError(f"{flag} {file}: {error.strerror}") from error


def read_text(file, name=None):
    """A file's text; UserError where it cannot be read. name: what the error calls it."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name or file}: not readable: {error}") from error


def read_json(file):
    """The object in a JSON file, as a dict; {} where there is no file."""
    content = parse_json(read_text(file), str(file)) if os.path.exists(file) else {}
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object")
    return content


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers and nesting without end
        raise UserError(f"{where}: broken JSON ({error}); mend or delete the row") from error


def write_json(file, content):
    replace(file, [json.dumps(content, indent=2, ensure_ascii=False).encode(), b"\n"])


def read_lines(file):
    """The whole lines of a file as bytes, split at "\n" alone; [] where there is no file."""
    try:
        return Path(file).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def rows_in(file):
    """Yields ("file:row", row) of the whole lines of a JSON file; none where there is no file."""
    for n, line in enumerate(read_lines(file), 1):
        yield f"{file}:{n}", parse_json(line, f"{file}:{n}")


def to_line(row):
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def open_to_append(file, flag):
    """Opens a file of rows behind its last whole one; UserError, naming `flag`, where it cannot."""
    with out_file(file, flag):
        opened = open(file, "ab")  # noqa: SIM115
        opened.truncate(sum(len(line) + 1 for line in read_lines(file)))  # a torn last line
    return opened


def append_row(file, row):
    """Adds a row to an open file, and hands it to the system before the next is begun."""
    file.write(to_line(row))
    file.flush()


class Store(dict):
    """A dict kept in a file of rows: `store[key] = value` appends one, a later start reads them.

    columns: names of a row's key and of the one or more parts of its value; a list of them in this
    order is read too. own: further columns that all our rows have; other rows are passed over.
    flag: what errors call the file. Without one the file is a mere convenience: rows that are none
    are passed over, and where it cannot be written, `file` is None and items last in memory.
    """

    def __init__(self, file, columns, flag=None, **own):
        self.columns, self.own, self.file, lines = columns, own, None, []
        lenient = () if flag else (UserError, OSError)
        with contextlib.suppress(*lenient):
            self.file = open_to_append(file, flag)
        with contextlib.suppress(*lenient):
            lines = read_lines(file)
        for n, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                row = dict(zip(columns, row, strict=True)) if isinstance(row, list) else row
                if own.items() <= row.items():
                    key, *value = (row[name] for name in columns)
                    super().__setitem__(key, value if len(value) > 1 else value[0])
            except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
                if flag:
                    fault = f"{file}:{n}: no row of {', '.join(columns)}"
                    raise UserError(f"{fault}; mend it, or move the file away") from error

    def __setitem__(self, key, value):  # `update` and `|=` would bypass it
        super().__setitem__(key, value)
        if self.file:
            parts = [value] if len(self.columns) == 2 else value
            append_row(self.file, dict(zip(self.columns, [key, *parts], strict=True)) | self.own)


class Shared:
    """Rows 0 to n - 1 of a jsonl file that `world` processes write, whatever order they end in.

    Row i is the work of process i mod world, which appends it with its index to FILE.partRANK;
    `join` makes one file of all parts. mine: the share of this process that no former run, of
    however many, has done. check(where, i, row) raises UserError for a row of another run.
    """

    def __init__(self, file, n, check, rank=0, world=1):
        self.name, self.n, self.rank, self.world = file, n, rank, world
        if rank == 0 and not Path(file).exists():  # tells before any work whether it can be
            open_to_append(file, "--out").close()
            os.remove(file)
        done = set()
        for where, i, row in self._rows():
            if not isinstance(i, int) or not 0 <= i < n:
                raise UserError(f"{where}: row {i} of {n} prompts: of another run; move it away")
            check(where, i, row)
            done.add(i)
        self.mine = [i for i in range(rank, n, world) if i not in done]
        self.part = open_to_append(f"{file}.part{rank}", "--out") if self.mine else None

    def _rows(self):
        """("file:row", index, row) of all parts, then of FILE, into which they may be joined."""
        for part in sorted(glob.glob(f"{glob.escape(self.name)}.part*")):
            for where, row in rows_in(part):
                index = row.pop("index", None) if isinstance(row, dict) else None
                yield where, index, row
        if (found := len(read_lines(self.name))) > self.n:
            raise UserError(f"{self.name}: {found} rows for {self.n} prompts; move it away")
        for i, (where, row) in enumerate(rows_in(self.name)):
            yield where, i, row

    def append(self, i, row):
        append_row(self.part, {"index": i} | row)

    def join(self, pause=1.0):
        """Waits for the other processes, and writes FILE; only the first process does.

        Returns whether every row is there; where one is not, the parts stay as they are.
        """
        if self.rank:
            return False
        while len(lines := {i: to_line(row) for _, i, row in self._rows()}) != self.n:
            if self.world == 1:
                return False
            time.sleep(pause)
        replace(self.name, (lines[i] for i in range(self.n)))
        for part in glob.glob(f"{glob.escape(self.name)}.part*"):
            os.remove(part)
        return True
