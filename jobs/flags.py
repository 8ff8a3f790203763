"""Flags that several commands share: dataclasses to inherit from, so each is declared once.

A command that gives a flag another default or meaning declares it again in its own dataclass.
"""

from dataclasses import dataclass

from jobs.cli import flag


@dataclass
class ModelFlags:
    """Which model is loaded, in which dtype, and where it runs."""

    model: str | None = flag(None, "HF directory or hub id[@REVISION]")
    revision: str | None = flag(None, "branch, tag or commit of --model on the hub")
    dtype: str | None = flag(None, "default: bf16 on CUDA, else fp32", ("bf16", "fp32"))
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda"))


@dataclass
class InstructionFlags:
    """IFSR's refining instruction, a key of hub.template.INSTRUCTIONS or a text."""

    instruction: str = flag("better", "refining instruction: better, another, worse, or your text")


@dataclass
class PathFlags(InstructionFlags):
    """How a pair becomes paths: what joins a context answer to what follows, and the limits."""

    bridge: str | None = flag(None, "between a context answer and what follows", ("sep", "turn"))
    sep: str | None = flag(None, "InSPO's separator; default: a reserved token, else a blank line")
    max_len: int | None = flag(4096, "tokens of every single path")
    draft_cap: float = flag(0.4, "share of max_len that a rejected context answer may take")
    row_tokens: int | None = flag(None, "tokens per row; default: 8192 on CUDA, else 2048")


@dataclass
class SamplingFlags:
    """How answers are drawn."""

    temperature: float = flag(0.7, "of the softmax; 0 takes the likeliest token")
    top_p: float = flag(0.95, "mass of the nucleus that tokens are drawn from")
    max_new_tokens: int = flag(2048, "longest answer")
    batch: int = flag(16, "sequences that the own sampler has at once")


@dataclass
class EndpointFlags:
    """An OpenAI-compatible chat server in place of the own sampler."""

    endpoint: str | None = flag(None, "OpenAI-compatible server, as http://127.0.0.1:8000/v1")
    concurrency: int = flag(8, "requests that --endpoint has at once")
    timeout: float = flag(600.0, "seconds that --endpoint may take for one answer")
    retries: int = flag(8, "further tries of a request before --endpoint is given up")


@dataclass
class ResultFlags:
    """What an evaluation writes, and the bootstrap behind its intervals."""

    seed: int = flag(0, "of the bootstrap")
    out: str | None = flag(None, "json file for the numbers")


@dataclass
class VerdictFlags(ResultFlags):
    """An evaluation of verdicts or scores, of which some may be missing."""

    max_missing: float = flag(0.05, "largest share of missing or faulty verdicts of a model")
