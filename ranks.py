"""The processes of a run: what they say and share, and how the model is sharded over them (FSDP2).

The same code runs as one process and under torchrun, on CPU (gloo) and CUDA (nccl).
"""

import dataclasses
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from tqdm import tqdm

from checkpoint import local_part
from cli import UserError
from model import Transformer
from weights import load_weights, read_config


class Ranks:
    """The processes of this run: rank, world, device; and what they say and share."""

    def __init__(self, device):
        cuda = torch.cuda.is_available()
        if device == "cuda" and not cuda:
            raise UserError("--device cuda: no CUDA device is available")
        self.kind = ("cuda" if cuda else "cpu") if device == "auto" else device
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if self.kind == "cuda" else torch.device("cpu")
        if self.kind == "cuda":
            torch.cuda.set_device(self.device)
        elif (processes := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > 1:
            # torchrun leaves each of several processes a single thread
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
        backend = "cuda:nccl,cpu:gloo" if self.kind == "cuda" else "gloo"
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group(backend, **alone)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(self.kind, (self.world,))

    @property
    def first(self):
        return self.rank == 0

    def say(self, text):
        """Print once, above the progress bar."""
        if self.first:
            tqdm.write(text)

    def share(self, make):
        """What rank 0 makes, on every rank; an error of rank 0 is raised on every rank."""
        box = [None, None]
        if self.first:
            try:
                box[0] = make()
            except (UserError, OSError) as error:
                box[1] = str(error)
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]

    def sum(self, tensor):
        """Sum over ranks, in place."""
        dist.all_reduce(tensor)
        return tensor


def build_model(s, ranks, source, head):
    """Build on meta, shard, and let each rank read only its slices."""
    _, config = read_config(source)
    if head == "logps" and config.head != head:
        raise UserError(
            f"--model {source} is a reward model; --loss {s.loss} needs a language model"
        )
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(config, head=head))
    model.attention = s.attention
    for block in model.blocks:
        block.recompute = s.checkpoint_activations
        if s.compile:
            block.body = torch.compile(block.body)
    shard(model, s, ranks)
    model.to_empty(device="cpu" if s.offload else ranks.device)
    load_weights(model, source, local_part)
    return model


def shard(model, s, ranks):
    """FSDP2: fp32 shards and reductions, compute in --dtype; one unit per block, one for the rest.

    The root (embedding, final norm, head) stays gathered through forward, so that the chunked head
    does not gather once per chunk. A single rank keeps everything gathered for the whole step.
    """
    compute = torch.bfloat16 if s.dtype == "bf16" else None
    offload = CPUOffloadPolicy(pin_memory=ranks.kind == "cuda")
    options = {
        "mesh": ranks.mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        "offload_policy": offload if s.offload else OffloadPolicy(),
        "reshard_after_forward": ranks.world > 1,
    }
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options | {"reshard_after_forward": False})


def reshard(model):
    """Give the gathered parameters back, after forward passes that no backward followed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
