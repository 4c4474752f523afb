"""Lloyd's iterations, cluster by cluster, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.records import Centroids


def fit(k: Tensor, centroids: Tensor, metric: str) -> Tensor:
    """How well each key fits each centroid, `[N, C]`; larger is better."""
    if metric == "cosine":
        return torch.nn.functional.cosine_similarity(k[:, None], centroids[None], dim=2)
    return -(k[:, None] - centroids[None]).square().sum(2)


def kmeans_centroids(k: Tensor, n_clusters: int, iterations: int, metric: str, starts: Tensor) -> Centroids:
    heads, n, size = k.shape
    centroids = torch.zeros(heads, n_clusters, size, dtype=torch.float64, device=k.device)
    assignment = torch.zeros(heads, n, dtype=torch.int64, device=k.device)
    for h in range(heads):
        keys = k[h].double()
        centroids[h] = keys[starts[h]]
        for _ in range(iterations):
            fits = fit(keys, centroids[h], metric)
            best, assignment[h] = fits.max(1)
            for c in range(n_clusters):
                if bool((assignment[h] == c).any()):
                    continue
                sizes = assignment[h].bincount(minlength=n_clusters)
                spare = sizes[assignment[h]] > 1
                worst = int(best.where(spare, float("inf")).argmin())
                assignment[h, worst] = c
                best[worst] = float("inf")
            for c in range(n_clusters):
                centroids[h, c] = keys[assignment[h] == c].mean(0)
    order = assignment.argsort(dim=1, stable=True)
    counts = torch.stack([a.bincount(minlength=n_clusters) for a in assignment])
    offsets = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    return Centroids(centroids.float(), assignment.int(), order.int(), offsets.int())
