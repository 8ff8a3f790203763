"""Flags that several commands share: dataclasses to inherit from, so each is declared once.

A command that gives a flag another default or meaning declares it again in its own dataclass.
"""

import dataclasses
from dataclasses import dataclass

from jobs.cli import flag
from losses import hyperparameters

# One flag per hyperparameter that an objective names: a new objective brings its flags along.
HYPER = hyperparameters()  # {name: {objective: default}}
_told = {name: ", ".join(f"{o} {v:g}" for o, v in of.items()) for name, of in HYPER.items()}
_fields = [(name, float | None, flag(None, f"default: {told}")) for name, told in _told.items()]
HyperFlags = dataclasses.make_dataclass("HyperFlags", _fields, frozen=True)


@dataclass(frozen=True)
class CheckpointFlags:
    """Which checkpoint is meant."""

    model: str | None = flag(None, "HF directory or hub id[@REVISION]")
    revision: str | None = flag(None, "branch, tag or commit of --model on the hub")


@dataclass(frozen=True)
class ModelFlags(CheckpointFlags):
    """Which model is loaded, in which dtype, and where it runs."""

    dtype: str | None = flag(None, "default: bf16 on CUDA, else fp32", ("bf16", "fp32"))
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class DataFlags:
    """Which preference pairs are read, and what happens to rows that are none."""

    data: str | None = flag(None, "file, glob, folder or hub id[:split], with @weight; commas")
    data_revision: str | None = flag(None, "branch, tag or commit of --data on the hub")
    limit: int | None = flag(None, "read only the first N pairs")
    bad_rows: str = flag("stop", "at a broken row: stop, or drop and count it", ("stop", "drop"))


@dataclass(frozen=True)
class RunFlags:
    """What a long run needs: where it writes, how it goes on, how it fits its machine."""

    out: str | None = flag(None, "run directory; default: runs/LOSS, or the next free LOSS-2, …")
    save_every: int | None = flag(None, "steps between checkpoints; default: as --eval_every")
    keep: int = flag(2, "newest checkpoints kept, beside the best one")
    resume: bool = flag(False, "go on from the newest whole checkpoint in --out")
    log: str | None = flag(None, "also report to: tensorboard, wandb, or both with a comma")
    attention: str = flag("auto", "attention kernel; auto: flex on CUDA", ("auto", "sdpa", "flex"))
    compile: bool | None = flag(None, "compile the blocks (some ten seconds); default: on CUDA")
    checkpoint_activations: bool = flag(False, "recompute blocks in backward, to save memory")
    offload: bool = flag(False, "keep parameters and optimizer state in CPU memory")
    shard_group: int | None = flag(None, "shard over groups of N processes; default: over all")


@dataclass(frozen=True)
class InstructionFlags:
    """IFSR's refining instruction, a key of hub.template.INSTRUCTIONS or a text."""

    instruction: str = flag("better", "refining instruction: better, another, worse, or your text")


@dataclass(frozen=True)
class PathFlags(InstructionFlags):
    """How a pair becomes paths: what joins a context answer to what follows, and the limits."""

    bridge: str | None = flag(None, "what joins a context answer to its surroundings: sep, turn")
    sep: str | None = flag(None, "InSPO's separator; default: a reserved token, else a blank line")
    max_len: int | None = flag(4096, "tokens of every single path")
    draft_cap: float = flag(0.4, "share of max_len that a rejected context answer may take")
    row_tokens: int | None = flag(None, "tokens per row; default: 8192 on CUDA, else 2048")


@dataclass(frozen=True)
class SamplingFlags:
    """How answers are drawn."""

    temperature: float = flag(0.7, "of the softmax; 0 takes the likeliest token")
    top_p: float = flag(0.95, "mass of the nucleus that tokens are drawn from")
    max_new_tokens: int = flag(2048, "longest answer")
    batch: int = flag(16, "sequences that the own sampler has at once")


@dataclass(frozen=True)
class EndpointFlags:
    """An OpenAI-compatible chat server in place of the own sampler."""

    endpoint: str | None = flag(None, "OpenAI-compatible server, as http://127.0.0.1:8000/v1")
    concurrency: int = flag(8, "requests that --endpoint has at once")
    timeout: float = flag(600.0, "seconds that --endpoint may take for one answer")
    retries: int = flag(8, "further tries of a request before --endpoint is given up")


@dataclass(frozen=True)
class ResultFlags:
    """What an evaluation writes, and the bootstrap behind its intervals."""

    seed: int = flag(0, "of the bootstrap")
    out: str | None = flag(None, "json file for the numbers")


@dataclass(frozen=True)
class VerdictFlags(ResultFlags):
    """An evaluation of verdicts or scores, of which some may be missing."""

    max_missing: float = flag(0.05, "largest share of missing or faulty verdicts of a model")
