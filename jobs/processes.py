"""The processes of a run: what they say, share and tell each other, and how the model is sharded.

The same code runs as one process and under torchrun, on CPU (gloo) and CUDA (nccl); FSDP2 shards
over all processes, or with --shard_group over groups of them that hold copies of each other.
"""

import contextlib
import ctypes
import itertools
import os
import platform
import resource
import shutil
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch._functorch import config as functorch_config
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from jobs.cli import UserError


class Stopped(Exception):
    """SIGTERM or SIGINT: raised where nothing of the run would be lost, or at the next save."""


class Ranks:
    """The processes of this run: rank, world, device; and what they say and share.

    As a context manager it tells failures: the first rank to fail leaves its message in the store,
    and the others end with it within seconds, wherever they are, instead of waiting for ever.
    """

    def __init__(self, device):
        cuda = torch.cuda.is_available()
        if device == "cuda" and not cuda:
            raise UserError("--device cuda: no CUDA device is available")
        self.kind = ("cuda" if cuda else "cpu") if device == "auto" else device
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if self.kind == "cuda" else torch.device("cpu")
        if self.kind == "cuda":
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
        if (processes := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > 1:
            # torchrun leaves each of several processes a single thread: also to AdamW of --offload
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
        backend = "cuda:nccl,cpu:gloo" if self.kind == "cuda" else "gloo"
        self.store, rank, world = dist.HashStore(), 0, 1
        if "RANK" in os.environ:
            store, rank, world = next(dist.rendezvous("env://"))
            # the launcher's store outlives a restart: what the dead ranks left must not be read
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self.store = dist.PrefixStore(f"attempt-{attempt}", store)
        dist.init_process_group(backend, store=self.store, rank=rank, world_size=world)
        # gloo gives up after 30 minutes and nccl after 10; a download, a guard or a full disk may
        # take longer. Whoever is killed meanwhile closes its connections, which ends the others
        self.patient = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        self.rank, self.world, self.first, self.node_first = rank, world, rank == 0, local == 0
        self.stopping, self.deferred, self.ending = False, False, threading.Event()

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        if self.world > 1:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind, error, trace):
        self.ending.set()
        if isinstance(error, Stopped) or (error and self.stopping and not self.deferred):
            self.say("stopped by a signal while no step was under way: nothing was lost")
            sys.stdout.flush()
            # the others stop by the same signal: no collective would be answered
            os._exit(self.exit_status)
        if self.world == 1 or error is None or isinstance(error, SystemExit):
            dist.destroy_process_group()
        else:
            self._tell(error)

    # -- signals and failures

    @property
    def exit_status(self):
        """Of a run that a signal ended, as a shell gives it: `train && generate` stops there."""
        return 128 + (self.stopping or signal.SIGTERM)  # another rank's, where there is none here

    def _signalled(self, number, frame):
        """Remember the signal: the run saves after its current step. Before any, just end."""
        self.stopping = number
        if not self.deferred:
            raise Stopped

    def _tell(self, error):
        """Leave this rank's message in the store, unless another failed before it."""
        message = " ".join(str(error).split()) or type(error).__name__
        text = f"rank {self.rank}: {message}"
        if lost_contact(error):
            time.sleep(1.0)  # the rank that failed may be about to say why
            text = f"rank {self.rank} lost contact with another, which was killed or cut off; "
            text += "--resume goes on from the last checkpoint"
        try:
            told = self.store.compare_set("failure", "", text).decode()
        except RuntimeError:  # the store went with its host
            told = text
        if isinstance(error, UserError):
            error.told = told != text and told.partition(": ")[2] == message
        elif told != text or lost_contact(error):
            self._end(told)

    def _watch(self):
        """The thread that ends this rank when another has failed; a launcher that is gone stops it.

        A rank that waits in a collective cannot end by itself: nccl would wait for minutes.
        """
        while not self.ending.wait(0.5):
            try:
                if self.store.check(["failure"]):
                    told = self.store.get("failure").decode()
                    if not self.ending.wait(2.0):  # it may come upon the same error by itself
                        self._end(told)
            except RuntimeError:  # the launcher holds the store: without it, save and end
                self.stopping = signal.SIGTERM
                return

    def _end(self, told):
        if self.node_first:
            print(f"error: {told}", file=sys.stderr, flush=True)
        os._exit(1)

    # -- what they say and share

    def say(self, text):
        """Print once, above the progress bar."""
        if self.first and text:
            tqdm.write(text)

    def share(self, make, meanwhile=lambda: None):
        """What rank 0 makes, on every rank; an error of rank 0 is raised on every rank.

        It may take as long as it likes. meanwhile: what the other ranks do.
        """
        return on_all(make if self.first else meanwhile, self.patient)[0]

    def sum(self, tensor):
        """Sum over ranks, in place."""
        dist.all_reduce(tensor)
        return tensor

    def most(self, *values):
        """The largest of each of the ranks' values."""
        tensor = torch.tensor(values, dtype=torch.float32, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def mesh(self, shard_group=None):
        """Device mesh of the shards; 2-D, (copies, shards), where groups of ranks hold copies."""
        if shard_group in (None, self.world):
            return init_device_mesh(self.kind, (self.world,))
        if self.world % shard_group:
            raise UserError(f"--shard_group {shard_group} does not divide {self.world} processes")
        shape, names = (self.world // shard_group, shard_group), ("copy", "shard")
        return init_device_mesh(self.kind, shape, mesh_dim_names=names)


class SharedWork:
    """Work on items that rank 0 alone comes upon, shared over all ranks in blocks of items.

    work: {key: item} -> yields rows. Called on rank 0, within what `lead` makes, this yields the
    rows of all ranks; meanwhile the others do their share.
    """

    def __init__(self, ranks, work, block=64):
        self.ranks, self.work, self.block = ranks, work, block * ranks.world

    def lead(self, make):
        """What make() makes on rank 0, on every rank."""
        return self.ranks.share(lambda: self._lead(make), self._help)

    def __call__(self, items):
        keys = list(items)
        for i in range(0, len(keys), self.block):
            yield from self._block({key: items[key] for key in keys[i : i + self.block]})

    def _lead(self, make):
        try:
            made = make()
        except TOLD:
            self._block(None)  # the others may go on
            raise
        self._block(None)
        return made

    def _help(self):
        going = True
        while going:
            with contextlib.suppress(*TOLD):  # rank 0 has it too, and tells
                going = self._block(None) is not None

    def _block(self, items):
        """The rows of one block of rank 0's items, on every rank; None where there is no more."""
        if (items := self.ranks.share(lambda: items)) is None:
            return None
        own = dict(list(items.items())[self.ranks.rank :: self.ranks.world])
        return list(itertools.chain(*on_all(lambda: list(self.work(own)), self.ranks.patient)))


TOLD = (UserError, OSError, SafetensorError)  # errors that a rank tells the others of


def on_all(make, group=None):
    """Computes [make() of every rank] on every rank; an error of any is raised on all of them."""
    made = fault = None
    try:
        made = make()
    except TOLD as error:
        fault = str(error)
    boxes = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, (made, fault), group)
    for _, fault in boxes:
        if fault is not None:
            raise UserError(fault)
    return [made for made, _ in boxes]


def keep_freed_memory():
    """On a CPU, let glibc keep what a step frees for the next one; elsewhere nothing happens.

    By default gigabytes go back to the system in every step, and come back page by page: up to a
    third of a step's time (docs/performance.md).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD of malloc.h: the heap never shrinks
        libc.mallopt(-4, 0)  # M_MMAP_MAX: and large tensors are part of it


def lost_contact(error):
    """Whether an error of torch.distributed means that another process is gone."""
    signs = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "timed out")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    )


def by_device(s, kind):
    """Computes {name: value} of the settings that the kind of device decides, "cuda" or "cpu".

    UserError for flags that contradict each other or the device.
    """
    attention = s.attention
    if not s.context_grad and attention == "flex":
        raise UserError("--context_grad false does not go with --attention flex")
    if not s.context_grad and s.loss == "reward":
        raise UserError("--context_grad false: --loss reward scores dialogues, not contexts")
    if attention == "auto":  # detached contexts are computed piece by piece: their lengths vary
        attention = "flex" if kind == "cuda" and s.context_grad else "sdpa"
    if attention == "flex" and kind != "cuda":
        raise UserError("--attention flex: FlexAttention trains on CUDA only; use sdpa")
    compiled = kind == "cuda" if s.compile is None else s.compile
    # what inductor compiles with on a CPU, and what Triton compiles its launchers with on CUDA
    name, known = "CXX", ("clang++" if platform.system() == "Darwin" else "g++",)
    if kind == "cuda":
        name, known = "CC", ("gcc", "clang")
    known = (os.environ[name],) if name in os.environ else known
    if (compiled or attention == "flex") and not any(map(shutil.which, known)):
        flags = "--compile" if kind == "cpu" else "--compile and --attention flex, defaults on CUDA"
        raise UserError(f"{flags}: there is no {known[0]}; install it, or name yours in {name}")
    # `torchrun --max-restarts` starts the same command again: it goes on where it was
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return {
        "attention": attention,
        "compile": compiled,
        "dtype": s.dtype or ("bf16" if kind == "cuda" else "fp32"),
        "resume": s.resume or restarted,
    }


def shard(model, s, ranks):
    """Shards a model on the meta device by FSDP2 and gives it memory, still without values.

    fp32 shards and reductions, compute in --dtype; one unit per block, one for the rest.

    The root (embedding, final norm, head) stays gathered through forward, so that the chunked head
    does not gather once per chunk. A single rank keeps everything gathered for the whole step.
    Inputs have the embedding's dtype already; to cast them FSDP would copy the attention rules,
    and what a copy records is lost.
    """
    compute = torch.bfloat16 if s.dtype == "bf16" else None
    dtypes = {"param_dtype": compute, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
    options = {"mesh": ranks.mesh(s.shard_group), "reshard_after_forward": ranks.world > 1}
    options |= {"mp_policy": fsdp.MixedPrecisionPolicy(**dtypes)}
    if s.offload:
        options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=ranks.kind == "cuda")
    if s.keep_activations:  # read when blocks are compiled
        functorch_config.activation_memory_budget = s.keep_activations
    for block in model.blocks:
        block.recompute = s.checkpoint_activations
        if s.compile:
            compile_block(block, s.attention)
        fsdp.fully_shard(block, **options)
    fsdp.fully_shard(model, **options | {"reshard_after_forward": False})
    model.to_empty(device="cpu" if s.offload else ranks.device)


def reduce_gradients(model, world, last):
    """Says what becomes of the gradient of a step's next row; last: whether it is the last one.

    One process keeps it until then; several reduce it row by row, so that none of them holds a
    whole one. Copies of the shards (--shard_group) meet once, across slow nodes.
    """
    model.set_requires_gradient_sync(world > 1 or last)
    model.set_reshard_after_backward(world > 1 or last)
    model.set_requires_all_reduce(last)


def compile_block(block, attention, backend="inductor"):
    """Fuses what a block computes: once for FlexAttention's every length, else for all at once."""
    dynamic = False if attention == "flex" else None
    block.body = torch.compile(block.body, dynamic=dynamic, backend=backend)


def rows_of_shard(n, rank, world):
    """Rows of an n-row tensor that FSDP2 gives to a rank: equal chunks, the last ones shorter."""
    chunk = -(-n // world)
    return slice(min(rank * chunk, n), min((rank + 1) * chunk, n))


def shard_of(tensor):
    """(part, parts) of a DTensor: which of the equal shards this rank holds, and of how many.

    On a 2-D mesh (--shard_group) the shards lie along one dimension, their copies on the other.
    """
    for dim, placement in enumerate(tensor.placements):
        if placement.is_shard():
            return tensor.device_mesh.get_local_rank(dim), tensor.device_mesh.size(dim)
    return 0, 1


def local_part(tensor):
    """(the local tensor, which rows of the whole it is), for a DTensor sharded by rows."""
    if not isinstance(tensor, DTensor):
        return tensor, slice(0, len(tensor))
    return tensor.to_local(), rows_of_shard(len(tensor), *shard_of(tensor))


def whole_tensors(model, dtype):
    """On rank 0 (name, whole CPU tensor) of every parameter; the other ranks send it their rows.

    Every rank iterates to the end. Rank 0 holds one whole tensor at a time, the others none, nor do
    the ranks of further copies (--shard_group) take part.
    """
    rank = dist.get_rank()
    for name, parameter in model.named_parameters():
        (local, rows), (_, parts) = local_part(parameter.detach()), shard_of(parameter)
        local = local.to("cpu", dtype)
        if rank == 0:
            whole = local if parts == 1 else local.new_empty(parameter.shape)
            whole[rows] = local
            for other in range(1, parts):
                if len(theirs := whole[rows_of_shard(len(whole), other, parts)]):
                    dist.recv(theirs, other)
            yield name, whole
        elif rank < parts and len(local):
            dist.send(local, 0)


def peak_memory(kind):
    """The most memory that this process has held so far, in GiB: of the GPU, else resident."""
    if kind == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
