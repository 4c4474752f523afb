"""K-means: what any result must be, and the same result as the reference where clusters are clear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.kernels.kmeans import kmeans_centroids
from agentctx.kernels.records import Centroids

IMPLEMENTATIONS = ["reference", "torch"]


def assert_consistent(found: Centroids, k: Tensor) -> None:
    """Sorted by cluster, no cluster empty, every centroid the mean of its keys."""
    heads, n, _ = k.shape
    clusters = found.centroids.shape[1]
    for h in range(heads):
        assert torch.equal(found.order[h].sort()[0], torch.arange(n, dtype=torch.int32))
        assert found.offsets[h, 0] == 0 and found.offsets[h, -1] == n
        for c in range(clusters):
            members = found.order[h, found.offsets[h, c] : found.offsets[h, c + 1]].long()
            assert len(members) > 0, f"cluster {c} is empty"
            assert bool((found.assignment[h, members] == c).all())
            torch.testing.assert_close(
                found.centroids[h, c], k[h, members].float().mean(0), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    heads=st.integers(1, 3),
    n=st.integers(1, 60),
    size=st.sampled_from([1, 8, 33]),
    share=st.floats(0, 1),
    distinct=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_keys(
    impl: str, metric: str, heads: int, n: int, size: int, share: float, distinct: bool, seed: int
) -> None:
    """Also with as many clusters as keys, and with keys that are all alike."""
    k = torch.randn(heads, n if distinct else 1, size, generator=torch.Generator().manual_seed(seed))
    k = k.expand(heads, n, size)
    clusters = max(1, int(share * n))
    found = kmeans_centroids(k, clusters, iterations=3, metric=metric, seed=seed, impl=impl)
    again = kmeans_centroids(k, clusters, iterations=3, metric=metric, seed=seed, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert_consistent(found, k)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_reference(metric: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(4)
    centres = torch.randn(2, 12, 32, generator=draw) * 3
    which = torch.randint(12, (2, 400, 1), generator=draw).expand(-1, -1, 32)
    k = (centres.gather(1, which) + 0.1 * torch.randn(2, 400, 32, generator=draw)).to(dtype)
    want = kmeans_centroids(k, 12, metric=metric, seed=2, impl="reference")
    got = kmeans_centroids(k, 12, metric=metric, seed=2, impl="torch")
    assert torch.equal(got.assignment, want.assignment)
    assert torch.equal(got.order, want.order) and torch.equal(got.offsets, want.offsets)
    torch.testing.assert_close(got.centroids, want.centroids, rtol=1e-5, atol=1e-5)


def test_clusters_fit_better_than_the_sample_they_began_with() -> None:
    k = torch.randn(1, 500, 16, generator=torch.Generator().manual_seed(5))

    def spread(iterations: int) -> float:
        found = kmeans_centroids(k, 20, iterations=iterations, metric="euclidean")
        return float((k[0] - found.centroids[0, found.assignment[0].long()]).square().sum())

    assert spread(10) < 0.97 * spread(1)


def test_seeds_differ() -> None:
    k = torch.randn(1, 200, 16, generator=torch.Generator().manual_seed(6))
    first, second = (kmeans_centroids(k, 20, seed=seed).assignment for seed in (0, 1))
    assert not torch.equal(first, second)


def test_bad_arguments_are_named() -> None:
    k = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match="n_clusters is 6"):
        kmeans_centroids(k, 6)
    with pytest.raises(ValueError, match="n_clusters is 0"):
        kmeans_centroids(k, 0)
    with pytest.raises(ValueError, match="metric is 'dot'"):
        kmeans_centroids(k, 2, metric="dot")
    with pytest.raises(ValueError, match="iterations is 0"):
        kmeans_centroids(k, 2, iterations=0)
    with pytest.raises(ValueError, match="at least one head"):
        kmeans_centroids(k[:0], 2)
    with pytest.raises(ValueError, match="3 dimensions"):
        kmeans_centroids(k[0], 2)
