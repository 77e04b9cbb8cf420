"""What clustering takes in memory, in a process of its own."""

from __future__ import annotations

import pytest

from tests.support.memory import cluster_a_layer, in_a_process_of_its_own, quantize_a_layer


def test_clustering_takes_a_few_times_the_layer_and_no_distance_matrix() -> None:
    n = 400_000
    weight = n * 9 * 4
    taken = in_a_process_of_its_own(cluster_a_layer, n)
    assert taken < 2.5 * weight  # the distances of all vectors to 256 centroids would be 28 times the weight


QUICK = {(4, 0.0, "src"), (9, 0.5, "kmeans")}
"""All combinations take a minute."""
CASES = [
    pytest.param(d, pruned, kind, marks=() if (d, pruned, kind) in QUICK else pytest.mark.slow)
    for d in (2, 4, 9)
    for pruned in (0.0, 0.5)
    for kind in ("kmeans", "src")
]


@pytest.mark.parametrize(("d", "pruned", "kind"), CASES)
def test_quantizing_a_layer_takes_at_most_two_and_a_half_times_its_weight(d: int, pruned: float, kind: str) -> None:
    n = 12_000_000 // d
    assert in_a_process_of_its_own(quantize_a_layer, n, d, pruned, kind) < 2.5 * n * d * 4
