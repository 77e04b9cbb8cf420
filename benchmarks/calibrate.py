"""What calibrating keeps, and what choosing settings for a size keeps: two networks, without training and without
labels.

Claims, on one core. ResNet-18 for CIFAR-10, 1,024 photos calibrate, 2,000 others are scored: with large blocks (50 times
smaller) at most 1.6 points below the dense network with at least 93 % of its answers, after at most 150 CPU seconds;
with settings chosen for the same bits at most 1.0 points and 95 %; with small blocks at most 1.0 points.
EfficientNet-Lite0 with its ImageNet weights, 500 photos calibrate, 500 others are scored: at least 77 % top-1 and 80 %
of the dense network's answers with 1,170,000 bytes for the 33 weights, more than 74.6 % with 1,090,000.

    python -m benchmarks.calibrate resnet18 --weights dense.pth --photos cifar10 [--settings 0 1]
    python -m benchmarks.calibrate lite0 --photos imagenet_samples/val [--bytes 1_090_000]

`--photos` of CIFAR-10 has train/ and val/ with one folder per class; of ImageNet, one folder per class.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from src.compression.permute.auto import groups_by_following
from src.compression.permute.permute import SearchSpec, permute
from src.compression.quantize.budget.sensitivity import losses_by_inputs, some_inputs
from src.compression.quantize.budget.tradeoff import Tradeoff
from src.compression.quantize.budget.wanted import Budget
from src.compression.quantize.calibrate.calibrate import calibrate
from src.compression.quantize.compress import candidate_distortion, compress
from src.compression.quantize.plan import LayerPlan, Plan, QuantizationSpec, make_plan
from src.compression.quantize.subvectors import bits_of
from src.compression.quantize.weights import matrices
from src.model_files.norm_estimation import retake_norms
from src.model_files.size import model_size
from src.run.compression_specs import tradeoff_of

from .photos import Subject, answers, lite0_imagenet, resnet18_cifar10, scores
from .report import machine, print_machine, print_table, write_json

WAYS = ("quantized", "norms retaken", "calibrated", "budget, norms retaken", "budget, calibrated")
"""`budget`: block length and centroids of every weight are chosen for the bits that the settings take."""
SHOWN = ("way", "bytes", "ratio", "top-1", "same answer", "KL", "CPU seconds", "in all")


@dataclass
class Clock:
    """CPU seconds of parts of the work, by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what is done inside."""
        started = time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started


def quantized_bits(dense: nn.Module, bits: int, plan: Plan) -> int:
    """Bits of codes and codebooks of the planned weights, of a network of so many bits."""
    return bits - _other_bits(dense, plan)


def _other_bits(dense: nn.Module, plan: Plan) -> int:
    return model_size(dense).bits - sum(32 * weight.numel() for weight, _ in _weights_and_layers(dense, plan))


def _weights_and_layers(dense: nn.Module, plan: Plan) -> list[tuple[Tensor, LayerPlan]]:
    """None of these networks has tied weights."""
    return [(place.parameter, plan.layers[place.name]) for place in matrices(dense) if place.name in plan.layers]


class Chooser:
    """Chooses settings of each weight for a number of bits of all of them, by what photos show of their changes; what
    these show is measured once."""

    def __init__(self, subject: Subject, spec: QuantizationSpec) -> None:
        self._model, self._spec, self._photos = subject.model, spec, subject.calibration
        self._tradeoff: Tradeoff | None = None
        self.seconds = 0.0
        """CPU seconds that measuring took."""

    def plan(self, bits: int | None) -> Plan:
        """The plan for so many bits; None: as many as the settings take."""
        plan = make_plan(self._model, self._spec)
        if bits is None:
            bits = sum(
                bits_of(weight.numel() // layer.d, layer.d, layer.k, 1.0)
                for weight, layer in _weights_and_layers(self._model, plan)
            )
        if self._tradeoff is None:
            started = time.process_time()
            tradeoff = tradeoff_of(self._model, self._spec, 0, show_progress=False)
            losses = losses_by_inputs(self._model, tradeoff, some_inputs(self._photos), show_progress=False)
            self._tradeoff = tradeoff.with_losses(losses)
            self.seconds = time.process_time() - started
        return self._tradeoff.plan_for(Budget(size=(_other_bits(self._model, plan) + bits) // 8)).plan


def run(
    subject: Subject, spec: QuantizationSpec, way: str, size: int | None, search: str | None, chooser: Chooser
) -> dict[str, Any]:
    """One network, compressed in one way, and scored.

    Args:
        subject: network and photos.
        spec: the settings.
        way: one of `WAYS`.
        size: bits of the quantized weights that a budget is for; None: as many as the settings take.
        search: for permutations; None: nothing is permuted.
        chooser: for these settings.
    """
    clock, model = Clock(), copy.deepcopy(subject.model)
    plan = make_plan(model, spec)
    if way.startswith("budget"):
        plan = chooser.plan(size)
        clock.seconds["choose"] = chooser.seconds
    if search is not None:
        with clock.part("permute"):
            _permuted(model, plan, search, subject.calibration[0][:2])
    if way.endswith("calibrated"):
        with clock.part("calibrate"):
            found = calibrate(model, plan, subject.calibration)
            model = compress(model, plan, show_progress=False, finished=found)[0].eval()
            found.put_norms(model)
        for step, share in found.lost_after().items():
            print(f"  {step}: {100 * share:.2f} % of the energy of outputs lost")
    else:
        with clock.part("quantize"):
            model = compress(model, plan, show_progress=False)[0].eval()
        if way.endswith("retaken"):
            with clock.part("norms"):
                retake_norms(model, subject.calibration)
    counted = model_size(model)
    return {
        "way": way,
        "bytes": quantized_bits(subject.model, counted.bits, plan) // 8,
        "ratio": counted.ratio,
        **scores(answers(model, subject), answers(subject.model, subject), subject.labels),
        "CPU seconds": sum(clock.seconds.get(name, 0.0) for name in ("calibrate", "quantize", "norms")),
        "in all": sum(clock.seconds.values()),
        "parts": clock.seconds,
    }


def _permuted(model: nn.Module, plan: Plan, search: str, example: Tensor) -> None:
    groups, _ = groups_by_following(model, lambda net: net(example), 0)
    spec = SearchSpec(search, 10_000)
    permute(model, groups, plan.sizes, spec, measure=candidate_distortion(plan, 0), show_progress=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print and write what each way keeps of a network."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", nargs="?", choices=("resnet18", "lite0"), default="resnet18")
    parser.add_argument("--weights", type=Path, help="state dict of the dense ResNet-18; none: random weights")
    parser.add_argument("--photos", type=Path, help="folder of photos; none: noise")
    parser.add_argument("--count", type=int, help="photos that calibrate; none: 1,024 and 500")
    parser.add_argument("--settings", type=int, nargs="*", default=[0], help="which settings, by number")
    parser.add_argument("--bytes", type=int, nargs="*", default=[], help="of quantized weights, for budgets")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--search", choices=("best", "published"), help="permute channels first")
    parser.add_argument("--iterations", type=int, default=100, help="of the clustering")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/calibrate.json"))
    options = parser.parse_args(arguments)
    subject = (
        resnet18_cifar10(options.weights, options.photos, options.count or 1024, options.iterations)
        if options.network == "resnet18"
        else lite0_imagenet(options.photos, options.count or 500, options.iterations)
    )
    found = machine()
    print_machine(found)
    dense = answers(subject.model, subject)
    rows: list[dict[str, Any]] = [{"settings": "", "way": "dense", **scores(dense, dense, subject.labels)}]
    print(rows[0], flush=True)
    named = list(subject.settings.items())
    asked = [(*named[number], way, None) for number in options.settings for way in options.ways]
    budgets = [way for way in options.ways if way.startswith("budget")]
    asked += [(f"{size:,} bytes", named[0][1], way, 8 * size) for size in options.bytes for way in budgets]
    choosers = {name: Chooser(subject, spec) for name, spec in named}
    for name, spec, way, size in asked:
        chooser = choosers.get(name, choosers[named[0][0]])
        rows.append({"settings": name, **run(subject, spec, way, size, options.search, chooser)})
        print(rows[-1], flush=True)
    head = ["settings", *SHOWN]
    n = sum(len(batch) for batch in subject.calibration)
    title = f"{subject.name}, {n:,} photos calibrate, {'permuted' if options.search else 'not permuted'}"
    print_table(title, head, [[_text(row.get(key)) for key in head] for row in rows])
    _write(options.json, title, {"machine": found, "count": n, "search": options.search, "rows": rows})


def _write(path: Path, title: str, result: dict[str, Any]) -> None:
    """Beside what the file holds of other networks, and of other rows of this one."""
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    new = {(row["settings"], row["way"]) for row in result["rows"]}
    earlier = [row for row in known.get(title, {}).get("rows", []) if (row["settings"], row["way"]) not in new]
    write_json(path, {**known, title: {**result, "rows": [*earlier, *result["rows"]]}})


def _text(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value or "")


if __name__ == "__main__":
    main()
