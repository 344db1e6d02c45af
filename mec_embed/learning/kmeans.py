"""Weighted k-means by faiss, on the GPU where faiss has one, from a k-means++ start."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .sampling import weighted_sample

#: Points that the start is drawn from, at most.
_START_POINTS = 1 << 13


def require_faiss() -> ModuleType:
    """The faiss module; RuntimeError naming the extras where it is not installed."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise RuntimeError(
            "learning codes needs faiss: pip install 'mec-embed[cpu]' (or 'mec-embed[gpu]' with "
            "CUDA; never both, they overwrite each other)"
        ) from error


def weighted_kmeans(
    points: Tensor, weights: Tensor, clusters: int, seed: int, iterations: int = 10
) -> Tensor:
    """Centroids (clusters, D) float32 that minimise the weighted squared error.

    From a k-means++ start: faiss starts from points drawn alike, and where a few weigh much the
    local minimum that it ends in may have several times the error (docs/experiments.md).

    Args:
        points: (n, D) float32. Where there are no more than ``clusters`` of them, they are the
            centroids themselves, repeated.
        weights: (n,) float32, positive. faiss would subsample without regard to them, so all
            points are used; the caller samples.
        clusters: number of centroids.
        seed: of the start.
        iterations: Lloyd iterations.
    """
    if len(points) <= clusters:
        return points.repeat(-(-clusters // len(points)), 1)[:clusters].clone()
    faiss = require_faiss()
    kmeans = faiss.Kmeans(
        points.shape[1],
        clusters,
        niter=iterations,
        seed=seed,
        gpu=getattr(faiss, "get_num_gpus", int)() > 0,
        min_points_per_centroid=1,
        max_points_per_centroid=-(-len(points) // clusters) + 1,
    )
    on_cpu, masses = points.cpu().float(), weights.cpu().float()
    start = start_centroids(on_cpu, masses, clusters, torch.Generator().manual_seed(seed))
    with _one_thread(faiss):
        kmeans.train(
            np.ascontiguousarray(on_cpu.numpy()),
            weights=np.ascontiguousarray(masses.numpy()),
            init_centroids=np.ascontiguousarray(start.numpy()),
        )
    return torch.from_numpy(kmeans.centroids.copy()).to(points.device)


def start_centroids(
    points: Tensor, weights: Tensor, clusters: int, generator: torch.Generator
) -> Tensor:
    """Points to start k-means from: greedy k-means++ (Arthur and Vassilvitskii, 2007).

    One after the other is drawn by weight times squared distance from those before; of a few draws
    the one that leaves the least error is taken.

    Args:
        points: (n, D) float32 on the CPU; of many, a sample by weight is drawn from.
        weights: (n,) float32, positive.
        clusters: number of points to draw.
        generator: of the draws.

    Returns:
        (clusters, D); points are drawn again where all that is left of the error is rounding.
    """
    ids, weights = weighted_sample(weights, max(_START_POINTS, 4 * clusters), generator)
    points, weights = points[ids], weights.double()
    draws = 2 + int(math.log(clusters))
    norms = points.square().sum(1)
    first = torch.multinomial(weights, 1, generator=generator)
    chosen, error = [first[0]], _distances(points, norms, first)[0]
    for _ in range(1, clusters):
        mass = weights * error
        if not float(mass.sum()) > 0:
            mass = weights
        drawn = torch.multinomial(mass, draws, replacement=True, generator=generator)
        left = torch.minimum(_distances(points, norms, drawn), error)
        best = int((left.double() @ weights).argmin())
        chosen.append(drawn[best])
        error = left[best]
    return points[torch.stack(chosen)]


def _distances(points: Tensor, norms: Tensor, drawn: Tensor) -> Tensor:
    """Squared distances (draws, n) of points (n, D) from those that were drawn."""
    products = torch.addmm(norms, points[drawn], points.T, alpha=-2)
    # The difference of close numbers may be negative, and of a point from itself is rounding.
    distances = (products + norms[drawn, None]).clamp_(min=0)
    distances[torch.arange(len(drawn)), drawn] = 0
    return distances


@contextmanager
def _one_thread(faiss: ModuleType) -> Iterator[None]:
    """Let faiss use one CPU thread: its OpenMP runtime and torch's wait for each other by spinning.

    Measured on 2 cores beside another busy process: 0.16 s instead of 4.1 s for 95k x 40.
    """
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
