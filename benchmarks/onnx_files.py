"""ONNX files of every network: is it written, for which sizes of images, how far is onnxruntime from PyTorch, and how
many bytes does it take.

Claims: at least 79 of torchvision's 80 classification networks are written and agree to 1e-4.

    python -m benchmarks.onnx_files [--networks torchvision:vgg11,timm:resnet10t] [--small] [--markdown PAGE]

Networks of which the JSON file has a row keep it unless they are named, so that the table can be made in parts. What is
measured is the writing: weights are random (of seed 0), and so are codes, drawn like the codebooks, values of the
spread of the weight, instead of by clustering. Images are small where the network takes such.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from src.architectures.architecture import Architecture
from src.architectures.named import find
from src.common.errors import UserError
from src.common.randomness import stream
from src.compression.quantize.compress import build_quantized, places_of
from src.compression.quantize.dequantize import dense_again
from src.compression.quantize.layers import QuantizedLayer
from src.compression.quantize.plan import QuantizationSpec, make_plan
from src.exports.onnx_file import OnnxOptions, write_onnx
from src.exports.onnx_outputs import Called
from src.model_files.size import model_size

from .report import machine, print_machine, print_table, verdict, write_json

SEED = 0
SIDES = (64, 96)
"""Of the images, the first that a network takes; else what it is made for."""
SMALL = 30_000_000
"""Parameters of the networks that `--small` takes."""
SETTLING = 160
"""Side of the images that norms are set by: as in use, most of what a kernel sees is not its padding."""
GAIN = 0.3
"""Of batch norms: what is added to a signal is smaller than it."""
NEEDED = 79
MARKS = ("<!-- onnx table -->", "<!-- end of onnx table -->")


@dataclass
class Row:
    """What became of one network."""

    name: str
    task: str = ""
    parameters: int = 0
    side: int = 0
    free: str = ""
    exporter: str = ""
    off: float | None = None
    largest: float = 0.0
    bytes: int = 0
    share: float = 0.0
    coded: int = 0
    unused: int = 0
    seconds: float = 0.0
    why_not_free: str = ""
    problem: str = ""


def classifiers() -> list[str]:
    """All classification networks of torchvision's."""
    from torchvision import models

    return [f"torchvision:{name}" for name in models.list_models(module=models)]


def quantized_at_random(model: nn.Module) -> nn.Module:
    """Quantize a network with default settings, in place: codebooks of random values, so that a layer's outputs are as
    large as its inputs, and random codes."""
    plan = make_plan(model, QuantizationSpec())
    fan_in = {name: place.parameter[0].numel() for name, place in places_of(model, plan).items()}
    build_quantized(model, plan)
    modules = dict(model.named_modules())
    for name, layer in plan.layers.items():
        quantized = modules.get(name, modules.get(f"{name}_quantized"))
        assert isinstance(quantized, QuantizedLayer)
        draw = stream(SEED, "codes", name)
        codebook = torch.randn(layer.k, layer.d, generator=draw) * (2 / fan_in[name]) ** 0.5
        codebook -= codebook.mean(0)  # what all blocks have in common adds up over a row
        codes = torch.randint(layer.k, (quantized.codes_matrix.numel(),), generator=draw)
        quantized.set_codes(codebook.half().float(), codes)
    return model.eval()


@torch.no_grad()
def settle(dense: nn.Module, model: nn.Module, side: int) -> None:
    """Give the batch norms of both networks what keeps signals as large as they are, layer by layer, and scales that
    begin at almost nothing a value that shows.

    Statistics of the images themselves, and branches as large as what they are added to, would make a random network
    multiply roundings from layer to layer, as no trained one does.
    """
    for name, parameter in dense.named_parameters():
        if name.rpartition(".")[2] in ("layer_scale", "gamma"):
            parameter.fill_(0.3)
            model.get_parameter(name).fill_(0.3)

    def set_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        power = inputs[0].square().mean().clamp_min(1e-12)
        norm.running_mean.fill_(0.1 * float(power) ** 0.5)
        norm.running_var.fill_(power)
        norm.weight.fill_(GAIN)

    norms = [module for module in dense.modules() if isinstance(module, (_BatchNorm, FrozenBatchNorm2d))]
    hooks = [norm.register_forward_pre_hook(set_norm) for norm in norms]
    if norms:
        dense(torch.randn(1, 3, side, side, generator=stream(SEED, "settle")))
    for hook in hooks:
        hook.remove()
    own = dict(model.named_modules())
    for name, norm in dense.named_modules():
        if norm in norms:
            own[name].load_state_dict(norm.state_dict())


def measure(name: str) -> Row:
    """Quantize and write one network."""
    torch.manual_seed(SEED)
    architecture = find(name)
    dense, side = _built(architecture)
    row = Row(name=name, task=architecture.task, parameters=sum(p.numel() for p in dense.parameters()))
    model = quantized_at_random(dense)
    dense = dense_again(copy.deepcopy(model)).eval()
    row.side = _side(dense, architecture, side)
    settle(dense, model, SETTLING if row.side in SIDES else row.side)
    if architecture.task != "detection":
        row.largest = float(dense_outputs(dense, row.side).abs().max())
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        made = write_onnx(dense, model, path, OnnxOptions(image_size=row.side), {"arch": name})
        row.bytes = path.stat().st_size
    row.seconds = round(time.perf_counter() - begun, 1)
    row.free, row.why_not_free, row.exporter, row.off = made.free, made.why_not_free, made.exporter, made.off
    row.coded, row.unused = len(made.filled.coded), len(made.filled.unused)
    row.share = row.bytes / (model_size(model).bits / 8)
    return row


@torch.no_grad()
def dense_outputs(dense: nn.Module, side: int) -> Tensor:
    """The first output for random images."""
    return Called(dense)(torch.randn(2, 3, side, side, generator=stream(SEED, "look")))[0]


def _built(architecture: Architecture) -> tuple[nn.Module, int]:
    """The dense network, and the size of images that it is made for: torchvision's vision transformers for few
    patches, which their graphs do not show."""
    from torchvision import models

    short = architecture.name.removeprefix("torchvision:")
    if not short.startswith("vit_"):
        return architecture.build(architecture.n_classes), architecture.image_size
    side = 224 if short.endswith("_32") else 112
    return models.get_model(short, weights=None, image_size=side), side


@torch.no_grad()
def _side(dense: nn.Module, architecture: Architecture, made_for: int) -> int:
    if architecture.task == "detection":
        return SIDES[0]
    for side in SIDES:
        try:
            dense(torch.zeros(2, 3, side, side))
        except (RuntimeError, AssertionError, ValueError):
            continue
        return side
    return made_for


def relative(row: Row) -> float:
    """The largest difference relative to the largest output, where that is below 1 too."""
    off = row.off or 0.0
    return off / row.largest if 0 < row.largest < 1 else off


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines."""
    head = ["network", "images", "difference", "bytes", "of what is reported", "coded weights"]
    lines = []
    for row in rows:
        if row.problem:
            lines.append([row.name.removeprefix("torchvision:"), "not written", "-", "-", "-", row.problem])
            continue
        images = {"free": "any size", "batch": f"{row.side} x {row.side}", "fixed": f"one, {row.side} x {row.side}"}
        off = "not checked" if row.off is None else f"{relative(row):.0e}"
        lines.append(
            [
                row.name.removeprefix("torchvision:"),
                images[row.free],
                off,
                f"{row.bytes:,}",
                f"{row.share:.3f}",
                f"{row.coded}" + (f" ({row.unused} unused)" if row.unused else ""),
            ]
        )
    return head, lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Write all, print the table, and write JSON and the table in a page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx_files", description=__doc__)
    parser.add_argument("--networks", help="names, with commas between them")
    parser.add_argument("--small", action="store_true", help=f"only networks of at most {SMALL:,} parameters")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/onnx_files.json"))
    parser.add_argument("--markdown", type=Path, help="replace the table in this page")
    options = parser.parse_args(arguments)
    here = machine()
    print_machine(here)
    rows = {row["name"]: Row(**row) for row in _earlier(options.json)}
    for name in _names(options.networks, options.small, set(rows)):
        try:
            rows[name] = measure(name)
        except UserError as error:
            rows[name] = Row(name=name, problem=str(error)[:300])
        print(rows[name], flush=True)
        gc.collect()
        write_json(options.json, {"machine": here, "seed": SEED, "rows": [asdict(row) for row in rows.values()]})
    ordered = sorted(rows.values(), key=lambda row: (row.task, row.name))
    print_table("ONNX files", *table(ordered))
    own = set(classifiers())
    good = sum(row.name in own and not row.problem and row.off is not None for row in ordered)
    print(f"of torchvision's {len(own)} classifiers written and compared: {good}, at least {NEEDED}: {good >= NEEDED}")
    largest = max((relative(row) for row in ordered if row.off is not None), default=math.nan)
    print(f"largest difference {largest:.1e} {verdict(largest, 1e-4)}")
    if options.markdown:
        put_table(options.markdown, ordered)
    return 0


def _earlier(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def _names(given: str | None, small: bool, known: set[str]) -> list[str]:
    if given is not None:
        return [name for name in given.split(",") if name]
    names = sorted((name for name in classifiers() if name not in known), key=_parameters)
    return [name for name in names if not small or _parameters(name) <= SMALL]


def _parameters(name: str) -> int:
    from torchvision import models

    found = models.get_model_weights(name.removeprefix("torchvision:")).DEFAULT
    return int(found.meta["num_params"])


def put_table(page: Path, rows: Sequence[Row]) -> None:
    """Replace what stands between the marks of a page."""
    head, lines = table(rows)
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    own = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}", *(f"| {' | '.join(one)} |" for one in lines)]
    page.write_text("\n".join([before + MARKS[0], *own, MARKS[1] + after]), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
