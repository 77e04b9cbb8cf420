"""What a quantized Mask R-CNN costs beside the dense one (how long it takes to compress: `benchmarks.compress`).

Claims: (a) evaluation takes at most 1.03 times as long; (b) a training step (forward, losses, backward, Adam) at most
1.15 times.

    python -m benchmarks.maskrcnn_cost [--size 320] [--repeats 7]

Dense and quantized run in turn in one process (A B A B ...); a ratio is the median of the ratios of the pairs. The
dense network has the dequantized weights of the quantized one, so that both propose and detect the same boxes: the work
after the backbone depends on their number. Weights and images are random; the norms' statistics are those of the
network's own activations, and boxes count from score 0, so that evaluation draws 100 masks per image. In training the
norms are frozen, as with the published weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src import architectures
from src.architectures.detectors import set_image_size
from src.compression.finetune.optimizers import OptimizerSpec, make_optimizer
from src.compression.quantize.compress import build_quantized
from src.compression.quantize.layers import QuantizedLayer
from src.compression.quantize.plan import Plan, make_plan
from src.recipes import quantization_spec
from src.settings import load

from .cost import set_random_codes
from .report import machine, pick_device, print_machine, print_table, time_pairs, verdict, write_comparison

CLASSES = 91
LIMITS = {"evaluation": 1.03, "train": 1.15}
OBJECTS = 8
"""Objects per training image; COCO has 7 on average."""


def networks(size: int) -> tuple[nn.Module, nn.Module]:
    """A dense and a quantized network that compute the same."""
    architecture = architectures.get("maskrcnn", "detection")
    torch.manual_seed(0)
    quantized, learned = architecture.build(CLASSES), architecture.build(CLASSES)
    quantized = set_random_codes(quantized, published_plan(quantized))
    codes = {name: layer for name, layer in quantized.named_modules() if isinstance(layer, QuantizedLayer)}
    modules = dict(learned.named_modules())
    with torch.no_grad():
        for name, layer in codes.items():
            layer.codebook.copy_(layer.codebook.half())  # evaluation computes with what a file holds
            modules[name].weight.copy_(layer.dequantize())
        for module in learned.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # plain averages: the statistics of the pass that follows
        learned.train().backbone(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3)))
    state = {name: value for name, value in learned.state_dict().items() if not name.endswith("num_batches_tracked")}
    dense, quantized = architecture.build_for(state), architecture.build_for(state)
    dense.load_state_dict(state)
    quantized.load_state_dict(state)
    quantized = build_quantized(quantized, published_plan(quantized))
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantizedLayer):
            layer.set_codes(codes[name].codebook.detach(), codes[name].codes_matrix)
    for network in (dense, quantized):
        set_image_size(network, size, 2 * size)
        network.roi_heads.score_thresh = 0.0
    return dense, quantized


def published_plan(model: nn.Module) -> Plan:
    """The settings of config/train_maskrcnn.yaml."""
    return make_plan(model, quantization_spec(load("../config/train_maskrcnn.yaml")))


def batch(n_images: int, size: int, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Random images with random boxes and filled masks."""
    generator = torch.Generator().manual_seed(2)
    images = [torch.rand(3, size, size, generator=generator).to(device) for _ in range(n_images)]
    targets = []
    for _ in images:
        corner = torch.rand(OBJECTS, 2, generator=generator) * size / 2
        boxes = torch.cat([corner, corner + size / 8 + torch.rand(OBJECTS, 2, generator=generator) * size / 3], dim=1)
        masks = torch.zeros(OBJECTS, size, size, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.to(torch.int64).tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        labels = torch.randint(1, CLASSES, (OBJECTS,), generator=generator)
        targets.append({"boxes": boxes.to(device), "labels": labels.to(device), "masks": masks.to(device)})
    return images, targets


def training_step(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Callable[[], None]:
    """One step; the learning rate is so small that both networks go on computing the same."""
    model.train()
    optimizer = make_optimizer(model, OptimizerSpec(learning_rate=1e-12))

    def step() -> None:
        torch.manual_seed(0)  # the same boxes to learn from
        optimizer.zero_grad(set_to_none=True)
        sum(model(images, targets).values()).backward()
        optimizer.step()

    return step


def evaluation_pass(model: nn.Module, images: list[Tensor]) -> Callable[[], None]:
    """What evaluation does with a batch."""
    model.eval()

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    return forward


def measure_cost(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """(a) and (b): A is dense, B is quantized."""
    dense, quantized = (network.to(device) for network in networks(options.size))
    images, targets = batch(options.batch, options.size, device)
    warm_up = min(2, options.repeats)
    with torch.inference_mode():
        found = [len(output["boxes"]) for output in dense.eval()(images)]
        same = [len(output["boxes"]) for output in quantized.eval()(images)]
    forward = time_pairs(
        evaluation_pass(dense, images), evaluation_pass(quantized, images), options.repeats, device, warm_up
    )
    train = time_pairs(
        training_step(dense, images, targets),
        training_step(quantized, images, targets),
        options.repeats,
        device,
        warm_up,
    )
    return {"evaluation": asdict(forward), "train": asdict(train), "detections": found, "detections_coded": same}


def report(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the table."""
    rows = []
    for part, title in (("evaluation", "(a) evaluation"), ("train", "(b) training step with Adam")):
        pair = results[part]
        rows.append([title, f"{pair['a']:.2f}", f"{pair['b']:.2f}", f"{pair['ratio']:.3f}", f"{pair['low']:.2f} to {pair['high']:.2f}",
                     verdict(pair["ratio"], LIMITS[part])])  # fmt: skip
    print_table(
        f"Mask R-CNN, batch {options.batch}, {options.size}x{options.size}, {options.repeats} pairs, detections "
        f"{results['detections']}",
        ["", "dense s", "quantized s", "quantized/dense", "pairs", "claim"],
        rows,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.maskrcnn_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--size", type=int, default=320, help="height and width of an image")
    parser.add_argument("--repeats", type=int, default=7, help="pairs that are timed")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/maskrcnn_cost.json"), help="where the results are written"
    )
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    found = machine(device)
    print_machine(found)
    results = measure_cost(options, device)
    report(results, options)
    write_comparison(options, found, LIMITS, results)


if __name__ == "__main__":
    main()
