"""Runs a function in several processes of a run, as torchrun starts them, without its seconds."""

import gc
import multiprocessing
import os
import traceback

import torch
import torch.distributed as dist
from runs import free_port

from jobs.processes import Ranks


def on_ranks(world, work):
    """[work(ranks) of every rank]; an error of any fails the caller, with its traceback."""
    fork = multiprocessing.get_context("fork")  # so that `work` may be a closure
    made = fork.Queue()
    shared = made, world, free_port(), work
    processes = [fork.Process(target=_rank, args=(rank, *shared)) for rank in range(world)]
    for process in processes:
        process.start()
    found = dict(made.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    faults = [told for told, _ in found.values() if told]
    assert not faults, "\n".join(faults)
    return [found[rank][1] for rank in range(world)]


def _rank(rank, made, world, port, work):
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    gc.freeze()  # what tests before this left is never torn down here, where its threads are not
    torch.set_num_threads(1)
    told = value = None
    try:
        value = work(Ranks("cpu"))
    except BaseException:
        told = traceback.format_exc()
    made.put((rank, (told, value)))
    made.close()
    made.join_thread()
    if told is None:
        dist.barrier()  # the first holds the store that the others still need
    os._exit(0)  # without the tests' own endings
