"""Makes a model of a run's checkpoint: `python evaluate.py extract --run OUT --step N --out DIR`.

A checkpoint holds shards by rank (jobs/checkpoint.py); what comes out is a Hugging Face directory,
as OUT/final is. Nothing is trained and no data is read.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from hub.template import Template
from hub.weights import resolve
from jobs.checkpoint import check_part, saved
from jobs.cli import UserError, flag, require
from jobs.files import out_file, read_json, written_whole
from jobs.rundir import settings_of
from losses import recipe
from model import export, read_config, stored_dtype


@dataclass(frozen=True)
class ExtractFlags:
    run: str | None = flag(None, "run directory, OUT of train.py")
    step: int | None = flag(None, "which of OUT/checkpoints/step-N; default: the newest")
    out: str | None = flag(None, "directory of the model to be made")


def extract(s):
    """Write one of a run's checkpoints as a Hugging Face directory."""
    require(s, "run", "out")
    known = {int(path.name.split("-")[1]): path for path in saved(Path(s.run) / "checkpoints")}
    if not known or (s.step or max(known)) not in known:
        steps = ", ".join(map(str, sorted(known))) or "none"
        raise UserError(f"--run {s.run}: no checkpoint of step {s.step}; there are: {steps}")
    path, settings = known[s.step or max(known)], settings_of(s.run)
    source = resolve(settings["model"])
    config = replace(read_config(source)[1], head=recipe(settings["loss"]).objective.head)
    if Path(s.out).exists():
        raise UserError(f"--out {s.out} is there already; choose another")
    with out_file(s.out), written_whole(s.out) as aside:
        template = Template(source, settings.get("fold_system", False)).source
        export(aside, config, whole_weights(path), source, stored_dtype(source), template)
    print(f"saved: {s.out}, of {path}")


def whole_weights(path):
    """Yields (name, whole tensor) of a checkpoint's weights, joined from the rows of its ranks."""
    files = []
    for r, expected in enumerate(read_json(path / "state.json")["sha256"]):
        check_part(path / f"rank-{r}.safetensors", expected)
        files.append(safe_open(path / f"rank-{r}.safetensors", "pt"))
    for name in sorted(files[0].keys()):  # each rank has rows of every tensor, if only none
        if name.startswith("weight/"):
            rows = [file.get_tensor(name) for file in files]
            yield name.removeprefix("weight/"), torch.cat(rows)
