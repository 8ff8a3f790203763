"""The split table in short: 5 steps over 2 x 2 processes (hybrid shards) equal those of one."""

import splits


def test_hybrid_shards_equal_one_process(tmp_path):
    flags = splits.FLAGS | {"steps": 5}
    splits.train(tmp_path / "one", 1, flags)
    splits.train(tmp_path / "four", 4, flags | {"row_tokens": 256, "shard_group": 2})
    assert len(list((tmp_path / "four" / "checkpoints" / "step-5").glob("rank-*"))) == 2
    assert max(splits.deviation(tmp_path / "four", tmp_path / "one", 5)) <= 1e-5


def test_contexts_without_gradient_are_the_same_however_split(tmp_path):
    """Two forward passes per row, of which FSDP sees one without gradient; empty rows included."""
    flags = splits.FLAGS | {"steps": 5, "context_grad": False}
    splits.train(tmp_path / "one", 1, flags)
    change = {"row_tokens": 256, "checkpoint_activations": True}
    splits.train(tmp_path / "two", 2, flags | change)
    assert max(splits.deviation(tmp_path / "two", tmp_path / "one", 5)) <= 1e-5
