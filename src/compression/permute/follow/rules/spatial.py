"""Operators on maps: pooling, resizing, padding, boxes cut out of a map. Every channel passes on its own."""

from __future__ import annotations

import re

import torch

from ..call import Call, Rule
from ..labels import varying


def resample(call: Call) -> None:
    """Pooling and resizing: the axes in front of the map pass; positions on the map are told apart."""
    x = call.tensors[0]
    found = re.search(r"([123])d", call.name)
    on_the_map = int(found.group(1)) if found else 2
    kept = [call.graph.collapse(label, range(x.dim() - on_the_map)) for label in call.labels(x)]
    labels = [label for label in kept if label is not None]
    for label in labels:
        call.graph.touch(label)
    call.fix(*call.tensors[1:])
    for number in range(len(call.outputs)):
        call.put(labels, number)


def cut_out(call: Call) -> None:
    """`roi_align` and the like: the boxes take the place of the images."""
    x = call.tensors[0]
    labels = []
    for label in call.labels(x):
        kept = call.graph.collapse(label, (1,))
        if kept is not None:
            call.graph.touch(kept)
            labels.append(kept)
    call.fix(*call.tensors[1:])
    call.put(labels)


def pad(call: Call) -> None:
    """Padding with a constant: what is added has no channel, and is not like any other."""
    x = call.tensors[0]
    result = []
    for label in call.labels(x):
        # pairs from the last axis on; an axis that plays no part has nothing to pad
        amounts = [
            amount if label.shape[x.dim() - 1 - number // 2] > 1 else 0 for number, amount in enumerate(call["pad"])
        ]
        wide = torch.nn.functional.pad(label, amounts, value=-1)
        added = wide < 0
        if bool(added.any()):
            new = call.graph.fresh(int(added.sum()))
            wide[added] = new
            call.graph.fix(new)
        if varying(wide):
            result.append(wide)
    call.put(result)


SPATIAL: dict[str, Rule] = {
    **dict.fromkeys(
        (
            *("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "avg_pool1d", "avg_pool2d"),
            *("avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool2d"),
            *("adaptive_max_pool2d", "adaptive_max_pool3d", "mkldnn_max_pool2d", "upsample_nearest1d"),
            *("upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d"),
            *("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
            *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d"),
            *("replication_pad1d", "replication_pad2d", "grid_sampler_2d", "fractional_max_pool2d"),
        ),
        resample,
    ),
    **dict.fromkeys(("roi_align", "roi_pool"), cut_out),
    "constant_pad_nd": pad,
}
