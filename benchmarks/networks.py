"""Any network: the permutation groups that are found in every network that can be built here, and what compressing with
the default settings gives.

Claims: groups are found in every torchvision network for classification, detection and segmentation and in the listed
timm models, in under 10 s each; none of them changes what the network computes (verified in float64); every network is
compressed, saved, and loaded again to the same outputs.

    python -m benchmarks.networks [--only torchvision:mobilenet_v2,timm:resnet10t [--merge]] [--markdown docs/networks.md]

Weights are random (their seed is in the table's head), channels are permuted at random instead of searched, and
clustering is cut short: neither changes what is measured. The outputs after loading are compared with those before
saving; where they differ it is by a norm's folding, and the network's own answer to noise of 32-bit floats in its
weights stands beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import src as pqf
from src.architectures.architecture import Architecture
from src.architectures.named import find
from src.common.randomness import stream
from src.compression.permute.auto import stored_groups
from src.compression.permute.channels import ChannelGroup
from src.compression.permute.follow.find import find_groups
from src.compression.permute.layout import changes_subvectors, row_classes
from src.compression.permute.verification import check_groups, tensors_of
from src.compression.quantize.compress import build_quantized, places_of
from src.compression.quantize.layers import QuantizedLayer
from src.compression.quantize.plan import Plan, QuantizationSpec, make_plan
from src.compression.quantize.subvectors import to_subvectors
from src.model_files.size import model_size

from .report import machine, print_machine, print_table, verdict, write_json

SEED = 0
LONGEST = 10.0
"""Seconds for the groups that are claimed."""
TIMM = (
    "beit_base_patch16_224", "cait_xxs24_224", "coat_tiny", "coatnet_0_rw_224", "convit_tiny", "convmixer_768_32",
    "convnext_atto", "convnextv2_atto", "crossvit_tiny_240", "cspresnet50", "darknet53", "deit3_small_patch16_224",
    "densenet121", "dla34", "dm_nfnet_f0", "dpn68", "edgenext_xx_small", "efficientformer_l1", "efficientnet_lite0",
    "efficientvit_b0", "eva02_tiny_patch14_224", "fastvit_t8", "fbnetc_100", "focalnet_tiny_srf", "gcvit_xxtiny",
    "ghostnet_100", "gmlp_s16_224", "halonet26t", "hardcorenas_a", "hgnetv2_b0", "hrnet_w18_small",
    "inception_resnet_v2", "lcnet_050", "levit_128s", "maxvit_tiny_rw_224", "mixer_s16_224", "mixnet_s",
    "mnasnet_small", "mobilenetv3_small_050", "mobilenetv4_conv_small", "mobileone_s0", "mobilevit_xxs",
    "mvitv2_tiny", "nest_tiny", "nf_regnet_b0", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnetx_002", "repvgg_a0",
    "res2net50_14w_8s", "resmlp_12_224", "resnest14d", "resnet10t", "resnetv2_50", "rexnet_100", "selecsls42b",
    "seresnext26d_32x4d", "skresnet18", "swinv2_tiny_window8_256", "tf_efficientnet_b0", "tinynet_e",
    "tiny_vit_5m_224", "tnt_s_patch16_224", "twins_pcpvt_small", "vgg11", "vit_tiny_patch16_224", "volo_d1_224",
    "xception41", "xcit_nano_12_p16_224",
)  # fmt: skip
OTHER_PARTS = ("video", "optical_flow", "quantization")


@dataclass
class Row:
    """What was found of one network."""

    name: str
    task: str
    parameters: int
    groups: int = 0
    dropped: int = 0
    seconds_to_find: float = math.nan
    seconds_to_try: float = math.nan
    influenced: float = 0.0
    dense: float = 0.0
    reasons: str = ""
    megabytes: float = 0.0
    ratio: float = 0.0
    loaded: float = math.nan
    noise: float = math.nan
    problem: str = ""


def names() -> list[str]:
    """All networks of the table."""
    from torchvision import models

    parts = {name: models.get_model_builder(name).__module__.split(".")[2] for name in models.list_models()}
    listed = [f"torchvision:{name}" for name, part in parts.items() if part not in OTHER_PARTS]
    try:
        import timm
    except ImportError:
        return listed
    known = set(timm.list_models())
    return listed + [f"timm:{name}" for name in TIMM if name in known]


def measure(name: str) -> Row:
    """Find, try, permute, quantize, save and load one network."""
    torch.manual_seed(SEED)
    architecture = find(name)
    model = architecture.build(architecture.n_classes).eval()
    row = Row(name=name, task=architecture.task, parameters=sum(p.numel() for p in model.parameters()))
    example = torch.rand(1, 3, side(architecture), side(architecture), generator=stream(SEED, "example"))

    def run(network: nn.Module) -> Any:
        return architecture.outputs(network, example)

    begun = time.perf_counter()
    found = find_groups(model, run)
    row.seconds_to_find = time.perf_counter() - begun
    begun = time.perf_counter()
    groups, dropped = check_groups(model, stored_groups(model, found.groups)[0], run, SEED)
    row.seconds_to_try = time.perf_counter() - begun
    row.groups, row.dropped = len(groups), len(dropped)
    plan = make_plan(model, QuantizationSpec(k_means_type="kmeans", k_means_n_iters=0))
    row.influenced = influenced(model, plan, groups)
    n_values = sum(weight.n_values for weight in plan.dense) + sum(
        place.parameter.numel() for place in places_of(model, plan).values()
    )
    row.dense = sum(weight.n_values for weight in plan.dense) / n_values
    row.reasons = "; ".join(dict.fromkeys(weight.reason for weight in plan.dense))
    for group in groups:
        group.apply(model, group.random(stream(SEED, "permutation", group.label)))
    _quantize(model, plan)
    counted = model_size(model)
    row.megabytes, row.ratio = counted.megabytes, counted.ratio
    row.loaded, row.noise = _round_trip(model, architecture, run)
    return row


def side(architecture: Architecture) -> int:
    """Of the images: what the network is made for; small ones for detectors, whose size is free."""
    return (
        320
        if architecture.name.endswith(("ssd300_vgg16", "fpn_320"))
        else (128 if architecture.task == "detection" else architecture.image_size)
    )


def influenced(model: nn.Module, plan: Plan, groups: Sequence[ChannelGroup]) -> float:
    """Share of the quantized values whose subvectors a permutation of the groups can change."""
    places = places_of(model, plan)
    of_tensor = {id(place.parameter): name for name, place in places.items()}
    tensors = {name: of_tensor[id(p)] for name, p in model.named_parameters() if id(p) in of_tensor}
    reached: set[str] = set()
    for group in groups:
        held: dict[str, list[Any]] = {}
        for place in group.places:
            if place.tensor in tensors:
                held.setdefault(place.tensor, []).append(place)
        for tensor, own in held.items():
            weight = tensors[tensor]
            if weight not in reached:
                shape = tuple(places[weight].parameter.shape)
                if changes_subvectors(row_classes(shape, own, group.n_blocks), plan.layers[weight].d):
                    reached.add(weight)
    total = sum(place.parameter.numel() for place in places.values())
    return sum(places[name].parameter.numel() for name in reached) / total if total else 0.0


def _quantize(model: nn.Module, plan: Plan) -> None:
    """Codebooks of subvectors drawn from the weight, and the nearest of a few of them as codes: what the size and the
    files depend on, without the minutes that clustering takes."""
    weights = {name: place.parameter.detach().clone() for name, place in places_of(model, plan).items()}
    build_quantized(model, plan)
    modules = dict(model.named_modules())
    done: set[int] = set()
    for name, layer in plan.layers.items():
        quantized = modules.get(name, modules.get(f"{name}_quantized"))
        assert isinstance(quantized, QuantizedLayer)
        if id(quantized.codebook) in done:
            continue
        done.add(id(quantized.codebook))
        vectors = to_subvectors(weights[name], layer.d)
        draw = stream(SEED, "codes", name)
        chosen = vectors[torch.randint(len(vectors), (layer.k,), generator=draw)]
        quantized.set_codes(chosen.half().float(), torch.randint(layer.k, (len(vectors),), generator=draw))


def _round_trip(model: nn.Module, architecture: Architecture, run: Any) -> tuple[float, float]:
    """Largest relative difference of an output after saving and loading, and the network's own answer to noise of
    32-bit floats."""
    with torch.no_grad():
        before = [tensor.clone() for tensor in tensors_of(run(model))]
    with tempfile.TemporaryDirectory() as folder:
        pqf.save(model, Path(folder) / "model.safetensors", arch=architecture.name)
        torch.manual_seed(SEED + 1)
        loaded = pqf.load(Path(folder) / "model.safetensors", into=architecture.build(architecture.n_classes))
    with torch.no_grad():
        found = difference(before, tensors_of(run(loaded)))
        if not found:
            return 0.0, 0.0
        draw = stream(SEED, "noise")
        for parameter in model.parameters():
            parameter.mul_(1 + 1.2e-7 * (torch.rand(parameter.shape, generator=draw) * 2 - 1))
        return found, difference(before, tensors_of(run(model)))


def difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest, relative to the norm of an output."""
    smallest = torch.finfo(torch.float32).tiny
    pairs = zip(before, after, strict=True)
    return max((float((b - a).norm() / a.norm().clamp_min(smallest)) for a, b in pairs), default=math.inf)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines."""
    head = [
        "network", "parameters", "groups", "seconds", "a permutation reaches", "left dense", "MB", "times smaller",
        "after loading",
    ]  # fmt: skip
    lines = []
    for row in rows:
        if row.problem:
            lines.append([row.name, f"{row.parameters / 1e6:.1f} M", "-", "-", "-", "-", "-", "-", row.problem])
            continue
        same = "identical" if not row.loaded else f"{row.loaded:.1e} (own noise {row.noise:.1e})"
        dropped = f" (+{row.dropped} dropped)" if row.dropped else ""
        lines.append(
            [
                row.name,
                f"{row.parameters / 1e6:.1f} M",
                f"{row.groups}{dropped}",
                f"{row.seconds_to_find:.1f} + {row.seconds_to_try:.1f}",
                f"{100 * row.influenced:.0f} %",
                f"{100 * row.dense:.2f} %" + (f": {row.reasons}" if row.dense > 0.02 else ""),
                f"{row.megabytes:.2f}",
                f"{row.ratio:.1f}",
                same,
            ]
        )
    return head, lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all, print the table, and write JSON and a page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    parser.add_argument("--only", help="names, with commas between them")
    parser.add_argument("--merge", action="store_true", help="keep the rows of other networks that the JSON file holds")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/networks.json"))
    parser.add_argument("--markdown", type=Path, help="write the table as a page")
    options = parser.parse_args(arguments)
    here = machine()
    print_machine(here)
    earlier = json.loads(options.json.read_text(encoding="utf-8"))["rows"] if options.merge else []
    rows: list[Row] = []
    for name in options.only.split(",") if options.only else names():
        try:
            rows.append(measure(name))
        except Exception as error:  # one network that fails must not hide the others
            rows.append(Row(name=name, task="", parameters=0, problem=f"{type(error).__name__}: {str(error)[:120]}"))
        print(rows[-1], flush=True)
        gc.collect()
    if earlier:
        new = {row.name: row for row in rows}
        rows = [new.pop(old["name"], Row(**old)) for old in earlier] + list(new.values())
    print_table("networks", *table(rows))
    failed = [row.name for row in rows if row.problem]
    slowest = max((row.seconds_to_find for row in rows if not row.problem), default=math.nan)
    print(f"networks that failed {len(failed)} {verdict(len(failed), 0)} {', '.join(failed)}")
    print(f"seconds to find the groups, at most {slowest:.1f} {verdict(slowest, LONGEST)}")
    write_json(options.json, {"machine": here, "seed": SEED, "rows": [asdict(row) for row in rows]})
    if options.markdown:
        options.markdown.write_text(page(rows), encoding="utf-8")


def page(rows: Sequence[Row]) -> str:
    """The table as a page of the documentation."""
    head, lines = table(rows)
    here = machine()
    about = ", ".join(f"{key} {value}" for key, value in here.items() if isinstance(value, str | int | float))
    text = [
        "# Networks that were tried", "",
        "Written by `python -m benchmarks.networks --markdown docs/networks.md`; random weights of seed "
        f"{SEED}, default settings. {about}.", "",
        "- *groups*: groups of channels that may be exchanged, found by following channels and tried in float64;",
        "- *seconds*: to find them + to try them;",
        "- *a permutation reaches*: share of the quantized weights whose blocks change with the order of channels;",
        "- *left dense*: share of all weights that is not quantized, with reasons above 2 %;",
        "- *after loading*: difference of the outputs after saving and loading.", "",
        f"| {' | '.join(head)} |", f"|{'---|' * len(head)}",
        *(f"| {' | '.join(line)} |" for line in lines), "",
    ]  # fmt: skip
    return "\n".join(text)


if __name__ == "__main__":
    main()
