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


def truth(text):
    """The value of a boolean flag: `--name true` is `--name`, `--name=false` is `--no-name`."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parser_of(settings, description):
    """argparse parser with one flag per field of the dataclass `settings`."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(description=description, formatter_class=form, allow_abbrev=False)
    hints = typing.get_type_hints(settings)
    own = settings.__annotations__  # before those that a command inherits
    for field in sorted(dataclasses.fields(settings), key=lambda field: field.name not in own):
        kind, name, told = hints[field.name], field.name, {"help": field.metadata["help"]}
        if field.metadata.get("positional"):
            parser.add_argument(name, nargs="*", **told)
            continue
        if isinstance(kind, types.UnionType):  # `float | None`: the flag itself is a float
            kind = next(t for t in typing.get_args(kind) if t is not types.NoneType)
        told["default"] = field.default
        if kind is bool:
            switch = {"nargs": "?", "const": True, "metavar": "true|false", "type": truth}
            parser.add_argument(f"--{name}", **switch, **told)
            off = {"dest": name, "action": "store_false", "default": argparse.SUPPRESS}
            parser.add_argument(f"--no-{name}", **off, help=argparse.SUPPRESS)
        else:
            choices = field.metadata["choices"]
            parser.add_argument(f"--{name}", type=kind, choices=choices, **told)
    return parser


def parse(settings, description, argv=None):
    """argv -> an instance of the dataclass `settings`; UserError for unknown flags and values."""
    return settings(**vars(parser_of(settings, description).parse_args(argv)))


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
