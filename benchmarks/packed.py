"""Packed files: how large they are beside what is reported and beside `.pth`, and how long they take to read on one
core.

Claims: at most reported bits / 8 + 1 % + 8 KB on disk for every network of the paper's table; a packed ResNet-50 is a
ready model in under 1 s on one core.

    python -m benchmarks.packed [--repeats 9] [--published resnet18.pth]

The networks have random codes, which no entropy coding makes smaller, and norms as after training; `--published` adds the authors' file, where it
does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src import architectures
from src.compression.quantize.compress import build_quantized
from src.compression.quantize.layers import QuantizedLayer
from src.compression.quantize.plan import make_plan
from src.model_files.open_model_file import open_model_file
from src.model_files.packed import AppliedPermutation, ModelInfo, save_packed
from src.model_files.pth import save_compressed
from src.model_files.size import model_size
from src.recipes import quantization_spec
from src.run.model_writer import compression_settings
from src.settings import load

from .report import machine, print_machine, print_table, seconds, verdict, write_json

KEY = "--model.compression_parameters"
NETWORKS: dict[str, tuple[str, list[str]]] = {
    "ResNet-18 small": ("resnet18", []),
    "ResNet-18 large": ("resnet18", [f"{KEY}.large_subvectors", "True"]),
    "ResNet-50 small": ("resnet50", []),
    "ResNet-50 large": ("resnet50", [f"{KEY}.large_subvectors", "True", f"{KEY}.pw_subvector_size", "8"]),
}
LONGEST = 1.0
"""Seconds from a packed ResNet-50 to a ready model that are claimed."""


def random_network(arch: str, flags: list[str]) -> tuple[nn.Module, ModelInfo]:
    """A quantized network with random codes, and all that a run can say about it: a permutation of every group,
    settings, a metric."""
    settings = load(f"../config/train_{arch}.yaml", flags)
    architecture = architectures.get(arch, "classification")
    draw = torch.Generator().manual_seed(0)
    dense = architecture.build(architecture.n_classes)
    applied = []
    for group in architecture.groups(dense):
        weight = dense.get_submodule(group.children[0]).weight
        assert isinstance(weight, torch.Tensor)
        applied.append(
            AppliedPermutation(group.parents, group.children, torch.randperm(weight.shape[1], generator=draw), {})
        )
    model = build_quantized(dense, make_plan(dense, quantization_spec(settings)))
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            codes = torch.randint(module.k, (module.codes_matrix.numel(),), generator=draw)
            module.set_codes(torch.randn(module.codebook.shape, generator=draw), codes)
        elif isinstance(module, torch.nn.BatchNorm2d):
            _as_after_training(module, draw)
    info = ModelInfo(
        arch, architecture.n_classes, compression_settings(settings), {"accuracy": 75.04}, tuple(applied), "pqf"
    )
    return model.eval(), info


def _as_after_training(norm: torch.nn.BatchNorm2d, draw: torch.Generator) -> None:
    """Values as various as those of the published ResNet-18's norms, which are harder to code than constants."""
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert tensor is not None
            tensor.normal_(generator=draw)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.weight.mul_(0.15).exp_().mul_(0.7)
        norm.bias.mul_(0.3)
        norm.running_var.exp_()
        norm.running_mean.mul_(norm.running_var.sqrt())


def measure(name: str, model: nn.Module, info: ModelInfo, repeats: int, folder: Path) -> dict[str, Any]:
    """Sizes and reading times of one network's files."""
    pth, packed, entropy = folder / "m.pth", folder / "m.safetensors", folder / "e.safetensors"
    save_compressed(model, pth)
    save_packed(model, packed, info)
    save_packed(model, entropy, info, entropy_coding=True)
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {path.name: [] for path in (pth, packed, entropy)}
    for path in (pth, packed, entropy) * (repeats + 1):
        times[path.name].append(seconds(lambda path=path: open_model_file(path)))
    reported = model_size(model).bits / 8
    return {
        "network": name,
        "reported_bytes": reported,
        "pth_bytes": pth.stat().st_size,
        "packed_bytes": packed.stat().st_size,
        "entropy_bytes": entropy.stat().st_size,
        "limit_bytes": reported * 1.01 + 8192,
        "read_pth_s": statistics.median(times[pth.name][1:]),
        "read_packed_s": statistics.median(times[packed.name][1:]),
        "read_entropy_s": statistics.median(times[entropy.name][1:]),
        "first_read_packed_s": times[packed.name][0],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every network, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.packed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9, help="times each file is read; the median counts")
    parser.add_argument("--published", type=Path, help="a published file to measure too")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), help="networks")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/packed.json"), help="where the results are written"
    )
    options = parser.parse_args(argv)
    found = machine()
    print_machine(found)
    with tempfile.TemporaryDirectory() as folder:
        results = [
            measure(name, *random_network(*NETWORKS[name]), options.repeats, Path(folder)) for name in options.networks
        ]
        if options.published is not None:
            stored = open_model_file(options.published)
            results.append(
                measure(f"published {options.published.name}", stored.model, stored.info, options.repeats, Path(folder))
            )
    print_table(
        "bytes on disk",
        ["network", "reported", ".pth", "packed", "of reported", "with entropy coding", "packed, claimed"],
        [
            [r["network"], f"{r['reported_bytes']:,.0f}", f"{r['pth_bytes']:,}", f"{r['packed_bytes']:,}", f"{r['packed_bytes'] / r['reported_bytes']:.4f}",
             f"{r['entropy_bytes']:,}", verdict(r["packed_bytes"], r["limit_bytes"])]
            for r in results
        ],
    )  # fmt: skip
    print_table(
        "seconds from file to a ready model, one thread",
        ["network", ".pth", "packed", "entropy coded", "packed, claimed"],
        [
            [r["network"], f"{r['read_pth_s']:.3f}", f"{r['read_packed_s']:.3f}", f"{r['read_entropy_s']:.3f}", verdict(r["read_packed_s"], LONGEST)]
            for r in results
        ],
    )  # fmt: skip
    write_json(options.json, {"machine": found, "results": results})


if __name__ == "__main__":
    main()
