"""The command line: flags are the fields of a dataclass; a user's mistake is told in one line."""

import argparse
import contextlib
import dataclasses
import os
import sys
import types
import typing

from tqdm import tqdm


class UserError(Exception):
    """Something a user can put right. The message names the file or flag, the row, and the cure.

    told: another process of the run has printed it already.
    """

    def __init__(self, message):
        super().__init__(message)
        self.told = os.environ.get("RANK", "0") != "0"  # under torchrun every rank raises the same


@contextlib.contextmanager
def as_user_error():
    """Turns a ValueError about what a user gave, as losses.py raises it, into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def flag(default, help, choices=None):
    """A dataclass field that is also a command-line flag. None as default: decided at run time."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def arguments(help):
    """A dataclass field that takes what stands on the command line without a flag, as a list."""
    return dataclasses.field(default_factory=list, metadata={"help": help, "positional": True})


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is told in one line, without the page of usage before it."""

    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")


def parser_of(settings, description):
    """argparse parser with one flag per field of the dataclass `settings`."""
    parser = Parser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(settings)
    own = settings.__annotations__  # before those that a command inherits
    for field in sorted(dataclasses.fields(settings), key=lambda field: field.name not in own):
        kind = hints[field.name]
        if field.metadata.get("positional"):
            parser.add_argument(field.name, nargs="*", help=field.metadata["help"])
            continue
        if isinstance(kind, types.UnionType):  # `float | None`: the flag itself is a float
            kind = next(t for t in typing.get_args(kind) if t is not types.NoneType)
        if kind is bool:
            kwargs = {"action": argparse.BooleanOptionalAction}
        else:
            kwargs = {"type": kind, "choices": field.metadata["choices"]}
        parser.add_argument(
            f"--{field.name}", default=field.default, help=field.metadata["help"], **kwargs
        )
    return parser


def parse(settings, description, argv=None):
    """argv -> an instance of the dataclass `settings`; UserError for unknown flags and values."""
    words = switched(settings, sys.argv[1:] if argv is None else argv)
    return settings(**vars(parser_of(settings, description).parse_args(words)))


def switched(settings, words):
    """A boolean's `--name true` and `--name=false` as argparse wants them: --name and --no-name."""
    hints, out = typing.get_type_hints(settings), []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals and out:
            name, value = out[-1], word
        if value.lower() in ("true", "false") and hints.get(name.removeprefix("--")) is bool:
            out = out if equals else out[:-1]
            out.append(name if value.lower() == "true" else f"--no-{name[2:]}")
        else:
            out.append(word)
    return out


def require(s, *names):
    """UserError unless these flags of the settings `s` are given."""
    for name in names:
        if getattr(s, name) is None:
            raise UserError(f"--{name} is missing")


def progress(label, total, unit, hidden=False, **options):
    """A progress bar with rate and time left; in a log file one line every half minute."""
    calm = {} if sys.stderr.isatty() else {"mininterval": 30.0}
    return tqdm(desc=label, total=total, unit=unit, disable=hidden, **calm | options)


def run(main):
    """Run an entry point; a UserError becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        if not error.told:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except BrokenPipeError:  # `generate.py … | head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
