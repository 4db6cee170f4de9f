"""The order of training data: permutations by position, any number of epochs, nothing remembered."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.data.order import indices, permuted

seeds = st.integers(-(2**70), 2**70)
epochs = st.integers(-1, 10**9)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), seeds, epochs)
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), seeds, epochs, st.data())
def test_a_place_is_sent_to_the_same_sample_whatever_is_asked_with_it(
    n: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    places = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=30))
    whole = permuted(np.arange(n), n, seed, epoch)
    assert permuted(np.array(places), n, seed, epoch).tolist() == whole[places].tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(0, 120), st.integers(1, 60), seeds)
def test_the_stream_is_epoch_after_epoch(n: int, position: int, count: int, seed: int) -> None:
    last = (position + count) // n + 1
    stream = np.concatenate([permuted(np.arange(n), n, seed, epoch) for epoch in range(last)])
    assert indices(position, count, n, seed).tolist() == stream[position : position + count].tolist()


def test_far_positions_of_huge_data_cost_nothing() -> None:
    n, position = 10**12 + 7, 10**15
    found = indices(position, 10_000, n, 3)
    assert len(set(found.tolist())) == 10_000
    assert found.min() >= 0 and found.max() < n
    assert found.max() > 0.99 * n  # spread over all of it


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(permuted(np.arange(50), 50, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


@pytest.mark.parametrize("n", [10, 16, 17])  # within, at and just above a power of two
def test_a_sample_comes_at_any_place_alike(n: int) -> None:
    trials = 800
    counts = np.zeros((n, n))
    for seed in range(trials):
        counts[np.arange(n), permuted(np.arange(n), n, seed, 0)] += 1
    expected, deviation = trials / n, (trials / n * (1 - 1 / n)) ** 0.5
    assert np.abs(counts - expected).max() < 5 * deviation


def test_neighbours_are_torn_apart() -> None:
    n = 5000
    found = permuted(np.arange(n), n, 0, 0)
    # Of two independent uniform places the distance is n/3 on average, deviating by n/sqrt(18); here are n - 1 pairs.
    assert abs(np.abs(np.diff(found)).mean() - n / 3) < 5 * n / 18**0.5 / n**0.5
    assert abs(np.corrcoef(np.arange(n), found)[0, 1]) < 5 / n**0.5
