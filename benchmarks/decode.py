"""What the three ways to decode weights in evaluation take: `model.decode` kept, each_forward and compiled.

    python -m benchmarks.decode [--networks resnet50 maskrcnn] [--ways kept each_forward compiled]

Memory: each way in a fresh process that loads a packed file and runs `--passes` passes on one image. `held` is what
stays resident after them beyond the imports, `peak` the most at any time, loading and the images' own maps included; on
CUDA both are what is allocated there. With `compiled` the compiler is in the process too, which the first pass brings.
Time: kept and each other way in turn in one process (A B A B ...); a ratio is the median of the ratios of the pairs. On
the CPU seconds are those that this process computes, on one thread, which other work on the machine disturbs less.

Networks are random, with random codes into codebooks drawn from their own subvectors: neither memory nor time depends
on their values. Mask R-CNN counts boxes from score 0, so that it draws 100 masks per image.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.architectures.detectors import set_image_size
from src.compression.quantize.dequantize import dense_again
from src.model_files.decoding import set_decode
from src.model_files.metadata import ModelInfo
from src.model_files.open_model_file import open_model_file
from src.model_files.packed import save_packed
from src.model_files.size import model_size

from .cost import quantized_model
from .maskrcnn_cost import CLASSES, networks
from .report import Pair, machine, pick_device, print_machine, print_table, time_pairs, write_json

WAYS = ("kept", "each_forward", "compiled")
DENSE = "dense"


def write_network(name: str, size: int, path: Path) -> dict[str, float]:
    """A packed file of a network with random codes; returns what it takes, in MB."""
    if name == "maskrcnn":
        model, n_classes = networks(size)[1], CLASSES
    else:
        model, n_classes = quantized_model(name), 1000
    save_packed(model, path, ModelInfo(arch=name, num_classes=n_classes))
    found = model_size(model)
    return {"compressed_mb": found.megabytes, "dense_mb": found.original / 8 / 2**20}


def network(path: Path, way: str, size: int, device: torch.device) -> nn.Module:
    """The network of a file, decoded as `way` says; or dense."""
    model = open_model_file(path).model
    if hasattr(model, "roi_heads"):
        set_image_size(model, size, 2 * size)
        model.roi_heads.score_thresh = 0.0
    model = dense_again(model) if way == DENSE else set_decode(model, way)  # type: ignore[arg-type]
    return model.to(device).eval()


def one_pass(model: nn.Module, size: int, device: torch.device) -> Callable[[], None]:
    """Evaluation of one random image."""
    image = torch.rand(3, size, size, generator=torch.Generator().manual_seed(2)).to(device)
    images = [image] if hasattr(model, "roi_heads") else image[None]

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    return forward


def memory(path: Path, way: str, size: int, passes: int, device: str) -> dict[str, int]:
    """Bytes that are held after some passes, and at their peak; for a fresh process."""
    where = torch.device(device)
    torch.set_num_threads(1)
    imports = _resident("VmRSS")
    forward = one_pass(network(path, way, size, where), size, where)
    _give_back()
    loaded = _resident("VmRSS") - imports
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    for _ in range(passes):
        forward()
    peak = _resident("VmHWM") - imports
    _give_back()
    if where.type == "cuda":
        held = torch.cuda.memory_allocated(where)
        torch.cuda.reset_peak_memory_stats(where)
        forward()
        return {"held": held, "peak": torch.cuda.max_memory_allocated(where)}
    return {"loaded": loaded, "held": _resident("VmRSS") - imports, "peak": peak}


def _give_back() -> None:
    """Let the allocator return to the system what nobody uses."""
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    """A figure of the kernel's own about this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def pairs(a: Callable[[], None], b: Callable[[], None], repeats: int, device: torch.device) -> Pair:
    """As `time_pairs`; on the CPU in seconds of computing."""
    if device.type != "cpu":
        return time_pairs(a, b, repeats, device)
    times = []
    for number in range(repeats + 2):
        found = []
        for work in (a, b):
            start = time.process_time()
            work()
            found.append(time.process_time() - start)
        if number >= 2:  # what is compiled and loaded once does not count
            times.append(found)
    ratios = [second / first for first, second in times]
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    return Pair(first, second, statistics.median(ratios), min(ratios), max(ratios))


def measure(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Memory and time of every way for one network."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        found: dict[str, Any] = {"size": write_network(name, options.size, path), "memory": {}, "time": {}}
        for way in (DENSE, *options.ways):
            with context.Pool(1) as pool:
                given = (path, way, options.size, options.passes, str(device))
                found["memory"][way] = pool.apply(memory, given)
        kept = one_pass(network(path, "kept", options.size, device), options.size, device)
        for way in [way for way in options.ways if way != "kept"]:
            other = one_pass(network(path, way, options.size, device), options.size, device)
            found["time"][way] = asdict(pairs(kept, other, options.repeats, device))
    return found


def report(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Print a table for each network."""
    for name, result in results.items():
        rows = []
        for way, bytes_ in result["memory"].items():
            pair = result["time"].get(way)
            ratio = (
                "1"
                if way == "kept"
                else ""
                if pair is None
                else f"{pair['ratio']:.2f} ({pair['low']:.2f} to {pair['high']:.2f})"
            )
            rows.append([way, *(f"{bytes_[key] / 2**20:.0f}" for key in ("held", "peak")), ratio])
        size = ", ".join(f"{key} {value:.2f}" for key, value in result["size"].items())
        print_table(
            f"{name}: {size}; one image of {options.size}x{options.size}, {options.repeats} pairs",
            ["", "held MB", "peak MB", "time of kept's"],
            rows,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["resnet50", "maskrcnn"], help="networks")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="ways to decode")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image")
    parser.add_argument("--passes", type=int, default=3, help="passes of which memory is measured")
    parser.add_argument("--repeats", type=int, default=15, help="pairs that are timed")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/decode.json"), help="where the results are written"
    )
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    found = machine(device)
    print_machine(found)
    results = {name: measure(name, options, device) for name in options.networks}
    report(results, options)
    settings = {"size": options.size, "passes": options.passes, "pairs": options.repeats}
    write_json(options.json, {"machine": found, "settings": settings, "results": results})


if __name__ == "__main__":
    main()
