"""What clustering takes in memory, in a process of its own."""

from __future__ import annotations

from tests.support.memory import cluster_a_layer, in_a_process_of_its_own


def test_clustering_takes_a_few_times_the_layer_and_no_distance_matrix() -> None:
    n = 400_000
    weight = n * 9 * 4
    taken = in_a_process_of_its_own(cluster_a_layer, n)
    assert weight < taken < 6 * weight  # the distances of all vectors to 256 centroids would be 28 times the weight
