"""What a run needs to go on: sharded weights and optimizer state, checksummed, published whole.

    OUT/checkpoints/step-N/rank-R.safetensors   the rows of every tensor that rank R holds
                           state.json           step, best validation loss, whose it is, checksums

A checkpoint is copied in memory at once and written by a thread while training goes on: aside,
flushed to disk, and renamed when all ranks are done, so a directory named step-N is whole. Older
ones go only then. It is read by row ranges, so another number of ranks may go on from it.
Everything is safetensors and JSON: nothing in a checkpoint can run code.
"""

import contextlib
import hashlib
import json
import re
import threading
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from jobs.cli import UserError
from jobs.files import checksum, flush, publish, remove, write_json, written_whole
from jobs.processes import local_part, on_all, rows_of_shard, shard_of

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state per parameter


def _tensors(model, optimizer):
    """{name: tensor} of everything that training changes, sharded like the parameters."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach()
        for moment in MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    return tensors


def owner_of(s, recipe, model, reference, sets):
    """What a checkpoint belongs to: all that stays the same on the way of a run -> {name: text}.

    model, reference: digests of weights; sets: {name: data.Dataset}. Which pairs make up a step is
    a function of the tokenised pairs, --batch and --seed. How long and how fast (--steps, --lr, …)
    is no part of it: a run may go on with others.
    """
    choices = (recipe.name, recipe.condition, recipe.bridge, recipe.reference, recipe.hyper)
    owner = {"model": model[:16], "objective": " ".join(map(str, choices))}
    owner |= {"reference": reference[:16] if recipe.objective.uses_reference else "none"}
    for name, dataset in sets.items():
        owner[f"{name} data"] = content_digest(dataset.stored()[0])[:16]
    return owner | {"plan": f"batch {s.batch}, seed {s.seed}"}


class Saver:
    """Writes checkpoints of all ranks into `directory`, in the background, one at a time.

    owner: JSON-able dict of what a checkpoint belongs to (`newest` compares it); keep: how many of
    the newest stay, beside the one of the best validation loss.
    """

    def __init__(self, directory, owner, keep, say=print):
        self.directory, self.owner, self.keep, self.say = Path(directory), owner, keep, say
        self.group = dist.new_group(backend="gloo")  # the thread's own, apart from training's
        self.thread, self.fault = None, None

    def save(self, model, optimizer, state):
        """Copy everything, then write OUT/checkpoints/step-N while the caller goes on.

        state: JSON-able dict with `step` (optimizer steps done) and whatever else must survive.
        """
        if self.thread:
            self.thread.join()
        tensors = _tensors(model, optimizer)
        part, parts = shard_of(next(model.parameters()))
        copy = {n: local_part(t)[0].to("cpu", copy=True) for n, t in tensors.items()}
        if dist.get_rank() >= parts:  # of copies of the shards (--shard_group) the first is written
            copy = None
        args = (copy, part, state | {"world": parts, "owner": self.owner})
        self.thread = threading.Thread(target=self._write, args=args, daemon=True)
        self.thread.start()

    def wait(self):
        """Return when the last checkpoint is published; UserError if it could not be written."""
        if self.thread:
            self.thread.join()
        if self.fault:
            raise UserError(f"{self.fault}; free some space, then --resume")

    def _write(self, tensors, part, state):
        """The thread: every rank writes its part, and rank 0 publishes when all are whole."""
        step, first = state["step"], dist.get_rank() == 0
        aside = self.directory / f".step-{step}"
        try:
            on_all(lambda: first and (remove(aside), aside.mkdir(parents=True)), self.group)
            file = aside / f"rank-{part}.safetensors"
            checksums = on_all(lambda: tensors and write_flushed(tensors, file), self.group)
            whole = state | {"sha256": [c for c in checksums if c]}
            on_all(lambda: first and self._publish(aside, whole), self.group)
            self.fault = None
        except (UserError, RuntimeError) as error:
            self.fault = f"checkpoint step-{step} was not written: {error}"
            # a RuntimeError is a rank that is gone: the training loop will tell
            if first and isinstance(error, UserError):
                remove(aside)
                self.say(f"{self.fault}; training goes on, the next save tries again")

    def _publish(self, aside, state):
        """Rename what is whole to its name; then, and only then, remove what is too old."""
        write_json(aside / "state.json", state)
        publish(aside, aside.with_name(aside.name.removeprefix(".")))
        for old in saved(self.directory)[self.keep :]:
            if old.name != f"step-{state.get('best_step')}":
                remove(old)


def write_flushed(tensors, file):
    """Write {name: tensor} and flush the file to disk -> its checksum."""
    save_file({n: t.contiguous() for n, t in tensors.items()}, file)
    flush(file)
    return checksum(file)


def saved(directory):
    """Published checkpoints, newest first."""
    found = [p for p in Path(directory).glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: -int(p.name.split("-")[1]))


def newest(directory, owner=None, say=print):
    """(path, state) of the newest checkpoint that is whole, or None.

    Says which, and in one line each why it passes over another. UserError for one that is not
    `owner`'s, naming what differs.
    """
    for path in saved(directory):
        try:
            state = on_all(lambda path=path: _read_state(path))[0]
        except UserError as fault:
            say(f"{fault}; trying the one before")
            continue
        theirs, ours = state["owner"], owner or {}
        if other := [name for name, value in ours.items() if theirs.get(name, value) != value]:
            told = ", ".join(f"{name} ({theirs[name]}, now {ours[name]})" for name in other)
            cure = "give back what it had, or start anew in another --out"
            raise UserError(f"--resume: {path} belongs to another {told}; {cure}")
        if untold := [name for name in ours if name not in theirs]:
            say(f"{path}: of an older version; not compared: {', '.join(untold)}")
        say(f"resuming from {path}")
        return path, state
    say(f"no whole checkpoint in {directory}: starting at step 0")
    return None


def _read_state(path):
    """The state of a checkpoint; UserError for damage to this rank's share of it."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        dict(state["owner"])
        for r in range(dist.get_rank(), state["world"], dist.get_world_size()):
            check_part(path / f"rank-{r}.safetensors", state["sha256"][r])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path / 'state.json'} is not readable ({error})") from error
    return state


def check_part(file, expected):
    """UserError for a file of a checkpoint that is not the one of this checksum."""
    if file.is_symlink() or not file.exists():
        raise UserError(f"{file} is {'a link' if file.is_symlink() else 'missing'}")
    if checksum(file) != expected:  # truncated, or changed
        raise UserError(f"{file} does not match its checksum")


def restore(path, state, model, optimizer):
    """Fill weights and optimizer state from a checkpoint of any number of ranks -> its state."""
    files = [safe_open(path / f"rank-{r}.safetensors", "pt") for r in range(state["world"])]
    for parameter in model.parameters():
        step = torch.tensor(float(state["step"]), device=parameter.device)
        moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": step, **moments}
    with torch.no_grad():
        for name, tensor in _tensors(model, optimizer).items():
            part, rows = local_part(tensor)  # our rows, of which each file may hold some
            for r, file in enumerate(files):
                held = rows_of_shard(len(tensor), r, len(files))
                start, stop = max(rows.start, held.start), min(rows.stop, held.stop)
                if start < stop:
                    piece = file.get_slice(name)[start - held.start : stop - held.start]
                    part[start - rows.start : stop - rows.start].copy_(piece)
    return state


def write_keyed(tensors, file, key):
    """Writes {name: tensor} with a key of what they depend on: aside, flushed, renamed."""
    with resumable(file), written_whole(file) as aside:
        # safetensors would read a flipped bit without a word
        save_file(tensors, aside, metadata={"key": key, "sha256": content_digest(tensors)})


@contextlib.contextmanager
def resumable(file):
    """Turns a failure to write `file` into a UserError with the way on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        fault = f"{file} could not be written: {error}"
        raise UserError(f"{fault}; mend that, then --resume") from error


def content_digest(arrays):
    """sha256 of the values of {name: array or CPU tensor}."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(np.ascontiguousarray(arrays[name]))  # no copy, where it is mapped from a file
    return sha.hexdigest()


def read_keyed(file, key, say):
    """{name: tensor} of a file of this key, or None; says so when it belongs to something else."""
    if not file.exists():
        return None
    fault = "is damaged"
    with contextlib.suppress(SafetensorError), safe_open(file, "pt") as cached:
        known = cached.metadata() or {}
        tensors = {name: cached.get_tensor(name) for name in sorted(cached.keys())}
        if known.get("key") != key:
            fault = "belongs to other weights, data or settings"
        elif known.get("sha256") == content_digest(tensors):
            return tensors
    say(f"{file} {fault}; computing it again")
    return None
