"""K-means over the keys of a fixed context: clusters become runs of pages that sparse attention reads.

Lloyd's iterations from a seeded sample of the keys. Cost: `iterations 2 H N C D` FLOP, products that torch
does at the speed of its matrix multiplication, and `H CHUNK C` floats of memory. Deterministic for a seed:
sums are taken over tokens sorted by cluster, with no atomics. Limits: none; there is no C++ of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels import checks, choose
from agentctx.kernels.records import Centroids

METRICS = ("cosine", "euclidean")


def kmeans_centroids(
    k: Tensor,
    n_clusters: int,
    *,
    iterations: int = 10,
    metric: str = "cosine",
    seed: int = 0,
    impl: str | None = None,
) -> Centroids:
    """Cluster the keys `k [H, N, D]` of each head.

    "cosine" assigns a key to the centroid of the largest cosine, "euclidean" to the nearest; a centroid is
    the mean of its keys as they are. A cluster that lost its last key takes, from the clusters that have
    two or more, the key that fits worst; so none is empty. `seed` draws the keys to start from. Returns
    `centroids [H, n_clusters, D]` float32, `assignment [H, N]`, `order [H, N]` and `offsets [H, n_clusters
    + 1]`, int32.

    Raises ValueError for `n_clusters` below 1 or above N, iterations below 1, another metric or dtype.
    """
    checks.tensor("k", k, 3)
    checks.floats("k", k)
    if not 1 <= n_clusters <= k.shape[1]:
        raise ValueError(f"n_clusters is {n_clusters}: 1 to the {k.shape[1]} tokens of k is needed")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}: 1 or more is needed")
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}: use one of {', '.join(METRICS)}")
    if len(k) == 0:
        raise ValueError(f"k is {list(k.shape)}: at least one head is needed")
    draw = torch.Generator().manual_seed(seed)
    starts = torch.stack([torch.randperm(k.shape[1], generator=draw)[:n_clusters] for _ in k])
    options = (iterations, metric, starts.to(k.device))
    found: Centroids = choose.run("kmeans_centroids", impl, k.device, k, n_clusters, *options)
    return found
