"""What a run needs to go on: sharded weights and optimizer state, checksummed, published whole.

    OUT/checkpoints/step-N/rank-R.safetensors   the rows of every tensor that rank R holds
                           state.json           step, best validation loss, world size, checksums

A checkpoint is written aside, flushed to disk, and renamed when all ranks are done, so a directory
named step-N is whole. It is read by row ranges, so another number of ranks may go on from it.
Everything is safetensors and JSON: nothing in a checkpoint can run code.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from weights import write_json

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state per parameter


def rows_of(n, rank, world):
    """Rows of an n-row tensor that FSDP2 gives to a rank: equal chunks, the last ones shorter."""
    chunk = -(-n // world)
    return slice(min(rank * chunk, n), min((rank + 1) * chunk, n))


def local_part(tensor):
    """(the local tensor, which rows of the whole it is), for a DTensor sharded by rows."""
    if not isinstance(tensor, DTensor):
        return tensor, slice(0, len(tensor))
    mesh = tensor.device_mesh
    return tensor.to_local(), rows_of(len(tensor), mesh.get_local_rank(), mesh.size())


def _tensors(model, optimizer):
    """{name: tensor} of everything that training changes, sharded like the parameters."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach()
        for moment in MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    return tensors


def save(directory, model, optimizer, state, keep):
    """Write OUT/checkpoints/step-N from all ranks, then remove all but the newest `keep`.

    state: JSON-able dict with `step` (optimizer steps done) and whatever else must survive.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    directory = Path(directory)
    aside, final = directory / f".step-{state['step']}", directory / f"step-{state['step']}"
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    parts = {n: local_part(t)[0].cpu().contiguous() for n, t in _tensors(model, optimizer).items()}
    file = aside / f"rank-{rank}.safetensors"
    save_file(parts, file)
    _flush(file)
    checksums = [None] * world
    dist.all_gather_object(checksums, _checksum(file))
    if rank == 0:
        write_json(aside / "state.json", state | {"world": world, "sha256": checksums})
        _flush(aside / "state.json")
        shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
        for old in saved(directory)[keep:]:
            shutil.rmtree(old)
    dist.barrier()


def _flush(file):
    with open(file, "rb") as f:
        os.fsync(f.fileno())


def _checksum(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def saved(directory):
    """Published checkpoints, newest first."""
    found = [p for p in Path(directory).glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: -int(p.name.split("-")[1]))


def newest(directory, say=print):
    """(path, state) of the newest checkpoint whose checksums hold, or None; says what it skips."""
    for path in saved(directory):
        fault = _fault(path)
        if fault is None:
            return path, json.loads((path / "state.json").read_text(encoding="utf-8"))
        say(f"{path}: {fault}; trying the one before")
    return None


def _fault(path):
    """What is wrong with a checkpoint, as every rank agrees; None if it is whole."""
    rank, world = dist.get_rank(), dist.get_world_size()
    fault = None
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for r in range(rank, state["world"], world):  # the ranks share the reading
            if _checksum(path / f"rank-{r}.safetensors") != state["sha256"][r]:
                fault = f"rank-{r}.safetensors does not match its checksum"
    except (OSError, ValueError, KeyError) as error:
        fault = f"not readable ({error})"
    faults = [None] * world
    dist.all_gather_object(faults, fault)
    return next((f for f in faults if f), None)


def load(path, state, model, optimizer):
    """Fill weights and optimizer state from a checkpoint of any number of ranks."""
    files = [safe_open(path / f"rank-{r}.safetensors", "pt") for r in range(state["world"])]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state["step"]), device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }
    with torch.no_grad():
        for name, tensor in _tensors(model, optimizer).items():
            part, rows = local_part(tensor)
            _read_rows(files, name, len(tensor), part, rows)


def _read_rows(files, name, n, part, rows):
    """Copy rows of an n-row tensor from the files of the ranks that hold them."""
    for r, file in enumerate(files):
        held = rows_of(n, r, len(files))
        start, stop = max(rows.start, held.start), min(rows.stop, held.stop)
        if start < stop:
            piece = file.get_slice(name)[start - held.start : stop - held.start]
            part[start - rows.start : stop - rows.start].copy_(piece)
