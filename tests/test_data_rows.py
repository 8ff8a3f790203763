"""Every path can be read back from a row by the attention rule; a plan takes every pair once."""

from collections import Counter

import numpy as np
import pytest
import torch

from data import Plan, build_row, lay_out, pack, permutation, trie_size
from losses import recipe, unique
from model import visible


def segment(*ids):
    return np.array(ids, dtype=np.int32)


def random_paths(rng, n_paths=None):
    """Paths out of a few short segments, so that prefixes, and whole segments, often coincide."""
    pool = [segment(*(rng.randint(0, 3) for _ in range(rng.randint(1, 3)))) for _ in range(5)]
    paths = []
    for _ in range(n_paths or rng.randint(1, 6)):
        middle = [rng.choice([*pool, segment()]) for _ in range(rng.randint(0, 3))]
        target = rng.choice(pool)
        paths.append(([rng.choice(pool[:2]), *middle, target], rng.randint(1, len(target))))
    return paths


def read(vectors, index):
    """The tokens that row index `index` sees, itself included, in the order of their positions.

    The attention rule, spelled out: k <= index < until[k]. Positions must be 0, 1, 2, …
    """
    seen = [k for k in range(index + 1) if index < vectors.until[k]]
    seen.sort(key=lambda k: int(vectors.positions[k]))
    assert [int(vectors.positions[k]) for k in seen] == list(range(len(seen)))
    return [int(vectors.tokens[k]) for k in seen]


def reads_back(vectors, paths, number=lambda p: p):
    """Every path's scored tokens are in `vectors`, each behind exactly the tokens before it.

    What it sees being exactly its own past, no token sees another branch, pair or padding.
    """
    scored = list(zip(vectors.source, vectors.label, vectors.path, strict=True))
    for p, (segments, n) in enumerate(paths):
        whole = np.concatenate(segments).tolist()
        start = len(whole) - len(segments[-1])
        mine = [(int(s), int(label)) for s, label, path in scored if path == number(p)]
        assert len(mine) == n
        for j, (source, label) in enumerate(mine):
            assert label == whole[start + j]
            assert read(vectors, source) == whole[: start + j]
    return True


# ----------------------------------------------------------------------------- tries


def test_the_example_at_the_head_of_the_file():
    """x -+- w* - turn - l*  and  x -+- l* - turn - w*, one token per segment."""
    x, w, l, turn = segment(10), segment(20), segment(30), segment(40)
    answers = {"chosen": w, "rejected": l}

    def path(p):
        return ([x, *((answers[p.context], turn) if p.context else ()), answers[p.target]], 1)

    paths = [path(p) for p in recipe("ifsr_dpo", condition="averaged").paths]
    trie = lay_out(paths)
    assert trie.tokens == [10, 20, 40, 30, 30, 40, 20]
    assert trie.until == [7, 4, 4, 4, 7, 7, 7]
    assert trie.positions == [0, 1, 2, 3, 1, 2, 3]
    w_x, l_x, w_l, l_w = 0, 1, 2, 3
    by_path = {p: (s, y) for s, y, p in zip(trie.source, trie.label, trie.path, strict=True)}
    assert by_path == {w_x: (0, 20), l_x: (0, 30), w_l: (5, 20), l_w: (2, 30)}


def test_every_path_can_be_read_back(for_all):
    def check(rng):
        paths = random_paths(rng)
        assert reads_back(lay_out(paths), paths)

    for_all(check)


def test_every_prefix_is_stored_once(for_all):
    """As many tokens as the distinct prefixes have, counted segment by segment."""

    def check(rng):
        paths = random_paths(rng)
        prefixes = set()
        for segments, _ in paths:
            full = [tuple(s.tolist()) for s in segments if len(s)]
            prefixes |= {tuple(full[: i + 1]) for i in range(len(full))}
        naive = sum(len(prefix[-1]) for prefix in prefixes)
        assert len(lay_out(paths)) == trie_size(paths) == naive

    for_all(check)


def test_a_reward_head_scores_each_path_once_at_its_last_token(for_all):
    def check(rng):
        paths = random_paths(rng)
        trie = lay_out(paths, score="last")
        assert sorted(trie.path) == list(range(len(paths)))
        for source, p in zip(trie.source, trie.path, strict=True):
            assert read(trie, source) == np.concatenate(paths[p][0]).tolist()

    for_all(check)


# ----------------------------------------------------------------------------- rows


def random_row(rng):
    n_paths = rng.randint(1, 4)
    pairs = [random_paths(rng, n_paths) for _ in range(rng.randint(1, 4))]
    row = build_row(
        list(map(lay_out, pairs)), range(7, 7 + len(pairs)), n_paths, rng.randint(0, 40)
    )
    return row, pairs, n_paths


def test_every_path_of_every_pair_can_be_read_back_from_a_row(for_all):
    def check(rng):
        row, pairs, n_paths = random_row(rng)
        for i, paths in enumerate(pairs):
            assert reads_back(row, paths, number=lambda p, i=i: i * n_paths + p)
        sizes = [trie_size(paths) for paths in pairs]
        assert [b - a for a, b in row.spans] == sizes
        assert [a for a, _ in row.spans] == [sum(sizes[:i]) for i in range(len(sizes))]
        assert row.pairs == list(range(7, 7 + len(pairs)))

    for_all(check)


def test_padding_sees_and_is_seen_by_itself_alone(for_all):
    def check(rng):
        row, pairs, _ = random_row(rng)
        used, mask = sum(map(trie_size, pairs)), visible(row.until, row.positions)
        assert torch.equal(mask[used:], torch.eye(len(mask), dtype=torch.bool)[used:])
        assert not mask[:used, used:].any()

    for_all(check)


def test_the_mask_is_the_rule_token_by_token(for_all):
    """q sees k iff k <= q < until[k]; a window counts positions along the path, not row indices."""

    def check(rng):
        row, _, _ = random_row(rng)
        until, positions = row.until.tolist(), row.positions.tolist()
        for window in (None, rng.randint(1, 6)):
            mask = visible(row.until, row.positions, window).tolist()
            for q, k in np.ndindex(len(until), len(until)):
                sees = k <= q < until[k]
                if window is not None:
                    sees = sees and positions[q] - positions[k] < window
                assert mask[q][k] == sees

    for_all(check)


def test_a_window_ends_where_it_would_on_the_path_alone():
    """Behind a long sibling branch, the last `window` tokens of the path itself are still seen."""
    x, w, l = segment(1, 2), segment(*range(10, 30)), segment(3, 4)
    trie = lay_out([([x, w], 20), ([x, l], 2)])
    row = build_row([trie], [0], n_paths=2)
    assert row.tokens[visible(row.until, row.positions, window=3)[-1]].tolist() == [2, 3, 4]


def test_sums_and_counts_go_to_their_pair_and_path(for_all):
    def check(rng):
        row, pairs, n_paths = random_row(rng)
        values = torch.arange(len(row.path), dtype=torch.float32)
        naive = torch.zeros(len(pairs), n_paths)
        for path, value in zip(row.path.tolist(), values, strict=True):
            naive[path // n_paths, path % n_paths] += value
        assert torch.equal(row.sums(values), naive)
        assert row.counts().tolist() == [[n for _, n in paths] for paths in pairs]

    for_all(check)


def test_values_by_token_stand_in_their_path_in_their_order(for_all):
    def check(rng):
        row, *_ = random_row(rng)
        values = torch.arange(1.0, len(row.path) + 1, requires_grad=True)
        for longest in (None, 7):
            got = row.by_token(values, longest)
            cells = [[[] for _ in range(row.n_paths)] for _ in row.pairs]
            for value, path in zip(values.tolist(), row.path.tolist(), strict=True):
                cells[path // row.n_paths][path % row.n_paths].append(value)
            width = longest or max((len(c) for pair in cells for c in pair), default=0)
            wanted = [[c + [0] * (width - len(c)) for c in pair] for pair in cells]
            assert got.tolist() == wanted
        (grad,) = torch.autograd.grad((got * got.detach()).sum(), values)
        assert grad.tolist() == values.tolist()  # each came from where it belongs

    for_all(check)


def test_a_row_without_tries_is_one_padding_token_or_all_padding():
    """Ranks must run equally many rows, so an empty row must be something a model can run."""
    for pad_to, size in ((0, 1), (5, 5)):
        row = build_row([], [], n_paths=2, pad_to=pad_to)
        assert len(row.tokens) == size and row.until.tolist() == list(range(1, size + 1))
        assert row.spans == [(0, 1)] and row.sums(torch.zeros(0)).shape == (0, 2)


# ----------------------------------------------------------------------------- packing


def test_packing_loses_nothing_and_overfills_nothing(for_all):
    def check(rng):
        row_tokens, multiple = rng.randint(10, 100), rng.randint(1, 4)
        sizes = [rng.randint(1, row_tokens) for _ in range(rng.randint(0, 30))]
        rows = pack(sizes, row_tokens, multiple)
        assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
        filled = [sum(sizes[i] for i in row) for row in rows]
        assert max(filled) <= row_tokens
        assert len(rows) % multiple == 0
        assert max(filled) - min(filled) <= max(sizes, default=0)  # even, to one item
        assert rows == pack(sizes, row_tokens, multiple)

    for_all(check)


def test_packing_takes_as_few_rows_as_hold_the_items():
    assert len(pack([50, 50, 50, 50], row_tokens=100)) == 2
    assert len(pack([60, 60, 60], row_tokens=100)) == 3
    assert len(pack([60, 60, 60], row_tokens=100, multiple=2)) == 4
    assert pack([], row_tokens=100, multiple=2) == [[], []]
    assert len(pack([2, 2, 2, 6], row_tokens=6)) == 2  # the longest first, or it takes three


def test_an_item_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="an item of 101 tokens does not fit 100"):
        pack([3, 101], row_tokens=100)


# ----------------------------------------------------------------------------- the plan


def random_plan(rng):
    return Plan(rng.randint(1, 40), rng.randint(1, 12), rng.randint(0, 3), rng.choice([1, 2, 3]))


def test_every_epoch_takes_every_pair_once(for_all):
    def check(rng):
        plan = random_plan(rng)
        stream = [pair for step in range(plan.steps) for pair in plan.pairs(step)]
        epochs = [stream[e * plan.n_pairs : (e + 1) * plan.n_pairs] for e in range(plan.epochs)]
        assert all(sorted(epoch) == list(range(plan.n_pairs)) for epoch in epochs)
        assert len(stream) == plan.total == plan.epochs * plan.n_pairs
        assert plan.epoch(plan.steps - 1) == plan.epochs

    for_all(check)


def test_only_the_last_step_is_smaller(for_all):
    def check(rng):
        plan = random_plan(rng)
        sizes = [len(plan.pairs(step)) for step in range(plan.steps)]
        assert set(sizes[:-1]) <= {plan.batch} and 1 <= sizes[-1] <= plan.batch

    for_all(check)


def test_a_step_depends_on_the_seed_and_its_number_alone(for_all):
    """Asked in any order, by a plan made anew, without memory, as by a resumed run: the same."""

    def check(rng):
        plan = random_plan(rng)
        straight = [plan.pairs(step) for step in range(plan.steps)]
        for step in sorted(range(plan.steps), key=lambda _: rng.random()):
            permutation.cache_clear()
            anew = Plan(plan.n_pairs, plan.batch, plan.seed, plan.epochs)
            assert anew.pairs(step) == straight[step]

    for_all(check)


def test_the_order_of_the_pairs_does_not_depend_on_the_batch():
    one, four = (Plan(10, batch, seed=1, epochs=2) for batch in (1, 4))
    stream = [pair for step in range(four.steps) for pair in four.pairs(step)]
    assert stream == [one.pairs(step)[0] for step in range(20)]


def test_seeds_and_epochs_differ():
    orders = [Plan(50, 50, seed, epochs=2).pairs(step) for seed in (0, 1) for step in (0, 1)]
    assert len(unique(map(tuple, orders))) == 4


def test_steps_are_counted_right():
    """10 pairs in steps of 4: 3 steps an epoch, 8 in three, 2 in half of one; or as told."""
    assert [Plan(10, 4, 0, epochs).steps for epochs in (1, 3, 0.5)] == [3, 8, 2]
    told = Plan(10, 4, 0, epochs=1, max_steps=7)
    assert told.steps == 7 and [len(told.pairs(step)) for step in range(7)] == [4] * 7
    assert told.epoch(4) == 2.0
    drawn = Counter(pair for step in range(5) for pair in told.pairs(step))
    assert set(drawn.values()) == {2}


def test_epochs_are_random_orders():
    """Where pair 0 stands in 400 epochs of 4 pairs: each place about 100 times (sd 8.7)."""
    places = Counter(Plan(4, 4, seed, epochs=1).pairs(0).index(0) for seed in range(400))
    assert all(60 < places[k] < 140 for k in range(4))
