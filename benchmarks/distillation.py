"""What learning from the dense network costs beside learning from labels.

Claim: a training step (forward, loss, backward, Adam) of the quantized network with a teacher takes at most 1.35 times
as long as one without, and no longer where the outputs of four stages are compared too. The teacher makes a forward
pass without gradients, a third of a step.

    python -m benchmarks.distillation

Both run in turn in one process (A B A B ...); a ratio is the median of the ratios of the pairs. Codes are random: the
cost does not depend on their values.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from src.compression.finetune.distillation import Distillation, DistillationSpec, find_stages, watching

from .cost import dense_model, quantized_model
from .report import machine, pick_device, print_machine, print_table, time_pairs, verdict, write_json

LIMIT = 1.35


def stepping(model: nn.Module, batch: tuple[Tensor, Tensor], learned: Distillation | None) -> Callable[[], None]:
    """A training step, with a teacher or by cross entropy."""
    images, labels = batch
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with watching(model, () if learned is None else learned.stages) as seen:
            logits = model(images)
        if learned is None:
            loss = nn.functional.cross_entropy(logits, labels)
        else:
            loss, _ = learned.loss(images, logits, seen, None)
        loss.backward()
        optimizer.step()

    return step


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each network, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--archs", nargs="+", default=["resnet18", "resnet50"], help="networks")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--size", type=int, default=128, help="side of an image in pixels")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of steps")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/distillation.json"), help="results")
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    found = machine(device)
    print_machine(found)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size, generator=draw)
    labels = torch.randint(1000, (options.batch,), generator=draw)
    rows, results = [], {}
    for arch in options.archs:
        stages = find_stages(dense_model(arch), images[:1])
        for features in (0.0, 1.0):
            teacher, model = dense_model(arch).to(device), quantized_model(arch).to(device).train()
            learned = Distillation(teacher, DistillationSpec(features=features, stages=stages))
            learned.make_fast()
            batch = images.to(device), labels.to(device)
            pair = time_pairs(stepping(model, batch, None), stepping(model, batch, learned), options.repeats, device)
            what = "answers and stages" if features else "answers"
            results[f"{arch}, {what}"] = asdict(pair)
            times = [f"{1000 * pair.a:.0f}", f"{1000 * pair.b:.0f}", f"{pair.ratio:.3f}"]
            rows.append([arch, what, *times, verdict(pair.ratio, LIMIT)])
    print_table("A training step with a teacher", ["network", "learnt from", "labels ms", "ms", "ratio", "claim"], rows)
    settings = {"batch": options.batch, "size": options.size, "pairs": options.repeats}
    write_json(options.json, {"machine": found, "settings": settings, "limit": LIMIT, "results": results})


if __name__ == "__main__":
    main()
