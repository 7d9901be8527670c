"""Randomness is a function of its key, however many processes share a batch."""

import torch

from unlabeled.draws import Draws, seed_of, shuffled, subset


def test_a_key_always_gives_the_same_numbers():
    assert seed_of(0, "augment", 3) == 1157492096626111473  # on every machine
    first, second = Draws(0, "a", 3, rows=4), Draws(0, "a", 3, rows=4)
    assert torch.equal(first.uniform(2), second.uniform(2))
    assert torch.equal(first.permutations(5), second.permutations(5))
    assert not torch.equal(Draws(0, "a", 4, rows=4).uniform(2), Draws(0, "a", 3, rows=4).uniform(2))


def test_processes_hold_slices_of_one_batch():
    def draw(rows, rank, world):
        d = Draws(7, "x", rows=rows, rank=rank, world=world)
        own = (d.uniform(3), d.integers(10), d.normal(2), d.chance(0.5), d.permutations(4))
        return (*own, d.fork("op").uniform(), d.times(2).uniform())

    whole = draw(6, 0, 1)
    parts = [draw(2, rank, 3) for rank in range(3)]
    for i, x in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts]), x)


def test_forks_do_not_depend_on_what_was_drawn_before():
    a, b = Draws(0, rows=3), Draws(0, rows=3)
    a.uniform(100)
    assert torch.equal(a.fork(1).uniform(), b.fork(1).uniform())
    assert not torch.equal(a.fork(1).uniform(), a.fork(2).uniform())


def test_uniform_and_integers_stay_in_their_range():
    d = Draws(1, rows=1000)
    u, i = d.uniform(low=2, high=3), d.integers(9, low=4)
    assert 2 <= u.min() < 2.1 < 2.9 < u.max() < 3
    assert sorted(i.unique().tolist()) == [4, 5, 6, 7, 8]


def test_a_subset_is_balanced_and_fixed():
    labels = [0] * 50 + [1] * 30 + [2] * 5
    kept = subset(labels, 85, 24, 0)
    assert torch.equal(kept, subset(labels, 85, 24, 0))
    assert torch.tensor(labels)[kept].bincount().tolist() == [10, 9, 5]
    assert len(kept.unique()) == 24
    assert len(subset(None, 85, 24, 0).unique()) == 24
    assert not torch.equal(kept, subset(labels, 85, 24, 1))


def test_a_shuffle_is_a_permutation_of_its_key():
    assert sorted(shuffled(9, 1, "order").tolist()) == list(range(9))
    assert not torch.equal(shuffled(99, 1, 0), shuffled(99, 1, 1))
