"""What each of several processes runs to calibrate networks together: python -m tests.support.calibrating FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.compression.quantize.calibrate.calibrate import Calibration, Surroundings, calibrate
from src.engines import choosing
from src.engines.engine import Engine
from tests.compression.quantize.calibrate.test_calibrate import Digits, digits, plan_of
from tests.compression.quantize.calibrate.test_walk import Keeps, Kept


def networks() -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """Networks and batches: an odd number of them, one for all processes, and some that do not reach every weight."""
    torch.manual_seed(0)
    images, _ = digits()
    net, keeps = Digits().eval(), Keeps().eval()
    small, large = 0.01 * torch.randn(40, 16), torch.randn(64, 16) + 0.3
    return {
        "odd": (net, list(images[:200].split(64))),
        "one batch": (net, [images[:90]]),
        "only the first reaches all": (keeps, [large, small]),
    }


def found_by(engine: Engine | None, net: nn.Module, batches: list[Tensor]) -> Calibration:
    around = Surroundings() if engine is None else Surroundings(processes=engine)
    return calibrate(net, plan_of(net), batches, show_progress=False, within=around)


def as_values(found: Calibration) -> dict[str, Any]:
    """What JSON can hold of it."""
    codes = {name: one.codes.tolist() for name, one in found.clusterings.items()}
    codebooks = {name: one.codebook.tolist() for name, one in found.clusterings.items()}
    norms = {name: [one.tolist() for one in pair] for name, pair in found.norms.items()}
    return {"lost": found.lost, "codes": codes, "codebooks": codebooks, "norms": norms, "plain": found.plain}


def main(folder: Path) -> None:
    engine = choosing.make("auto", torch.device("cpu"))
    found = {
        name: engine.gather([as_values(found_by(engine, net, batches))]) for name, (net, batches) in networks().items()
    }
    # only the first process has kept parts: nobody may use them, or the others would wait for it
    net, batches = networks()["odd"]
    kept = Kept(0)
    calibrate(net, plan_of(net), batches, show_progress=False, within=Surroundings(processes=engine, parts=kept))
    some = {label: part for label, part in kept.parts.items() if engine.is_main or label == "first"}
    kept.parts = some
    again = calibrate(
        net, plan_of(net), batches, show_progress=False, within=Surroundings(processes=engine, parts=kept)
    )
    found["resumed"] = engine.gather([as_values(again)])
    if engine.is_main:
        torch.save(found, folder / "found.pth")
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
