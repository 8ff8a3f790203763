"""Processes wait for one another as long as it takes, and share what there is to do."""

import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from runs import argv

import train
from jobs import processes
from jobs.cli import UserError, parse


@pytest.fixture
def impatient(monkeypatch):
    """Collectives of training give up after a second, in place of gloo's half an hour."""
    hasty = partial(dist.init_process_group, timeout=timedelta(seconds=1))
    monkeypatch.setattr(dist, "init_process_group", hasty)


def slowly(value):
    time.sleep(2)
    return value


def test_a_slow_first_rank_does_not_end_the_others(impatient):
    """A download, the guard, a slow disk at an export."""
    assert on_ranks(2, lambda ranks: ranks.share(lambda: slowly("made"))) == ["made", "made"]


def test_a_collective_that_gave_up_is_lost_contact(impatient):
    def wait(ranks):
        try:
            ranks.sum(torch.ones(1) if ranks.rank else slowly(torch.ones(1)))
        except RuntimeError as error:
            return processes.lost_contact(error), str(error)

    lost, told = on_ranks(2, lambda ranks: wait(ranks) if ranks.rank else slowly((True, "")))[1]
    assert lost and "Timed out" in told


def test_work_of_the_first_rank_is_shared_in_blocks_and_its_errors_are_told_to_all():
    def square(items):
        if "broken" in items.values():
            raise UserError("a broken item")
        yield from ((key, value**2, dist.get_rank()) for key, value in items.items())

    def work(ranks):
        shared = processes.SharedWork(ranks, square, block=2)
        rows = shared.lead(lambda: list(shared({n: n for n in range(11)})))
        told = []
        for items in ({0: 3, 1: "broken"}, {0: "broken"}):  # of rank 1, of rank 0
            with pytest.raises(UserError, match="a broken item") as error:
                shared.lead(lambda items=items: list(shared(items)))
            told.append(str(error.value))
        with pytest.raises(UserError, match="unreadable"):  # before any work
            shared.lead(unreadable)
        return sorted(rows), told, shared.lead(lambda: "whole")

    def unreadable():
        raise OSError("unreadable")

    first, second = on_ranks(2, work)
    assert first == second and first[2] == "whole"
    assert [row[:2] for row in first[0]] == [(n, n**2) for n in range(11)]
    assert {rank for _, _, rank in first[0]} == {0, 1}


def test_copies_of_the_shards_meet_once_per_step(flags, monkeypatch, no_plots):
    """With --shard_group, across nodes: not once per row. test_splits holds the numbers to it."""
    sums, rows, reduce, build = [], [], dist.all_reduce, train.build_row

    def counted(tensor, *args, group=None, **options):
        sums.extend([tensor.numel()] * (group is not None))
        return reduce(tensor, *args, group=group, **options)

    def watched(*args):
        rows.append(args)
        return build(*args)

    def work(ranks):
        monkeypatch.setattr(dist, "all_reduce", counted)
        monkeypatch.setattr(train, "build_row", watched)
        short = {"loss": "simpo", "steps": 2, "batch": 16, "row_tokens": 160, "eval_pairs": 0}
        train.train(parse(train.TrainFlags, "", argv(flags | short | {"shard_group": 1})), ranks)
        return len(sums), len(rows)

    for met, ran in on_ranks(2, work):
        assert ran > 4, "several rows a step"
        assert met == 2 * (2 + 1), "two steps, two blocks and the root"


def test_on_cuda_too_each_process_has_its_share_of_the_cores(monkeypatch):
    """torchrun leaves them one thread each, and AdamW of --offload runs on the CPU."""
    threads = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda process: range(32))
    monkeypatch.setattr(processes, "dist", SimpleNamespace(**vars(dist)))
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(processes.dist, name, lambda *args, **options: None)
    processes.Ranks("cuda")
    assert threads == [8]


@pytest.mark.parametrize("flags", [{}, {"compile": False}])
def test_on_cuda_a_c_compiler_is_asked_for_at_once(flags, monkeypatch):
    """Triton compiles what launches its kernels, of compiled blocks and of FlexAttention."""
    s = SimpleNamespace(**{"attention": "auto", "context_grad": True, "loss": "dpo", "dtype": None,
                           "compile": None, "resume": False} | flags)  # fmt: skip
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UserError, match="there is no no-such-compiler; install it, .* in CC"):
        processes.by_device(s, "cuda")
    plain = SimpleNamespace(**vars(s) | {"attention": "sdpa", "compile": False})
    assert processes.by_device(plain, "cuda")["compile"] is False
    monkeypatch.delenv("CC")
    monkeypatch.setattr(processes.shutil, "which", lambda name: None if name == "gcc" else name)
    assert processes.by_device(s, "cuda")["attention"] == "flex", "clang does as well"
