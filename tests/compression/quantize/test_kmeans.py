"""Laws of k-means and annealed k-means (SR-C)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.common.compiling import CompiledLoop
from src.common.randomness import stream
from src.compression.quantize import kmeans as kmeans_module
from src.compression.quantize.assign import assign, assign_in_chunks
from src.compression.quantize.clustering import Clustering
from src.compression.quantize.kmeans import cluster

both = pytest.mark.parametrize("kind", ["kmeans", "src"])


def run(kind: str, vectors: Tensor, k: int, iterations: int = 10, seed: int = 0) -> Clustering:
    return cluster(kind, vectors, k, iterations, stream(seed, "test"))


def squared_distances(vectors: Tensor, codebook: Tensor) -> Tensor:
    """(n, k) in float64, by brute force."""
    return (vectors.double()[:, None] - codebook.double()[None]).square().sum(2)


def check(vectors: Tensor, k: int, found: Clustering, *, full: bool = True) -> None:
    """What must hold of every clustering."""
    assert found.codebook.shape == (k, vectors.shape[1])
    assert found.codes.shape == (vectors.shape[0],)
    assert torch.equal(found.codebook, found.codebook.half().to(found.codebook.dtype))
    all_distances = squared_distances(vectors, found.codebook)
    taken = all_distances.gather(1, found.codes[:, None]).flatten()
    # the codes were chosen in float32: an error of 1e-6 of the squares that were subtracted makes two centroids equal
    slack = 1e-6 * (vectors.double().square().sum(1) + found.codebook.double().square().sum(1).max())
    assert bool((taken <= all_distances.min(1).values + slack).all())
    assert found.distortion == pytest.approx(float(taken.mean()), rel=1e-4, abs=1e-12)
    if full:
        assert int(torch.bincount(found.codes, minlength=k).min()) > 0
        assert torch.unique(found.codebook, dim=0).shape[0] == k


@both
@pytest.mark.parametrize("iterations", [0, 1, 2, 20])
@pytest.mark.parametrize(("n", "k", "d"), [(400, 64, 4), (1000, 8, 9), (64, 64, 2), (300, 2, 1), (256, 64, 18)])
def test_codes_are_nearest_and_no_cluster_is_empty(kind: str, iterations: int, n: int, k: int, d: int) -> None:
    vectors = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
    check(vectors, k, run(kind, vectors, k, iterations))


@both
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.sampled_from([2, 4, 16, 32]),
    copies=st.integers(1, 60),
    iterations=st.integers(0, 4),
)
def test_no_cluster_is_empty_however_often_vectors_repeat(
    kind: str, seed: int, k: int, copies: int, iterations: int
) -> None:
    """k to 2k distinct vectors, some of them with many copies."""
    draw = np.random.default_rng(seed)
    distinct = draw.choice(np.arange(-200, 200), size=(int(draw.integers(k, 2 * k + 1)), 1), replace=False) / 8
    repeated = np.repeat(distinct, draw.integers(1, copies + 1, len(distinct)), axis=0)
    vectors = torch.from_numpy(np.concatenate([repeated, np.zeros_like(repeated)], axis=1)).float()
    check(vectors, k, run(kind, vectors, k, iterations, seed))


@pytest.mark.parametrize("seed", [195, 285])
def test_no_cluster_is_empty_where_the_centroid_of_zeros_is_nearest_to_all_of_another(seed: int) -> None:
    draw = np.random.default_rng(seed)
    distinct = draw.choice(np.arange(-200, 200), size=(int(draw.integers(32, 65)), 1), replace=False) / 8
    assert 0 in distinct
    repeated = np.repeat(distinct, draw.integers(1, 7, len(distinct)), axis=0)
    vectors = torch.from_numpy(np.concatenate([repeated, np.zeros_like(repeated)], axis=1)).float()
    found = run("src", vectors, 32, 4, seed)
    check(vectors, 32, found)
    assert not found.codebook[0].any()


@both
@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_one_crowd_and_a_few_outliers_fill_every_cluster(kind: str, iterations: int) -> None:
    outliers = torch.arange(1, 32).float()[:, None] * torch.tensor([[3.0, -1.0]])
    vectors = torch.cat([torch.full((5000, 2), 0.5), outliers])
    found = run(kind, vectors, 32, iterations)
    check(vectors, 32, found)
    # a start is off by N(0, 1e-5); the noise of src can leave two outliers in one cluster, but never the crowd with one
    # of them
    assert found.distortion < (0.01 if kind == "src" else 1e-8)


@both
@pytest.mark.parametrize("iterations", [0, 3])
def test_large_vectors_that_16_bits_cannot_hold_do_not_keep_centroids_from_small_ones(
    kind: str, iterations: int
) -> None:
    """Rounding leaves every large vector with an error that no centroid can remove; the small ones still need
    theirs."""
    large = 1000.3 + torch.arange(40.0)[:, None] * 1e-3  # between the 16-bit values 1000 and 1000.5
    small = torch.arange(1, 16)[:, None] / 64
    vectors = torch.cat([large, small.repeat(30, 1)])
    found = run(kind, vectors, 16, iterations)
    check(vectors, 16, found)


@both
def test_crowds_many_times_larger_than_the_number_of_clusters_do_not_hide_each_other(kind: str) -> None:
    vectors = torch.arange(128.0)[:, None].repeat_interleave(3200, dim=0)
    found = run(kind, vectors, 128, 0)
    assert int(torch.bincount(found.codes, minlength=128).min()) > 0
    assert found.distortion < 1e-8  # a start is off by N(0, 1e-5)


@both
@pytest.mark.parametrize("iterations", [0, 10, 25])
def test_exactly_k_distinct_vectors_are_recovered_without_error(kind: str, iterations: int) -> None:
    distinct = (torch.randn(16, 4, generator=torch.Generator().manual_seed(0)) * 8).round() / 8
    assert torch.unique(distinct, dim=0).shape[0] == 16
    vectors = distinct.repeat_interleave(torch.arange(1, 17), dim=0)
    found = run(kind, vectors, 16, iterations)
    check(vectors, 16, found)
    if iterations:
        assert torch.equal(found.codebook[found.codes], vectors)
        assert found.distortion == 0
    else:
        assert found.distortion < 1e-8  # a start is off by N(0, 1e-5)


@both
@pytest.mark.parametrize("iterations", [0, 5])
def test_fewer_distinct_vectors_than_centroids_are_coded_without_error(kind: str, iterations: int) -> None:
    for distinct in (torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 2.0], [-3.0, 0.5], [0.0, 0.0]])):
        vectors = distinct.repeat(20, 1)
        found = run(kind, vectors, 16, iterations)
        # a start is off by N(0, 1e-5); where it was not averaged away a centroid is that close
        assert found.distortion < 1e-8
        check(vectors, 16, found, full=False)


@both
def test_no_centroid_is_left_at_zero_far_from_all_data(kind: str) -> None:
    vectors = torch.randn(500, 3, generator=torch.Generator().manual_seed(1)) + 50
    found = run(kind, vectors, 64, 10)
    assert float(found.codebook.min()) > 40
    assert int(torch.bincount(found.codes, minlength=64).min()) > 0


def lloyd(vectors: Tensor, start: Tensor, iterations: int) -> Tensor:
    """The textbook, in float64; clusters must not become empty."""
    codebook = start.double()
    for _ in range(iterations):
        codes = squared_distances(vectors, codebook).argmin(1)
        codebook = torch.stack([vectors.double()[codes == c].mean(0) for c in range(len(codebook))])
    return codebook


@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 5])
def test_t_iterations_are_t_mean_updates_from_vectors_drawn_from_the_data(iterations: int) -> None:
    vectors = torch.randn(300, 3, generator=torch.Generator().manual_seed(5))
    drawn = run("kmeans", vectors, 8, 0).codebook
    nearest = squared_distances(drawn, vectors)
    assert float(nearest.min(1).values.max()) < 1e-5  # noise of 1e-5 and 16-bit rounding
    start = vectors[nearest.argmin(1)]
    assert torch.unique(start, dim=0).shape[0] == 8
    # 16-bit values around 1 are 1e-3 apart
    found = run("kmeans", vectors, 8, iterations)
    assert found.iterations == iterations
    assert torch.allclose(found.codebook.double(), lloyd(vectors, start, iterations), atol=2e-3)
    for other in {0, 1, 2, 3, 4, 5, 6} - {iterations}:
        assert not torch.allclose(found.codebook.double(), lloyd(vectors, start, other), atol=2e-3)


def test_one_iteration_of_src_is_one_update_without_noise() -> None:
    vectors = torch.randn(300, 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(run("src", vectors, 8, 1).codebook, run("kmeans", vectors, 8, 1).codebook)
    assert torch.equal(run("src", vectors, 8, 0).codebook, run("kmeans", vectors, 8, 0).codebook)


def test_more_iterations_lower_the_distortion_of_kmeans() -> None:
    vectors = torch.randn(2000, 4, generator=torch.Generator().manual_seed(2))
    distortions = [run("kmeans", vectors, 32, t).distortion for t in (0, 1, 2, 3, 5, 10, 30)]
    # strictly, but for the rounding of the codebook to 16 bits (relative 5e-4 of each value, squared)
    assert all(after < before * (1 + 1e-6) for before, after in pairwise(distortions))
    assert distortions[-1] < 0.8 * distortions[0]


@pytest.mark.parametrize("seed", range(3))
def test_src_is_not_worse_than_kmeans_on_gaussian_data(seed: int) -> None:
    vectors = torch.randn(2000, 4, generator=torch.Generator().manual_seed(seed))
    assert run("src", vectors, 32, 40, seed).distortion <= 1.05 * run("kmeans", vectors, 32, 40, seed).distortion


def test_the_noise_of_src_has_the_variance_that_a_noisy_training_set_gives_the_means() -> None:
    """scale^2 sigma^2 / n_c per centroid, seen through the codes that the second of two iterations assigns.

    On a grid of n values in (0, 1) two clusters are cut at the midpoint of two centroids. Iteration 1 of T = 2 moves
    each by noise of scale (1 - 1/2)^0.5; iteration 2 assigns, and its noise-free means tell where the cut was.
    """
    n = 50
    grid = (torch.arange(n) + 0.5) / n
    sigma = float(grid.std(correction=0))
    normalised = []
    for seed in range(1200):
        start = run("src", grid[:, None], 2, 0, seed).codebook.flatten().double()
        low = grid.double() < start.mean()
        n_low = int(low.sum())
        if not 10 <= n_low <= n - 10:
            continue
        expected_cut = (grid[low].double().mean() + grid[~low].double().mean()) / 2
        final = run("src", grid[:, None], 2, 2, seed).codebook.flatten().double().min()
        cut = float(2 * final)  # the mean of the values below the cut is half of it
        variance = 0.5 * sigma**2 * (1 / n_low + 1 / (n - n_low)) / 4  # of the midpoint
        rounding = (1 / n) ** 2 / 12  # the cut is seen at the resolution of the grid
        normalised.append((cut - float(expected_cut)) / (variance + rounding) ** 0.5)
    values = np.array(normalised)
    assert len(values) > 500
    # the standard error of a variance from N normal values is (2/N)^0.5, here below 0.06; a wrong exponent gives 0.5 or
    # 2
    assert values.var() == pytest.approx(1, abs=0.2)
    assert abs(values.mean()) < 0.15


def test_the_noisy_training_set_itself_gives_the_means_that_variance() -> None:
    """The formula that replaces the noisy training set, by simulation (paper: the training set is perturbed)."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(60, 2, generator=draw) * torch.tensor([1.0, 3.0])
    codes = torch.arange(60) % 3 * (torch.arange(60) < 30)  # 40, 10 and 10 members
    sigma, scale = vectors.std(0, correction=0), 0.7
    simulated = []
    for _ in range(4000):
        noisy = vectors + torch.randn(60, 2, generator=draw) * sigma * scale
        simulated.append(torch.stack([noisy[codes == c].mean(0) for c in range(3)]))
    counts = torch.bincount(codes)
    # 4,000 draws give a variance to about 2 %
    assert torch.allclose(torch.stack(simulated).var(0), (scale * sigma) ** 2 / counts[:, None], rtol=0.12)


@both
def test_the_result_depends_on_the_seed(kind: str) -> None:
    vectors = torch.randn(500, 4, generator=torch.Generator().manual_seed(3))
    first, again, other = run(kind, vectors, 32, 5, 1), run(kind, vectors, 32, 5, 1), run(kind, vectors, 32, 5, 2)
    assert torch.equal(first.codebook, again.codebook)
    assert torch.equal(first.codes, again.codes)
    assert not torch.equal(first.codebook, other.codebook)


@both
def test_the_weight_is_not_changed(kind: str) -> None:
    vectors = torch.randn(100, 4)
    before = vectors.clone()
    run(kind, vectors, 8, 3)
    assert torch.equal(vectors, before)


@both
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_relative_distortion_does_not_depend_on_the_scale(kind: str, scale: float) -> None:
    vectors = torch.randn(500, 4, generator=torch.Generator().manual_seed(3))
    plain, scaled = run(kind, vectors, 16, 20), run(kind, vectors * scale, 16, 20)
    assert scaled.distortion / scale**2 == pytest.approx(plain.distortion, rel=0.1)


@both
@pytest.mark.parametrize(
    ("value", "words"),
    [(float("nan"), "not finite"), (float("inf"), "not finite"), (70000.0, "65504"), (-1e30, "65504")],
)
def test_values_that_a_codebook_cannot_hold_are_refused(kind: str, value: float, words: str) -> None:
    vectors = torch.randn(100, 4)
    vectors[50, 2] = value
    with pytest.raises(ValueError, match=words):
        run(kind, vectors, 8)


@both
def test_the_largest_16_bit_value_is_coded(kind: str) -> None:
    vectors = torch.tensor([[65504.0], [-65504.0], [0.0], [1.0]]).repeat(5, 1)
    found = run(kind, vectors, 4, 4)
    assert torch.isfinite(found.codebook).all()
    # the noise of src, which is as wide as the data, can leave 0 and 1 in one cluster
    assert torch.allclose(found.codebook[found.codes], vectors, rtol=0, atol=0.5)


@both
def test_fewer_vectors_than_centroids_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"8 centroids .* 7 subvectors"):
        run(kind, torch.randn(7, 4), 8)


@pytest.mark.parametrize(("n", "d", "k"), [(5000, 4, 256), (3000, 9, 64), (2000, 18, 2), (70_000, 2, 1)])
def test_the_fast_assignment_equals_chunks_and_brute_force(n: int, d: int, k: int) -> None:
    draw = torch.Generator().manual_seed(n)
    vectors, codebook = torch.randn(n, d, generator=draw), torch.randn(k, d, generator=draw)
    exact = torch.cdist(vectors.double(), codebook.double()).square()
    for codes, distances in (assign(vectors, codebook), assign_in_chunks(vectors, codebook)):
        assert codes.dtype == torch.int64
        # ties aside, the nearest; float32 keeps seven digits of |x|^2, about 20 here
        assert torch.allclose(exact.gather(1, codes[:, None])[:, 0], exact.min(1).values, atol=1e-4)
        assert torch.allclose(distances.double(), exact.min(1).values, atol=1e-4)
        assert float(distances.min()) >= 0


def test_compiled_means_equal_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    vectors, codes = torch.randn(4000, 9, generator=draw), torch.randint(40, (4000,), generator=draw)
    found, counts = kmeans_module.means(vectors, codes, 64)
    monkeypatch.setattr(kmeans_module, "ACCUMULATE", CompiledLoop(lambda: None))
    plain, plain_counts = kmeans_module.means(vectors, codes, 64)
    assert torch.allclose(found, plain, atol=1e-6)  # float32 sums of 100 members
    assert torch.equal(counts, plain_counts)
    assert not found[40:].any()


@both
def test_a_tolerance_stops_early_and_costs_little(kind: str) -> None:
    vectors = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0))
    whole = cluster(kind, vectors, 64, 1000, torch.Generator().manual_seed(1))
    early = cluster(kind, vectors, 64, 1000, torch.Generator().manual_seed(1), 5e-3)
    assert whole.iterations == 1000
    assert early.iterations < 1000
    # Lloyd's stops in a slow stretch; the annealings are asked to be as good as the tolerance says, and a tenth more
    # for chance
    assert early.distortion < (1.03 if kind == "kmeans" else 1.0055) * whole.distortion
    assert int(torch.bincount(early.codes, minlength=64).min()) > 0


@both
@pytest.mark.parametrize(
    ("n", "share", "k"), [(2000, 0.3, 64), (2000, 0.9, 64), (400, 0.5, 2), (400, 0.99, 64), (100, 1.0, 8)]
)
def test_vectors_that_are_all_zero_stay_exactly_zero(kind: str, n: int, share: float, k: int) -> None:
    draw = torch.Generator().manual_seed(n)
    vectors = torch.randn(n, 4, generator=draw) + 0.3
    zero = torch.rand(n, generator=draw) < share
    vectors[zero] = 0.0
    vectors[zero.nonzero().flatten()[::2]] *= -1  # negative zeros are zeros
    found = run(kind, vectors, k, 20)
    check(vectors, k, found, full=False)
    decoded = found.codebook[found.codes]
    assert not decoded[zero].any()
    if int((~zero).sum()) < k:
        assert torch.allclose(decoded, vectors, rtol=1e-3, atol=1e-6)
    else:
        others = run(kind, vectors[~zero], k, 20)
        assert found.distortion * n < 1.1 * others.distortion * int((~zero).sum()) + 1e-6 or k == 2


@both
def test_vectors_that_are_nearly_zero_are_no_zeros(kind: str) -> None:
    """Without all-zero vectors no centroid is reserved: the result is that of the quantizer alone."""
    vectors = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    vectors[:100] = 0.0
    vectors[:100, 1] = 1e-30
    alone = getattr(kmeans_module, kind)(vectors, 16, 10, stream(0, "test"))
    found = run(kind, vectors, 16)
    assert torch.equal(found.codebook, alone.codebook)
    assert torch.equal(found.codes, alone.codes)
