"""CMD: which weights are sampled, how they are clustered, and the sums that online least squares needs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lic_fast.optim._cmd import ModeSums, find_modes, sample_counts, sample_places

hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
distance = pytest.importorskip("scipy.spatial.distance")

sizes_strategy = st.lists(st.integers(0, 400), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@given(sizes_strategy, st.integers(1, 600))
@settings(deadline=None, max_examples=200)
def test_the_budget_is_spent_half_by_tensor_and_half_by_size(sizes, samples):
    counts = sample_counts(sizes, samples)
    assert sum(counts) == min(samples, sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    even = samples // (2 * sum(size > 0 for size in sizes))
    for count, size in zip(counts, sizes, strict=True):
        assert count >= min(size, even + int(size / sum(sizes) * samples / 2))


@given(sizes_strategy, st.integers(1, 600), st.integers(0, 5))
@settings(deadline=None, max_examples=200)
def test_places_are_distinct_weights(sizes, samples, seed):
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 1024) * 1024)
    places = sample_places(starts, sizes, samples, seed)
    assert len(places) == min(samples, sum(sizes)) and (places.diff() > 0).all()
    inside = sum(((places >= s) & (places < s + n)).sum() for s, n in zip(starts, sizes, strict=False))
    assert inside == len(places)
    assert torch.equal(places, sample_places(starts, sizes, samples, seed))


def walks(rows, epochs, modes, seed, noise=0.05):
    """Trajectories that follow one of `modes` random walks, up to scale, sign, shift and noise."""
    g = np.random.default_rng(seed)
    base = g.standard_normal((modes, epochs)).cumsum(1)
    which = g.integers(0, modes, rows)
    scale = g.uniform(0.2, 3.0, rows) * g.choice([-1.0, 1.0], rows)
    shift = g.standard_normal(rows)
    return scale[:, None] * base[which] + shift[:, None] + noise * g.standard_normal((rows, epochs)), which


def oracle(trajectories, modes):
    """Written for itself from the description of the published code, with NumPy and SciPy."""
    likeness = np.nan_to_num(np.abs(np.corrcoef(trajectories)))
    labels = hierarchy.fcluster(hierarchy.complete(distance.pdist(likeness)), modes, "maxclust")
    return likeness, {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("modes", [1, 2, 7])
def test_modes_and_references_are_those_of_scipy(seed, modes):
    trajectories, _ = walks(150, 12, 5, seed)
    references, of_row = find_modes(torch.tensor(trajectories), modes)
    clusters = [frozenset(i for i, m in enumerate(of_row) if m == n) for n in range(len(references))]
    likeness, expected = oracle(trajectories, modes)
    assert set(clusters) == expected
    for reference, cluster in zip(references, clusters, strict=True):
        means = {i: likeness[i, sorted(cluster)].mean() for i in cluster}
        assert means[reference] >= max(means.values()) - 1e-12  # two members are alike up to rounding
    counts = [len(cluster) for cluster in clusters]
    assert counts == sorted(counts, reverse=True) and len(counts) <= modes


def test_true_modes_are_found_whatever_the_scale_and_sign():
    trajectories, which = walks(200, 25, 4, seed=3, noise=0.01)
    references, of_row = find_modes(torch.tensor(trajectories), 4)
    assert len(references) == 4
    for mode in range(4):
        assert len({of_row[i] for i in np.flatnonzero(which == mode)}) == 1


def test_large_offsets_and_weights_that_do_not_move():
    trajectories, _ = walks(60, 10, 3, seed=1)
    shifted = torch.tensor(trajectories) * 1e-6 + 1e3
    moved = find_modes(shifted - 1e3, 3)[0]
    still = torch.full((5, 10), 0.25, dtype=torch.float64)
    references, of_row = find_modes(torch.cat([shifted - 1e3, still]), 4)
    assert set(of_row[60:]) == {of_row[60]} and moved  # the still ones are a mode of their own
    assert of_row.count(of_row[60]) == 5 and references[of_row[60]] >= 60


def test_fewer_rows_than_modes():
    for rows in (0, 1, 2):
        references, of_row = find_modes(torch.randn(rows, 6, dtype=torch.float64), 10)
        assert len(of_row) == rows and len(references) <= max(rows, 0)


def test_online_fit_is_batch_least_squares_over_fifty_epochs():
    g = np.random.default_rng(0)
    first, epochs, rows = 5, 50, 300
    r = 0.3 + 0.01 * g.standard_normal((2, epochs)).cumsum(1)
    w = g.standard_normal((rows, 1)) * r[1] + g.standard_normal((rows, 1)) + 0.01 * g.standard_normal((rows, epochs))

    def batch(upto):
        columns = np.stack([r[1, :upto], np.ones(upto)], 1)
        return np.linalg.lstsq(columns, w[:, :upto].T, rcond=None)[0]

    sums = ModeSums(torch.tensor(r[:, :first]))
    k, d = batch(first)
    for t in range(first, epochs):
        gains = sums.gains(torch.tensor(r[:, t]))[1].numpy()
        assert gains[0] == r[1, t] and np.isclose(gains[3], np.hypot(gains[1], gains[2]), rtol=1e-14)
        e = w[:, t] - k * gains[0] - d
        k, d = k + e * gains[1], d + e * gains[2]
        expected = batch(t + 1)
        assert np.abs(k - expected[0]).max() <= 1e-10 and np.abs(d - expected[1]).max() <= 1e-10


def test_a_reference_that_does_not_move_leaves_k_alone():
    sums = ModeSums(torch.full((1, 4), 0.7, dtype=torch.float64))
    gains = sums.gains(torch.tensor([0.7], dtype=torch.float64))
    assert gains[0, 1] == 0 and gains[0, 2] == pytest.approx(1 / 5)
    again = ModeSums.from_state(sums.state_dict())
    assert torch.equal(again.gains(torch.tensor([0.9]).double()), sums.gains(torch.tensor([0.9]).double()))
