"""What a quantized network costs beside the dense one.

Claims: (a) a forward pass for evaluation takes at most 1.03 times as long; (b) a training step (forward, cross entropy,
backward, Adam) at most 1.05 times; (c) a model is built from its file in less than a second, without clustering; (d) a
training step needs at most 1.3 times the memory at its peak. Measured besides: (e) decoding a weight and the gradient
of its codebook, against index_select with autograd on 64-bit codes.

    python -m benchmarks.cost

Dense and quantized run in turn in one process (A B A B ...); a ratio is the median of the ratios of the pairs. Codes
are random: the cost does not depend on their values. Memory is measured in a fresh process for each variant: on CUDA
the most memory allocated during a step, on the CPU the growth of the largest resident set beyond the imports.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src import architectures
from src.compression.quantize.compress import build_quantized
from src.compression.quantize.kmeans import cluster
from src.compression.quantize.layers import QuantizedLayer
from src.compression.quantize.plan import LayerPlan, LayerSpec, Plan, QuantizationSpec, make_plan
from src.compression.quantize.subvectors import to_subvectors
from src.model_files.pth import save_compressed
from src.recipes import load_compressed

from .report import (
    Pair,
    largest_resident_set,
    machine,
    pick_device,
    print_machine,
    print_table,
    seconds,
    synchronize,
    time_pairs,
    verdict,
    write_comparison,
)

FC_CENTROIDS = {"resnet18": 2048, "resnet50": 1024}
"""k of the last layer in the published models; 256 elsewhere."""

LIMITS = {"forward": 1.03, "train": 1.05, "load": 1.0, "memory": 1.3}
MEMORY_STEPS = 3
PLAIN_LAYER = "layer4.1.conv2"


def published_spec(arch: str) -> QuantizationSpec:
    """Small blocks, as in the published models."""
    return QuantizationSpec(ignored_modules=("conv1",), layer_specs={"fc": LayerSpec(k=FC_CENTROIDS.get(arch, 256))})


def dense_model(arch: str) -> nn.Module:
    """Freshly initialised, always the same."""
    torch.manual_seed(0)
    return architectures.get(arch, "classification").build(1000)


def quantized_model(arch: str) -> nn.Module:
    """The same network with random codes into codebooks drawn from its own subvectors."""
    model = dense_model(arch)
    return set_random_codes(model, make_plan(model, published_spec(arch)))


def set_random_codes(model: nn.Module, plan: Plan) -> nn.Module:
    """`model` with its planned layers quantized: random codes into codebooks drawn from the layer's own subvectors."""
    modules = dict(model.named_modules())
    vectors = {name: to_subvectors(modules[name].weight.detach(), layer.d) for name, layer in plan.layers.items()}
    model = build_quantized(model, plan)
    generator = torch.Generator().manual_seed(1)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            n = vectors[name].shape[0]
            drawn = torch.randperm(n, generator=generator)[: layer.k]
            layer.set_codes(vectors[name][drawn], torch.randint(layer.k, (n,), generator=generator))
    return model


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of training: forward, cross entropy, backward, Adam."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def evaluation_pass(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """One forward pass as in evaluation."""
    model.eval()

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    return forward


def batch(size: int, pixels: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Random images (B, 3, S, S) and labels (B,)."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(size, 3, pixels, pixels, generator=generator)
    return images.to(device), torch.randint(1000, (size,), generator=generator).to(device)


def measure_speed(arch: str, options: argparse.Namespace, device: torch.device) -> dict[str, Pair]:
    """(a) and (b): A is dense, B is quantized."""
    dense, quantized = dense_model(arch).to(device), quantized_model(arch).to(device)
    images, labels = batch(options.batch, options.size, device)
    warm_up = min(2, options.repeats)
    forward = time_pairs(
        evaluation_pass(dense, images), evaluation_pass(quantized, images), options.repeats, device, warm_up
    )
    train = time_pairs(
        training_step(dense, images, labels), training_step(quantized, images, labels), options.repeats, device, warm_up
    )
    return {"forward": forward, "train": train}


def measure_loading(arch: str, options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """(c): seconds from the path of a file to a model ready for evaluation, and what clustering for the shapes would
    take."""
    spec, architecture = published_spec(arch), architectures.get(arch, "classification")
    load_compressed(path, architecture, spec)
    times = [seconds(lambda: load_compressed(path, architecture, spec)) for _ in range(options.repeats)]
    model = dense_model(arch)
    modules, plan = dict(model.named_modules()), make_plan(model, spec)

    def work(layer: LayerPlan) -> int:
        return modules[layer.name].weight.numel() // layer.d * layer.k

    layer = plan.layers[PLAIN_LAYER]
    vectors = to_subvectors(modules[PLAIN_LAYER].weight.detach(), layer.d)
    one = seconds(
        lambda: cluster("kmeans", vectors, layer.k, options.plain_iterations, torch.Generator().manual_seed(0))
    )
    return {
        "median_s": statistics.median(times),
        "max_s": max(times),
        "plain_layer": PLAIN_LAYER,
        "plain_layer_s": one,
        "plain_iterations": options.plain_iterations,
        "plain_model_s_extrapolated": one * sum(map(work, plan.layers.values())) / work(layer),
    }


def measure_memory(arch: str, options: argparse.Namespace, path: Path, device: torch.device) -> dict[str, Any]:
    """(d): peak memory of a training step of each variant, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for variant, file in (("dense", None), ("quantized", path)):
        with context.Pool(1) as pool:
            peaks[variant] = pool.apply(_peak_of_step, (arch, file, options.batch, options.size, str(device)))
    return {
        "dense_bytes": peaks["dense"],
        "quantized_bytes": peaks["quantized"],
        "ratio": peaks["quantized"] / peaks["dense"],
    }


def _peak_of_step(arch: str, path: Path | None, size: int, pixels: int, device: str) -> int:
    """Bytes at the peak of a training step, weights and optimizer state included."""
    imports = largest_resident_set()
    # the quantized network comes from a file: made from a dense one, the dense weights would count
    model = (
        dense_model(arch)
        if path is None
        else load_compressed(path, architectures.get(arch, "classification"), published_spec(arch))
    )
    step = training_step(model.to(device), *batch(size, pixels, device))
    for _ in range(MEMORY_STEPS):  # the optimizer's state exists after the first
        synchronize(device)
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
        step()
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return largest_resident_set() - imports


def measure_decoding(arch: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """(e): decode and the codebook's gradient for the three largest layers; A is index_select with autograd, B is
    ours."""
    layers = [
        (name, module)
        for name, module in quantized_model(arch).to(device).train().named_modules()
        if isinstance(module, QuantizedLayer)
    ]
    layers.sort(key=lambda item: -item[1].codes_matrix.numel() * item[1].d)
    found = []
    for name, layer in layers[:3]:
        gradient = torch.randn(layer.weight_shape, device=device)
        plain_codes = layer.codes_matrix.reshape(-1).long()

        def plain(
            layer: QuantizedLayer = layer, codes: Tensor = plain_codes, gradient: Tensor = gradient
        ) -> Tensor | None:
            layer.codebook.grad = None
            layer.codebook.index_select(0, codes).view(layer.weight_shape).backward(gradient)
            return layer.codebook.grad

        def ours(layer: QuantizedLayer = layer, gradient: Tensor = gradient) -> Tensor | None:
            layer.codebook.grad = None
            layer.dequantize().backward(gradient)
            return layer.codebook.grad

        torch.testing.assert_close(ours(), plain(), rtol=1e-3, atol=1e-3)
        pair = time_pairs(plain, ours, options.repeats, device, min(2, options.repeats))
        found.append({"layer": name, "shape": list(layer.weight_shape), "d": layer.d, "k": layer.k, **asdict(pair)})
    return found


def report(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the five tables."""
    for part, title in (("forward", "(a) forward pass, evaluation"), ("train", "(b) training step with Adam")):
        rows = []
        for arch, result in results.items():
            pair = result[part]
            rows.append([arch, f"{1e3 * pair['a']:.1f}", f"{1e3 * pair['b']:.1f}", f"{pair['ratio']:.3f}",
                         f"{pair['low']:.2f} to {pair['high']:.2f}", verdict(pair["ratio"], LIMITS[part])])  # fmt: skip
        sizes = f"batch {options.batch}, {options.size}x{options.size}, {options.repeats} pairs"
        print_table(
            f"{title}: {sizes}", ["network", "dense ms", "quantized ms", "quantized/dense", "pairs", "claim"], rows
        )
    rows = []
    for arch, result in results.items():
        load = result["load"]
        rows.append([arch, f"{load['median_s']:.3f}", f"{load['max_s']:.3f}", verdict(load["median_s"], LIMITS["load"]),
                     f"{load['plain_layer_s']:.2f}", f"{load['plain_model_s_extrapolated']:.1f}"])  # fmt: skip
    print_table(
        "(c) building a model for evaluation from its file, seconds; the plain way clusters random weights to learn "
        "the shapes\n"
        f"    ({options.plain_iterations} iterations of our k-means, measured for {PLAIN_LAYER}, the whole network "
        "extrapolated by subvectors * k)",
        ["network", "median", "longest", "claim", f"plain {PLAIN_LAYER}", "plain network"],
        rows,
    )
    rows = []
    for arch, result in results.items():
        memory = result["memory"]
        rows.append([arch, *(f"{memory[key] / 2**20:.0f}" for key in ("dense_bytes", "quantized_bytes")), f"{memory['ratio']:.3f}",
                     verdict(memory["ratio"], LIMITS["memory"])])  # fmt: skip
    print_table(
        "(d) peak memory of a training step, MB", ["network", "dense", "quantized", "quantized/dense", "claim"], rows
    )
    rows = [
        [f"{arch} {row['layer']}", "x".join(map(str, row["shape"])), f"{row['d']}", f"{row['k']}", f"{1e3 * row['a']:.2f}",
         f"{1e3 * row['b']:.2f}", f"{row['ratio']:.3f}"]
        for arch, result in results.items() for row in result["decode"]
    ]  # fmt: skip
    print_table(
        "(e) decoding and its gradient", ["layer", "weight", "d", "k", "index_select ms", "ours ms", "ours/plain"], rows
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every network in `--archs`, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image")
    parser.add_argument("--archs", nargs="+", default=["resnet18", "resnet50"], help="networks")
    parser.add_argument("--repeats", type=int, default=15, help="pairs that are timed")
    parser.add_argument(
        "--plain-iterations", type=int, default=10, help="k-means iterations of the plain way to learn shapes"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/cost.json"), help="where the results are written"
    )
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    found = machine(device)
    print_machine(found)
    results: dict[str, dict[str, Any]] = {}
    for arch in options.archs:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{arch}.pth"
            save_compressed(quantized_model(arch), path)
            result: dict[str, Any] = {
                "memory": measure_memory(arch, options, path, device),
                "load": measure_loading(arch, options, path),
            }
        result.update({name: asdict(pair) for name, pair in measure_speed(arch, options, device).items()})
        result["decode"] = measure_decoding(arch, options, device)
        results[arch] = result
    report(results, options)
    write_comparison(options, found, LIMITS, results)


if __name__ == "__main__":
    main()
