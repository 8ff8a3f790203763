"""The split table in short: 5 steps over several processes equal those of one."""

import pytest
import splits
import torch
from runs import final

FLAGS = splits.FLAGS | {"steps": 5}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    splits.train(out := tmp_path_factory.mktemp("one") / "out", 1, FLAGS)
    return out


def test_hybrid_shards_equal_one_process(one, tmp_path):
    splits.train(tmp_path / "four", 4, FLAGS | {"row_tokens": 256, "shard_group": 2})
    assert len(list((tmp_path / "four" / "checkpoints" / "step-5").glob("rank-*"))) == 2
    assert max(splits.deviation(tmp_path / "four", one, 5)) <= 1e-5
    exported = {"rtol": 2**-7, "atol": 1e-6}  # in bf16, where a rounding may go the other way
    torch.testing.assert_close(final(tmp_path / "four"), final(one), **exported)


def test_contexts_without_gradient_are_the_same_however_split(tmp_path):
    """Two forward passes per row, of which FSDP sees one without gradient; empty rows included."""
    flags = FLAGS | {"context_grad": False}
    splits.train(tmp_path / "one", 1, flags)
    change = {"row_tokens": 256, "checkpoint_activations": True}
    splits.train(tmp_path / "two", 2, flags | change)
    assert max(splits.deviation(tmp_path / "two", tmp_path / "one", 5)) <= 1e-5


@pytest.mark.slow  # four processes that each import torch
def test_two_launchers_that_meet_as_nodes_do_equal_one_process(one, tmp_path):
    splits.train(tmp_path / "two", "2 x 1", FLAGS)
    assert len(list((tmp_path / "two" / "checkpoints" / "step-5").glob("rank-*"))) == 2
    assert max(splits.deviation(tmp_path / "two", one, 5)) <= 1e-5
