"""Random paths that share prefixes, for rows of random tries."""

import numpy as np


def random_paths(rng, n_paths=5):
    """Paths that share prefixes: each continues a random prefix of an earlier one."""
    paths = [([segment(rng), segment(rng)], None)]
    while len(paths) < n_paths:
        stem = paths[rng.integers(len(paths))][0]
        stem = stem[: rng.integers(1, len(stem) + 1)]
        paths.append(([*stem, *(segment(rng) for _ in range(rng.integers(1, 3)))], None))
    return [(s, int(rng.integers(1, len(s[-1]) + 1))) for s, _ in paths]


def segment(rng):
    return rng.integers(0, 260, rng.integers(1, 6)).astype(np.int32)
