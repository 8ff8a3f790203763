"""The settings of a training run: every flag, its default, and the run directory they open."""

import contextlib
import dataclasses
import fcntl
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.cli import UserError, flag
from jobs.files import ASSETS, parse_json, write_json
from jobs.metrics import logger_names
from losses import CONDITIONS
from pairs.cleaning import Rules

# InSPO D.1, where a flag is not given; the embedded default brings its own.
PAPER = {"lr": 5e-7, "batch": 128, "epochs": 3.0, "max_len": 4096}
EMBEDDED = {"lr": 3e-4, "batch": 32, "steps": 60, "max_len": 256}


@dataclass
class Settings(Rules):
    """Every flag. None: decided by the objective, the data or the device, and then printed."""

    loss: str = flag("ins_dpo", "objective; the README has the table")
    model: str | None = flag(None, "HF directory or hub id[@REVISION]; default: the embedded model")
    revision: str | None = flag(None, "branch, tag or commit of --model on the hub")
    data: str | None = flag(
        None, "file, glob, folder or hub id[:split], with @weight; joined by commas"
    )
    data_revision: str | None = flag(None, "branch, tag or commit of --data from the hub")
    eval_data: str | None = flag(None, "validation pairs; default: --eval_pairs held out of --data")
    eval_revision: str | None = flag(None, "as --data_revision, of --eval_data; default: the same")
    out: str | None = flag(None, "run directory; default: runs/LOSS, or the next free LOSS-2, …")
    ref_model: str | None = flag(None, "reference model; default: --model")
    condition: str | None = flag(None, "what each answer is conditioned on", tuple(CONDITIONS))
    bridge: str | None = flag(None, "between a context answer and what follows", ("sep", "turn"))
    reference: str | None = flag(None, "paths of the reference", ("plain", "conditioned"))
    instruction: str = flag("better", "refining instruction: better, another, worse, or your text")
    sep: str | None = flag(None, "InSPO's separator; default: a reserved token, else a blank line")
    beta: float | None = flag(None, "scale of the log-ratio (dpo, rdpo, simpo, cpo, kto)")
    tau: float | None = flag(None, "regularisation (ipo)")
    alpha: float | None = flag(None, "length penalty (rdpo)")
    gamma: float | None = flag(None, "target margin (simpo)")
    delta: float | None = flag(None, "hinge margin (slic)")
    lam: float | None = flag(None, "weight of the second term (orpo, cpo, slic, rrhf)")
    label_smoothing: float | None = flag(None, "assumed share of wrong labels (dpo)")
    lambda_w: float | None = flag(None, "weight of chosen answers (kto)")
    lambda_l: float | None = flag(None, "weight of rejected answers (kto)")
    score_eos: bool = flag(True, "score the end token too")
    steps: int | None = flag(None, "optimizer steps; default: by --epochs")
    epochs: float | None = flag(None, "passes over the data (default 3)")
    batch: int | None = flag(None, "pairs per optimizer step, over all ranks (default 128)")
    row_tokens: int | None = flag(None, "tokens per row; default: by device and longest pair")
    max_len: int | None = flag(None, "tokens of every single path (default 4096)")
    draft_cap: float = flag(0.4, "share of max_len that a rejected context answer may take")
    limit: int | None = flag(None, "read only the first N pairs")
    bad_rows: str = flag("stop", "at a broken row: stop, or drop and count it", ("stop", "drop"))
    lr: float | None = flag(None, "peak learning rate (default 5e-7)")
    warmup: float = flag(0.1, "share of the steps with rising learning rate")
    final_lr: float = flag(0.1, "share of the peak that the cosine ends at")
    weight_decay: float = flag(0.01, "AdamW weight decay")
    clip: float = flag(1.0, "largest gradient norm")
    seed: int = flag(0, "order of the pairs and hold-out")
    eval_pairs: int | None = flag(None, "validation pairs; default: 1000, at most a tenth")
    eval_every: int | None = flag(None, "steps between validations; default: a tenth of the run")
    save_every: int | None = flag(None, "steps between checkpoints; default: as --eval_every")
    keep: int = flag(2, "newest checkpoints kept, beside the best one")
    resume: bool = flag(False, "go on from the newest whole checkpoint in --out")
    dtype: str | None = flag(
        None, "compute dtype; default: bf16 on CUDA, else fp32", ("bf16", "fp32")
    )
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda"))
    attention: str = flag("auto", "attention kernel; auto: flex on CUDA", ("auto", "sdpa", "flex"))
    compile: bool | None = flag(
        None, "compile the blocks (faster, for some ten seconds once); default: on CUDA"
    )
    context_grad: bool = flag(
        True, "false: prompts and context answers run forward only (cheaper, not exact)"
    )
    checkpoint_activations: bool = flag(False, "recompute blocks in backward, to save memory")
    offload: bool = flag(False, "keep parameters and optimizer state in CPU memory")
    shard_group: int | None = flag(
        None, "shard over groups of so many processes; default: over all"
    )
    log: str | None = flag(None, "also report to: tensorboard, wandb, or both with a comma")
    plan: bool = flag(False, "print parameters and bytes per GPU for --model, and stop")


HYPER = ("beta", "tau", "alpha", "gamma", "delta", "lam", "label_smoothing", "lambda_w", "lambda_l")


def resolve(s, kind):
    """Fill in what was not given, for the embedded default (returns True then) or as the paper."""
    if s.model is not None and s.data is None:
        raise UserError(f"--model {s.model} needs --data: a file, a glob or a hub dataset id")
    embedded = s.model is None and s.data is None
    defaults = EMBEDDED if embedded else PAPER
    if embedded:
        s.eval_data = s.eval_data or str(ASSETS / "world" / "test.jsonl")
    s.model = s.model or str(ASSETS / "start")
    s.data = s.data or str(ASSETS / "world" / "pairs.jsonl")
    length_given = s.steps is not None or s.epochs is not None
    for name, value in defaults.items():
        if getattr(s, name) is None and not (length_given and name in ("steps", "epochs")):
            setattr(s, name, value)
    s.dtype = s.dtype or ("bf16" if kind == "cuda" else "fp32")
    if not s.context_grad:
        detach_contexts(s)
    s.attention = ("flex" if kind == "cuda" else "sdpa") if s.attention == "auto" else s.attention
    if s.attention == "flex" and kind != "cuda":
        raise UserError("--attention flex: FlexAttention trains on CUDA only; use sdpa")
    s.compile = kind == "cuda" if s.compile is None else s.compile
    if s.compile and kind == "cpu":
        need_compiler()
    return embedded


def need_compiler():
    """UserError where torch.compile would find no C++ compiler."""
    name = os.environ.get("CXX", "clang++" if platform.system() == "Darwin" else "g++")
    if shutil.which(name) is None:
        raise UserError(f"--compile: there is no {name}; install it, or name yours in CXX")


def detach_contexts(s):
    """What --context_grad false decides: attention piece by piece, since lengths vary."""
    if s.attention == "flex":
        raise UserError("--context_grad false does not go with --attention flex")
    if s.loss == "reward":
        raise UserError("--context_grad false: --loss reward has no context; it scores dialogues")
    s.attention = "sdpa"


@contextlib.contextmanager
def open_out(s, ranks):
    """Choose and create the run directory, and hold it; never one that holds another run.

    A restart by `torchrun --max-restarts` resumes by itself. The lock goes with the process, and
    is waited for a minute, since a run whose launcher was killed may still be saving.
    """
    s.resume = s.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    logger_names(s.log)
    lock = contextlib.ExitStack()

    def choose():
        if s.out is None:
            tries = [Path("runs") / (s.loss + (f"-{n}" if n > 1 else "")) for n in range(1, 10**6)]
            free = next(i for i, path in enumerate(tries) if not path.exists())
            s.out = str(tries[max(0, free - 1) if s.resume else free])
        out = Path(s.out)
        held = (out / "config.json").exists() or any(out.glob("checkpoints/step-*"))
        if held and not s.resume:
            raise UserError(f"--out {out} holds a run; add --resume to go on, or choose another")
        out.mkdir(parents=True, exist_ok=True)
        lock.enter_context(hold(out / ".lock", ranks.say))
        return str(out)

    with lock:
        s.out = ranks.share(choose)
        yield


@contextlib.contextmanager
def hold(file, say, patience=60):
    """Hold a lock file; UserError if another process still has it after `patience` seconds."""
    with open(file, "w", encoding="utf-8") as f:
        until = time.monotonic() + patience
        told = False
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(f"--out {file.parent}: another run is writing to it") from None
                if not told:
                    say(f"{file.parent}: another run is writing to it; waiting")
                told = True
                time.sleep(0.2)
            except OSError as error:
                say(f"{file}: this file system keeps no locks ({error.strerror}); going on without")
                break
        yield


MAY_CHANGE = ("out", "resume", "save_every", "keep", "device", "offload", "checkpoint_activations")
MAY_CHANGE += ("shard_group", "log", "revision")  # --model holds it


def check_config(s, ranks):
    """A resumed run must agree with OUT/config.json; UserError names the flag that does not."""
    file, now = Path(s.out) / "config.json", dataclasses.asdict(s)

    def check():
        if not file.exists():
            return
        content = parse_json(file.read_text(encoding="utf-8"), str(file))
        then = content.get("settings") if isinstance(content, dict) else None
        if not isinstance(then, dict):
            raise UserError(f"{file}: holds no settings; not the config.json of a run")
        for name, value in now.items():
            if name not in MAY_CHANGE and then.get(name) != value:
                was = then.get(name)
                raise UserError(f"--resume: --{name} is {value}, but {file} has {was}")

    ranks.share(check)


def write_config(s, ranks, extra):
    """OUT/config.json: the resolved settings and versions, once nothing stands in the way.

    Before it is there, a start that failed can be corrected and tried again in the same OUT.
    """
    file = Path(s.out) / "config.json"

    def write():
        if file.exists():
            return
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        content = {"settings": dataclasses.asdict(s), "versions": versions, "ranks": ranks.world}
        aside = file.with_name(f".{file.name}")
        write_json(aside, content | extra)
        os.replace(aside, file)

    ranks.share(write)
