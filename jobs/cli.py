"""The command line: flags are the fields of a dataclass; a user's mistake is told in one line.

Flags that several commands share are dataclasses to inherit from, at the end, so that each is
declared once. A command where one has another default or meaning declares it again in its own.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import operator
import os
import sys
import types
import typing

from tqdm import tqdm

from losses import hyperparameters


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


BOUNDS = {"least": ("at least", operator.ge), "most": ("at most", operator.le),
          "above": ("above", operator.gt), "below": ("below", operator.lt)}  # fmt: skip


def flag(default, help, choices=None, **bounds):
    """A dataclass field that is also a command-line flag. None as default: decided at run time.

    bounds: what a number must keep to, by the names of BOUNDS; `least=0` where nothing is said.
    """
    told = {"help": help, "choices": choices, "bounds": bounds}
    return dataclasses.field(default=default, metadata=told)


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is told in one line, without the page of usage before it."""

    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")

    def parse_args(self, argv=None):
        """The flags' values. Dashes may stand for underscores: --max-len is --max_len."""
        options = {self._plain(option): option for option in self._option_string_actions}
        words = []
        for word in sys.argv[1:] if argv is None else argv:
            name, equals, value = word.partition("=")
            known = word.startswith("--") and options.get(self._plain(name))
            words.append(known + equals + value if known else word)
        found, unknown = self.parse_known_args(words)
        for name in (word.partition("=")[0] for word in unknown):
            if not name.startswith("-"):
                self.error(f"unexpected word {name!r}")
            near = difflib.get_close_matches(self._plain(name), options, 1)
            meant = f" (did you mean {options[near[0]]}?)" if near else ""
            self.error(f"unknown flag {name}{meant}")
        return found

    @staticmethod
    def _plain(option):
        return option.lstrip("-").replace("-", "_")


def truth(text):
    """The value of a boolean flag: `--name true` is `--name`, `--name=false` is `--no-name`."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parser_of(settings, description, command=""):
    """argparse parser with one flag per field of the dataclass `settings`.

    Help shows them in the groups in which classes declare them, a command's own first.
    """
    script = f"{os.path.basename(sys.argv[0])} {command}".strip()
    parser = Parser(description=description, usage=f"python {script} [flags]", allow_abbrev=False)
    for base in {*settings.__mro__} - {HyperFlags} if issubclass(settings, HyperFlags) else ():
        if clash := HYPER.keys() & vars(base).get("__annotations__", {}):
            fault = f"losses.py: the hyperparameter {min(clash)} is also another flag"
            raise UserError(f"{fault}, which would be taken for it; rename it")
    hints, groups = typing.get_type_hints(settings), {}
    fields = {field.name: field for field in dataclasses.fields(settings)}
    for home in settings.__mro__:
        for name in home.__dict__.get("__annotations__", ()):
            if field := fields.pop(name, None):
                title = home.__doc__.splitlines()[0].removesuffix(".")
                own = home is settings or title.startswith(home.__name__)  # has no docstring
                title = "flags" if own else title
                if title not in groups:
                    groups[title] = parser.add_argument_group(title)
                add_flag(groups[title], field, hints[name])
    return parser


def add_flag(group, field, kind):
    """Adds the flag of a dataclass field whose type hint is `kind` to a group of a parser."""
    name, told = field.name, {"help": field.metadata["help"]}
    if kind is tuple:  # what stands on the command line without a flag
        group.add_argument(name, nargs="*", **told)
        return
    if isinstance(kind, types.UnionType):  # `float | None`: the flag itself is a float
        kind = next(t for t in typing.get_args(kind) if t is not types.NoneType)
    told["default"] = default = field.default
    if default is not None:  # which the text explains
        told["help"] += f" (default {str(default).lower() if kind is bool else default})"
    if kind is bool:
        switch = {"nargs": "?", "const": True, "metavar": "true|false", "type": truth}
        group.add_argument(f"--{name}", **switch, **told)
        off = {"dest": name, "action": "store_false", "default": argparse.SUPPRESS}
        group.add_argument(f"--no-{name}", **off, help=argparse.SUPPRESS)
    else:
        group.add_argument(f"--{name}", type=kind, choices=field.metadata["choices"], **told)


def parse(settings, description, argv=None, command="", before=None):
    """argv -> an instance of the dataclass `settings`; UserError for unknown flags and values.

    before: {name: value} of flags that were given earlier, and hold where argv has no others.
    """
    parser = parser_of(settings, description, command)
    parser.set_defaults(**(before or {}))
    s = settings(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(s):
        value, bounds = getattr(s, field.name), {"least": 0} | field.metadata["bounds"]
        if type(value) not in (int, float):
            continue
        tests = {f"{BOUNDS[n][0]} {b}": BOUNDS[n][1](value, b) for n, b in bounds.items()}
        tests = {"a finite number": math.isfinite(value)} | tests
        for must, holds in reversed(tests.items()):  # the flag's own bounds first
            if not holds:
                raise UserError(f"--{field.name} {value}: must be {must}")
    return s


def require(s, *names):
    """UserError unless these flags of the settings `s` are given."""
    if missing := [f"--{name}" for name in names if getattr(s, name) is None]:
        raise UserError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")


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


# One flag per hyperparameter that an objective names: a new objective brings its flags along.
HYPER = hyperparameters()  # {name: {objective: default}}
_told = {name: ", ".join(f"{o} {v:g}" for o, v in of.items()) for name, of in HYPER.items()}
_any = {"least": -math.inf}
_fields = [(n, float | None, flag(None, f"default: {told}", **_any)) for n, told in _told.items()]
HyperFlags = dataclasses.make_dataclass("HyperFlags", _fields, frozen=True)
HyperFlags.__doc__ = "Hyperparameters of the objectives that name them."


@dataclasses.dataclass(frozen=True)
class CheckpointFlags:
    """Which checkpoint is meant."""

    model: str | None = flag(None, "HF directory or hub id[@REVISION]")
    revision: str | None = flag(None, "branch, tag or commit of --model on the hub")
    fold_system: bool = flag(False, "put a system turn into the user's, for templates without one")


@dataclasses.dataclass(frozen=True)
class ModelFlags(CheckpointFlags):
    """Which model is loaded, in which dtype, and where it runs."""

    dtype: str | None = flag(None, "default: bf16 on CUDA, else fp32", ("bf16", "fp32"))
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda"))


@dataclasses.dataclass(frozen=True)
class DataFlags:
    """Which preference pairs are read, and what happens to rows that are none."""

    data: str | None = flag(None, "file, glob, folder or hub id[:split], with @weight; commas")
    data_revision: str | None = flag(None, "branch, tag or commit of --data on the hub")
    limit: int | None = flag(None, "read only the first N pairs", least=1)
    bad_rows: str = flag("stop", "at a broken row: stop, or drop and count it", ("stop", "drop"))
    ignore_columns: str | None = flag(None, "columns, with commas, that are taken for absent")


@dataclasses.dataclass(frozen=True)
class RunFlags(HyperFlags):
    """What a long run needs: where it writes, how it goes on, how it fits its machine."""

    out: str | None = flag(None, "run directory; default: runs/LOSS, or the next free LOSS-2, …")
    save_every: int | None = flag(None, "steps between checkpoints; default: --eval_every", least=1)
    keep: int = flag(2, "newest checkpoints kept, beside the best one", least=1)
    resume: bool = flag(False, "go on from the newest whole checkpoint in --out")
    log: str | None = flag(None, "also report to: tensorboard, wandb, or both with a comma")
    attention: str = flag("auto", "attention kernel; auto: flex on CUDA", ("auto", "sdpa", "flex"))
    compile: bool | None = flag(None, "compile the blocks (some ten seconds); default: on CUDA")
    checkpoint_activations: bool | None = flag(
        None, "recompute whole blocks in backward; default: on CUDA where they would not fit"
    )
    keep_activations: float | None = flag(
        None, "share of activations that compiled blocks keep; default: what fits", above=0, most=1
    )
    offload: bool = flag(False, "keep parameters and optimizer state in CPU memory")
    shard_group: int | None = flag(None, "shard over groups of N processes; default: all", least=1)


@dataclasses.dataclass(frozen=True)
class InstructionFlags:
    """IFSR's refining instruction, a key of hub.template.INSTRUCTIONS or a text."""

    instruction: str = flag("better", "refining instruction: better, another, worse, or your text")


@dataclasses.dataclass(frozen=True)
class PathFlags(InstructionFlags):
    """How a pair becomes paths: what joins a context answer to what follows, and the limits."""

    bridge: str | None = flag(None, "what joins a context answer to its surroundings: sep, turn")
    sep: str | None = flag(None, "InSPO's separator; default: a reserved token, else a blank line")
    max_len: int | None = flag(None, "longest path; default: 4096, or the model's limit", least=1)
    draft_cap: float = flag(0.4, "share of max_len for a rejected context answer", above=0, most=1)
    score_eos: bool = flag(True, "score the end token too, and count it")
    row_tokens: int | None = flag(None, "tokens per row; default: 8192, on a CPU 2048", least=1)


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """How answers are drawn."""

    temperature: float = flag(0.7, "of the softmax; 0 takes the likeliest token")
    top_p: float = flag(0.95, "mass of the nucleus that tokens are drawn from", above=0, most=1)
    max_new_tokens: int = flag(2048, "longest answer", least=1)
    batch: int = flag(16, "sequences that the own sampler has at once", least=1)


@dataclasses.dataclass(frozen=True)
class EndpointFlags:
    """An OpenAI-compatible chat server in place of the own sampler."""

    endpoint: str | None = flag(None, "OpenAI-compatible server, as http://127.0.0.1:8000/v1")
    concurrency: int = flag(8, "requests that --endpoint has at once", least=1)
    timeout: float = flag(600.0, "seconds that --endpoint may take for one answer", above=0)
    retries: int = flag(8, "further tries of a request before --endpoint is given up")


@dataclasses.dataclass(frozen=True)
class ResultFlags:
    """What an evaluation writes, and the bootstrap behind its intervals."""

    seed: int = flag(0, "of the bootstrap")
    out: str | None = flag(None, "json file for the numbers")


@dataclasses.dataclass(frozen=True)
class VerdictFlags(ResultFlags):
    """An evaluation of verdicts or scores, of which some may be missing."""

    max_missing: float = flag(0.05, "largest share of missing or faulty verdicts", most=1)
