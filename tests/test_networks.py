"""The contract of any network: groups found and verified, compressed, saved, and loaded to the same outputs."""

from __future__ import annotations

import math

import pytest

from benchmarks.networks import measure, names

SAMPLE = (
    *("torchvision:squeezenet1_1", "torchvision:shufflenet_v2_x0_5", "torchvision:mobilenet_v3_small"),
    *("torchvision:lraspp_mobilenet_v3_large", "torchvision:ssdlite320_mobilenet_v3_large", "timm:resnet10t"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in names()]
)
def test_a_network_is_compressed_saved_and_loaded_to_the_same_outputs(name: str) -> None:
    row = measure(name)
    assert row.groups > 0
    assert row.dropped == 0
    assert row.ratio > 2
    assert row.dense < 0.5
    # folding norms rounds in 32 bits; the network's own answer to such noise is the measure
    assert row.loaded == 0 or (math.isfinite(row.loaded) and row.loaded <= 10 * row.noise)


def test_there_are_as_many_networks_as_are_promised() -> None:
    listed = names()
    assert sum(name.startswith("torchvision:") for name in listed) >= 75 + 11 + 4
    if any(name.startswith("timm:") for name in listed):
        assert sum(name.startswith("timm:") for name in listed) >= 40
