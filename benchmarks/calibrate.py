"""What calibrating keeps: a ResNet-18 for CIFAR-10, 50 times smaller, without training and without labels.

Claims, on one core: quantized plainly the network is lost, with its batch norms retaken it keeps about three quarters
of its answers; calibrated with 1,024 photos it is at most 1.6 points below the dense network, with at least 93 % of its
answers, after at most 150 seconds.

    python -m benchmarks.calibrate --weights dense.pth --photos cifar10 [--small-blocks] [--count 1024]

`--photos` has train/ and val/ with one folder per class. No channels are permuted.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from src import architectures
from src.common.randomness import stream
from src.compression.quantize.calibrate.calibrate import calibrate
from src.compression.quantize.compress import compress
from src.compression.quantize.plan import LayerSpec, Plan, QuantizationSpec, make_plan
from src.compression.quantize.subvector_size import BlockRule
from src.model_files.norm_estimation import retake_norms
from src.model_files.pth import read_tensors
from src.model_files.size import model_size
from src.tasks.calibration import MEAN, STD

from .report import machine, print_machine, print_table, write_json

SIDE = 64
BATCH = 64


def photos(folder: Path, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Photos (N, 3, 64, 64), as the network is shown them, and the numbers of their classes; up to `most`, drawn."""
    files = [(path, label) for label, one in enumerate(sorted(folder.iterdir())) for path in sorted(one.iterdir())]
    if most is not None:
        drawn = torch.randperm(len(files), generator=stream(0, "calibration"))[:most]
        files = [files[number] for number in sorted(drawn.tolist())]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    shown = []
    for path, _ in files:
        image = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3)
        shown.append((pixels.permute(2, 0, 1).float() / 255 - mean) / std)
    return torch.stack(shown), torch.tensor([label for _, label in files])


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    """The classes that a network names."""
    return torch.cat([model(part).argmax(1) for part in images.split(BATCH)])


def ways(model: nn.Module, plan: Plan, images: Tensor) -> dict[str, Callable[[], nn.Module]]:
    """Name -> makes the quantized network."""
    batches = images.split(BATCH)

    def plain() -> nn.Module:
        return compress(copy.deepcopy(model), plan, show_progress=False)[0].eval()

    def retaken() -> nn.Module:
        quantized = plain()
        retake_norms(quantized, batches)
        return quantized

    def calibrated() -> nn.Module:
        found = calibrate(model, plan, batches)
        for step, share in found.lost_after().items():
            print(f"  {step}: {100 * share:.2f} % of the energy of outputs lost")
        quantized = compress(copy.deepcopy(model), plan, show_progress=False, finished=found)[0].eval()
        found.put_norms(quantized)
        return quantized

    return {"plain": plain, "plain, norms retaken": retaken, "calibrated": calibrated}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print top-1, share of the dense network's answers and seconds of each way."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibrate", description=__doc__)
    parser.add_argument("--weights", type=Path, help="state dict of the dense network; none: random weights")
    parser.add_argument("--photos", type=Path, help="folder with train/ and val/; none: noise")
    parser.add_argument("--small-blocks", action="store_true")
    parser.add_argument("--count", type=int, default=1024, help="photos that calibrate")
    parser.add_argument("--iterations", type=int, default=100, help="of the clustering")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/calibrate.json"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = architectures.get("resnet18", "classification").build(10).eval()
    if options.weights is not None:
        model.load_state_dict(read_tensors(options.weights))
    if options.photos is None:
        noise = torch.randn(options.count + 64, 3, SIDE, SIDE, generator=stream(0, "noise"))
        shown, (scored, labels) = noise[: options.count], (noise[options.count :], torch.zeros(64, dtype=torch.int64))
    else:
        shown = photos(options.photos / "train", options.count)[0]
        scored, labels = photos(options.photos / "val")
    spec = QuantizationSpec(k_means_n_iters=options.iterations, ignored_modules=("conv1",))
    rule = BlockRule(large_subvectors=not options.small_blocks)
    plan = make_plan(model, replace(spec, rule=rule, layer_specs={"fc": LayerSpec(k=2048)}))
    dense = answers(model, scored)
    rows: list[dict[str, Any]] = []
    rows.append({"way": "dense", "top-1": 100 * float((dense == labels).float().mean()), "same answer": 100.0})
    for name, make in ways(model, plan, shown).items():
        wall, cpu = time.perf_counter(), time.process_time()
        quantized = make()
        seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
        given = answers(quantized, scored)
        rows.append(
            {
                "way": name,
                "top-1": 100 * float((given == labels).float().mean()),
                "same answer": 100 * float((given == dense).float().mean()),
                "seconds": seconds,
                "CPU seconds": cpu,
                "ratio": model_size(quantized).ratio,
            }
        )
        print(rows[-1], flush=True)
    found = machine()
    print_machine(found)
    head = list(rows[-1])
    print_table(f"{options.count:,} photos", head, [[_text(row.get(key)) for key in head] for row in rows])
    write_json(
        options.json, {"machine": found, "count": options.count, "large": not options.small_blocks, "rows": rows}
    )


def _text(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value or "")


if __name__ == "__main__":
    main()
