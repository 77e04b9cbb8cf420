"""What a second process brings, and what a training step sends.

Claims: (a) two CPU processes with one thread each fine-tune at least 1.6 times as many images per second as one; (b)
the gradients that a step sends are no more than the trained parameters: codebooks, norms, biases and what is left
dense.

    python -m benchmarks.processes

(a) In one launch of two processes: the first works alone while the second waits, then both train one model together,
then both at once a model of their own without talking (what the machine's two processors can do at best); in turn, and
a ratio is the median of the rounds. Images are in memory. (b) Bytes that went over the loopback interface per step and
process, the least of several repetitions, as other programs can only add to them: gradients, packet headers, and the
messages by which the engine agrees on what to send (Horovod's grow with the duration of a step). Codes are random:
neither depends on their values.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from src.engines import choosing
from src.engines.engine import Engine

from .cost import dense_model, quantized_model, training_step
from .report import machine, print_machine, print_table, write_json

LEAST_SPEEDUP = 1.6
TRAFFIC_STEPS = 3
TRAFFIC_REPEATS = 5


def available() -> list[str]:
    """Engines of several processes that are installed here."""
    return ["torchrun", *(["horovod"] if find_spec("horovod") else [])]


def launch(engine: str, arguments: Sequence[str]) -> None:
    """Run this module in two processes with one thread each."""
    if engine == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    else:
        launcher = "from horovod.runner.launch import run_commandline; run_commandline()"
        start = [
            sys.executable,
            "-c",
            launcher,
            "-np",
            "2",
            "--gloo",
            "--network-interfaces",
            "lo",
            sys.executable,
            "-m",
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(
        [*start, __spec__.name if __spec__ else "benchmarks.processes", *arguments],
        env=environment,
        check=True,
        timeout=3600,
    )


def trained_bytes(model: nn.Module) -> int:
    """Bytes of all trained parameters."""
    return sum(
        parameter.numel() * parameter.element_size() for parameter in model.parameters() if parameter.requires_grad
    )


def sent_bytes() -> int | None:
    """Bytes that the loopback interface has sent since the machine started; None where the system does not say."""
    try:
        lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    fields = next((line.split(":")[1].split() for line in lines if line.strip().startswith("lo:")), None)
    return int(fields[8]) if fields else None


def step_of(engine: Engine | None, model: nn.Module, batch: int, size: int) -> Callable[[], None]:
    """A training step on images of this process; with an engine, gradients are averaged."""
    draw = torch.Generator().manual_seed(0 if engine is None else engine.rank)
    images, labels = torch.randn(batch, 3, size, size, generator=draw), torch.randint(1000, (batch,), generator=draw)
    return training_step(model if engine is None else engine.wrap_model(model), images, labels)


def seconds_per_step(engine: Engine, step: Callable[[], None], steps: int, alone: bool = False) -> float:
    """From the moment all are ready until all are done; `alone`: only the first process works."""
    engine.barrier()
    began = time.perf_counter()
    if engine.is_main or not alone:
        for _ in range(steps):
            step()
    engine.barrier()
    return (time.perf_counter() - began) / steps


def measure_speed(engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """Images per second of one process, of two together, and of two that do not talk."""
    own = step_of(None, quantized_model("resnet18"), options.batch, options.size)
    joint = step_of(engine, quantized_model("resnet18"), options.batch, options.size)
    for step in (own, joint):
        seconds_per_step(engine, step, 2)
    rounds = []
    for _ in range(options.rounds):
        one = seconds_per_step(engine, own, options.steps, alone=True)
        both = seconds_per_step(engine, joint, options.steps)
        silent = seconds_per_step(engine, own, options.steps)
        rounds.append((one, both, silent))
    ratios = [2 * one / both for one, both, _ in rounds]
    return {
        "one_images_per_second": options.batch / median(one for one, _, _ in rounds),
        "two_images_per_second": 2 * options.batch / median(both for _, both, _ in rounds),
        "ratio": median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "ratio_without_talking": median(2 * one / silent for one, _, silent in rounds),
    }


def measure_traffic(engine: Engine, arch: str) -> dict[str, Any]:
    """Bytes per step and process for the compressed and the dense network, counted and seen."""
    found: dict[str, Any] = {}
    for kind, make in (("compressed", quantized_model), ("dense", dense_model)):
        model = make(arch)
        step = step_of(engine, model, 2, 32)
        seconds_per_step(engine, step, 3)  # the first steps also settle in which order gradients are sent
        seen = []
        for _ in range(TRAFFIC_REPEATS):
            before = sent_bytes()
            seconds_per_step(engine, step, TRAFFIC_STEPS)
            after = sent_bytes()
            if before is not None and after is not None:
                seen.append((after - before) / TRAFFIC_STEPS / engine.world_size)
        found[kind] = {"trained_bytes": trained_bytes(model), "sent_bytes": round(min(seen)) if seen else None}
    return found


def work(options: argparse.Namespace) -> None:
    """What each process does; the first one writes the results."""
    engine = choosing.make("auto", torch.device("cpu"))
    torch.set_num_threads(1)
    results = {
        "speed": measure_speed(engine, options),
        "traffic": {arch: measure_traffic(engine, arch) for arch in options.archs},
    }
    if engine.is_main:
        options.work.write_text(json.dumps(results), encoding="utf-8")
    engine.close()


def report(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the tables."""
    rows = []
    for engine, result in results.items():
        speed = result["speed"]
        holds = f">= {LEAST_SPEEDUP}: {'yes' if speed['ratio'] >= LEAST_SPEEDUP else 'NO'}"
        rows.append([engine, f"{speed['one_images_per_second']:.2f}", f"{speed['two_images_per_second']:.2f}", f"{speed['ratio']:.2f}",
                     f"{speed['low']:.2f}..{speed['high']:.2f}", f"{speed['ratio_without_talking']:.2f}", holds])  # fmt: skip
    title = (
        f"(a) fine-tuning ResNet-18, {options.batch} images of {options.size}x{options.size} per process and step, one "
        "thread each"
    )
    print_table(
        title, ["engine", "1 process, images/s", "2 processes", "ratio", "rounds", "without talking", "claim"], rows
    )
    rows = []
    for engine, result in results.items():
        for arch, kinds in result["traffic"].items():
            for kind, found in kinds.items():
                sent, trained = found["sent_bytes"], found["trained_bytes"]
                rows.append([f"{engine}, {arch} {kind}", f"{trained:,}", "-" if sent is None else f"{sent:,}",
                             "-" if sent is None else f"{sent / trained:.3f}"])  # fmt: skip
    print_table(
        "(b) bytes per step and process", ["engine and network", "trained parameters", "sent", "sent/trained"], rows
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Launch two processes under every engine that is installed, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.processes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16, help="images per process and step")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image")
    parser.add_argument("--steps", type=int, default=2, help="steps per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds")
    parser.add_argument(
        "--archs", nargs="+", default=["resnet18", "resnet50"], help="networks whose traffic is counted"
    )
    parser.add_argument("--engines", nargs="+", default=available(), help="engines")
    parser.add_argument("--work", type=Path, help="used by the launched processes")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/processes.json"), help="where the results are written"
    )
    options = parser.parse_args(argv)
    if options.work:
        work(options)
        return
    found = {**machine(), "threads_per_process": 1}
    print_machine(found)
    results = {}
    numbers = [f"--{name}={getattr(options, name)}" for name in ("batch", "size", "steps", "rounds")]
    for engine in options.engines:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.json"
            launch(engine, [*numbers, "--archs", *options.archs, "--work", str(path)])
            results[engine] = json.loads(path.read_text(encoding="utf-8"))
    report(results, options)
    settings = {name: getattr(options, name) for name in ("batch", "size", "steps", "rounds")}
    write_json(
        options.json, {"machine": found, "settings": settings, "limits": {"speedup": LEAST_SPEEDUP}, "results": results}
    )


if __name__ == "__main__":
    main()
