"""Weighted k-means: weights, determinism and the faiss it runs on."""

from __future__ import annotations

import sys

import pytest
import torch

from mec_embed.learning.kmeans import require_faiss, start_centroids, weighted_kmeans


def _points(rows: int = 300, dim: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def _error(points: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor) -> float:
    nearest = torch.cdist(points, centroids).amin(1).square()
    return float((weights * nearest).sum() / weights.sum())


def test_a_heavy_far_point_gets_a_centroid_of_its_own() -> None:
    points = _points()
    points[7] = torch.tensor([4.0, 4.0, 4.0, 4.0])
    weights = torch.ones(len(points))
    light = weighted_kmeans(points, weights, 4, seed=0)
    weights[7] = 1e6
    heavy = weighted_kmeans(points, weights, 4, seed=0)
    assert float(torch.cdist(points[7:8], heavy).min()) < 1e-3
    assert float(torch.cdist(points[7:8], light).min()) > 0.5


def test_a_single_centroid_is_the_weighted_mean() -> None:
    points, weights = _points(), torch.rand(300) + 0.1
    centroid = weighted_kmeans(points, weights, 1, seed=0)
    expected = (weights[:, None] * points).sum(0) / weights.sum()
    torch.testing.assert_close(centroid[0], expected, rtol=1e-4, atol=1e-5)


def test_weights_count_as_replicated_rows_would() -> None:
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    which = torch.arange(60) % 3
    points = centres[which] + _points(60, 2)
    times = 1 + torch.arange(60) % 5
    weighted = weighted_kmeans(points, times.float(), 3, seed=0, iterations=30)
    replicated = weighted_kmeans(
        points.repeat_interleave(times, 0), torch.ones(int(times.sum())), 3, 0, iterations=30
    )
    uniform = weighted_kmeans(points, torch.ones(60), 3, seed=0, iterations=30)

    def ordered(centroids: torch.Tensor) -> torch.Tensor:
        return centroids[torch.cdist(centres, centroids).argmin(1)]

    torch.testing.assert_close(ordered(weighted), ordered(replicated), rtol=1e-4, atol=1e-4)
    assert float((ordered(weighted) - ordered(uniform)).abs().max()) > 1e-2


@pytest.mark.parametrize("rows", [1, 3, 7, 8])
def test_no_more_points_than_clusters_are_the_centroids(rows: int) -> None:
    points = _points(rows)
    centroids = weighted_kmeans(points, torch.ones(rows), 8, seed=0)
    assert centroids.shape == (8, 4)
    assert all(any(torch.equal(row, point) for point in points) for row in centroids)
    assert all(any(torch.equal(row, point) for row in centroids) for point in points)
    centroids.zero_()
    assert points.abs().sum() > 0, "the centroids must be a copy"


@pytest.mark.parametrize("clusters", [2, 16, 299])
def test_shape_dtype_and_error_better_than_random_rows(clusters: int) -> None:
    points, weights = _points(), torch.rand(300) + 0.1
    centroids = weighted_kmeans(points, weights, clusters, seed=0)
    assert centroids.shape == (clusters, 4) and centroids.dtype is torch.float32
    assert _error(points, weights, centroids) < _error(points, weights, points[:clusters])


def test_all_points_are_used_however_many_there_are() -> None:
    # faiss would take 256 points a centroid at random: the last, heavy ones must not get lost.
    points = torch.cat([torch.zeros(5000, 1), torch.full((1, 1), 9.0)])
    weights = torch.ones(5001)
    weights[-1] = 1e5
    centroids = weighted_kmeans(points, weights, 2, seed=3)
    assert sorted(centroids[:, 0].tolist()) == pytest.approx([0.0, 9.0], abs=1e-2)


def test_same_seed_same_centroids_and_other_seed_others() -> None:
    points, weights = _points(), torch.rand(300) + 0.1
    first = weighted_kmeans(points, weights, 16, seed=5)
    assert torch.equal(first, weighted_kmeans(points, weights, 16, seed=5))
    assert not torch.equal(first, weighted_kmeans(points, weights, 16, seed=6))


@pytest.mark.parametrize("seed", range(5))
def test_few_heavy_points_do_not_spoil_the_start(seed: int) -> None:
    # Seven heavy points among a thousand light ones: points drawn alike would miss most of them.
    points = _points(1000, 2)
    points[:7] = 10 * _points(7, 2, seed=1)
    weights = torch.ones(1000)
    weights[:7] = 1e4
    centroids = weighted_kmeans(points, weights, 8, seed=seed)
    assert float(torch.cdist(points[:7], centroids).amin(1).max()) < 0.05


def test_a_start_is_of_distinct_points_where_there_are_enough() -> None:
    points = _points(40).repeat(3, 1)
    start = start_centroids(points, torch.rand(120) + 0.1, 40, torch.Generator())
    assert len(start.unique(dim=0)) == 40


def test_a_start_repeats_points_where_there_are_too_few() -> None:
    points = torch.tensor([[1e3, 0.1], [1e3, 0.2]]).repeat(10, 1)
    start = start_centroids(points, torch.ones(20), 8, torch.Generator())
    assert start.shape == (8, 2) and len(start.unique(dim=0)) == 2


def test_a_start_of_many_points_is_drawn_by_weight() -> None:
    points = torch.linspace(0, 1, 100_000)[:, None].clone()
    points[-1] = 5
    weights = torch.ones(100_000)
    weights[-1] = 1e6
    start = start_centroids(points, weights, 4, torch.Generator().manual_seed(0))
    assert 5 in start


def test_the_global_random_states_are_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    weighted_kmeans(_points(), torch.ones(300), 16, seed=5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("fails", [False, True])
def test_the_thread_setting_of_faiss_is_restored(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    faiss = require_faiss()
    during = []
    train = faiss.Kmeans.train

    def watched(self, *args, **kwargs):  # noqa: ANN001
        during.append(faiss.omp_get_max_threads())
        if fails:
            raise KeyError("stop")
        return train(self, *args, **kwargs)

    monkeypatch.setattr(faiss.Kmeans, "train", watched)
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(2)
        if fails:
            with pytest.raises(KeyError):
                weighted_kmeans(_points(), torch.ones(300), 4, seed=0)
        else:
            weighted_kmeans(_points(), torch.ones(300), 4, seed=0)
        assert during == [1]
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)


def test_without_faiss_the_error_names_both_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(RuntimeError, match=r"mec-embed\[cpu\].*mec-embed\[gpu\]"):
        require_faiss()
    with pytest.raises(RuntimeError, match=r"mec-embed\[cpu\]"):
        weighted_kmeans(_points(), torch.ones(300), 4, seed=0)
    # Where there is nothing to cluster, faiss is not needed.
    assert weighted_kmeans(_points(3), torch.ones(3), 4, seed=0).shape == (4, 4)


def test_the_points_need_not_be_contiguous() -> None:
    points = _points(300, 8)
    part = points[:, 4:]
    weights = torch.ones(300)
    assert torch.equal(
        weighted_kmeans(part, weights, 8, seed=0),
        weighted_kmeans(part.contiguous(), weights, 8, seed=0),
    )
