"""The split table in short: 5 steps over several processes equal those of one."""

import pytest

import splits

FLAGS = splits.FLAGS | {"steps": 5}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    splits.train(out := tmp_path_factory.mktemp("one") / "out", 1, FLAGS)
    return out


def test_hybrid_shards_equal_one_process(one, tmp_path):
    splits.train(tmp_path / "four", 4, FLAGS | {"row_tokens": 256, "shard_group": 2})
    assert len(list((tmp_path / "four" / "checkpoints" / "step-5").glob("rank-*"))) == 2
    assert max(splits.deviation(tmp_path / "four", one, 5)) <= 1e-5


@pytest.mark.slow  # four processes that each import torch
def test_two_launchers_that_meet_as_nodes_do_equal_one_process(one, tmp_path):
    splits.train(tmp_path / "two", "2 x 1", FLAGS)
    assert len(list((tmp_path / "two" / "checkpoints" / "step-5").glob("rank-*"))) == 2
    assert max(splits.deviation(tmp_path / "two", one, 5)) <= 1e-5
