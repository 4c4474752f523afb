"""Lloyd's iterations by matrix products and sums over sorted tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from agentctx.kernels.records import Centroids

CHUNK = 4096  # tokens whose fits to all centroids exist at once


def kmeans_centroids(k: Tensor, n_clusters: int, iterations: int, metric: str, starts: Tensor) -> Centroids:
    keys = k.float()
    centroids = keys.gather(1, starts[..., None].expand(-1, -1, k.shape[2]))
    points = normalize(keys, dim=2) if metric == "cosine" else keys
    for _ in range(iterations):
        best, assignment = _assign(points, centroids, metric)
        _fill_empty(assignment, best, n_clusters)
        order = assignment.argsort(dim=1, stable=True)
        counts = torch.stack([torch.bincount(a, minlength=n_clusters) for a in assignment])
        ordered = keys.gather(1, order[..., None].expand_as(keys))
        sums = [
            torch.segment_reduce(x, "sum", lengths=sizes, axis=0, unsafe=True)
            for x, sizes in zip(ordered, counts, strict=True)
        ]
        centroids = torch.stack(sums) / counts[..., None]
    offsets = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    return Centroids(centroids, assignment.int(), order.int(), offsets.int())


def _assign(points: Tensor, centroids: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """For each key the best fit, larger is better, and the centroid that has it."""
    if metric == "cosine":
        to, bias = normalize(centroids, dim=2), None
    else:
        # |k - c|^2 without |k|^2, which no choice among centroids needs; added back where keys are compared
        to, bias = centroids, centroids.square().sum(2)[:, None]
    best, chosen = [], []
    for part in torch.split(points, CHUNK, dim=1):
        fits = part @ to.transpose(1, 2)
        if bias is not None:
            fits = 2 * fits - bias - part.square().sum(2, keepdim=True)
        value, index = fits.max(2)
        best.append(value)
        chosen.append(index)
    return torch.cat(best, 1), torch.cat(chosen, 1)


def _fill_empty(assignment: Tensor, best: Tensor, n_clusters: int) -> None:
    """Give every empty cluster the worst fitting key of those whose cluster has another; in place."""
    for chosen, fits in zip(assignment, best, strict=True):
        sizes = torch.bincount(chosen, minlength=n_clusters)
        for cluster in (sizes == 0).nonzero()[:, 0].tolist():
            spare = fits.where(sizes[chosen] > 1, float("inf"))
            worst = int(spare.argmin())
            sizes[chosen[worst]] -= 1
            sizes[cluster] = 1
            chosen[worst] = cluster
            fits[worst] = float("inf")
