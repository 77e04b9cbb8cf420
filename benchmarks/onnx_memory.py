"""What an ONNX file of a quantized network takes in onnxruntime: memory, seconds to load it, time per image.

Modes: `usual` (onnxruntime folds codebook and codes into dense weights when it loads the file), `dense` (the file with
`--dense`), `low memory` (the session option that leaves them as they are), and two forms of the graph, which are tried
here only, in which the layers that `--late` names are not folded: `late layers coded`, and `late layers halved`, folded
in 16 bits and widened when they are needed.

Claims: low memory takes at most a third of the usual; what a form would have to reach to be worth a mode is 45 MiB at
1.15 times the usual time.

    python -m benchmarks.onnx_memory [FILE] [--arch resnet18] [--repeats 40]

Each mode runs in a process of its own with one thread. Memory is the growth of the resident set from before the file is
loaded to after the images. Time is the processor's: what else the machine does hardly changes it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import machine, print_machine, print_table, verdict, write_json

MODES = ("usual", "dense", "low memory", "late layers coded", "late layers halved")
LIMITS = {"MiB": 45.0, "ratio": 1.15}
SIDE = 224


def late_decoding(graph: Any, late: Sequence[str], halved: bool) -> Any:
    """The graph with the weights of some layers not folded: what makes them depends on the shape of an input.

    Args:
        graph: with codebooks and codes.
        late: how the names of the layers begin.
        halved: fold them into 16-bit weights, instead of not at all.
    """
    import onnx

    make, top = onnx.helper.make_node, graph.graph
    users = {name: node for node in top.node for name in node.input}
    gone, before = set(), {}
    for prefix in [one.name.removesuffix(".codes") for one in top.initializer if one.name.endswith(".codes")]:
        if not prefix.startswith(tuple(late)):
            continue
        indices, centroids = users[f"{prefix}.codes"], users[f"{prefix}.codebook"]
        gather, shaped = users[indices.output[0]], users[f"{prefix}.shape"]
        weight = shaped.output[0]
        consumer = users[weight]
        gone |= {id(node) for node in (indices, centroids, gather, shaped)}
        given = next(name for name in consumer.input if name != weight)
        n, one, size = (f"{prefix}.{word}" for word in ("n", "one", "size"))
        nodes = [make("Shape", [given], [n], start=0, end=1), make("Div", [n, n], [one])]
        if halved:
            nodes += [
                indices,
                make("Gather", [f"{prefix}.codebook", *indices.output], list(gather.output), axis=0),
                make("Mul", [f"{prefix}.shape", one], [size]),
                make("Reshape", [*gather.output, size], [f"{prefix}.half"]),
                make("Cast", [f"{prefix}.half"], [weight], to=onnx.TensorProto.FLOAT),
            ]
        else:
            whole = onnx.helper.make_tensor(f"{prefix}.whole", onnx.TensorProto.INT64, [1], [-1])
            top.initializer.append(whole)
            nodes += [
                make("Mul", [whole.name, one], [size]),
                make("Reshape", [f"{prefix}.codes", size], [f"{prefix}.bytes"]),
                make("Cast", [f"{prefix}.bytes"], list(indices.output), to=onnx.TensorProto.INT32),
                *(centroids, gather, shaped),
            ]
        before[id(consumer)] = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    ordered = []
    for node in top.node:
        if id(node) not in gone:
            ordered += [*before.get(id(node), []), onnx.NodeProto.FromString(node.SerializeToString())]
    del top.node[:]
    top.node.extend(ordered)
    onnx.checker.check_model(graph)
    return graph


def resident() -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def child(path: str, mode: str, repeats: int) -> dict[str, float]:
    """Load a file and run it, in this process."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    unfolded = ["ConstantFolding"] if mode == "low memory" else None
    image = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)
    before, begun = resident(), time.process_time()
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"], disabled_optimizers=unfolded
    )
    loaded = time.process_time() - begun
    (logits,) = session.run(None, {"images": image})
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        session.run(None, {"images": image})
        times.append(time.process_time() - begun)
    largest = int(np.abs(logits).argmax())
    return {
        "MiB": resident() - before,
        "load": loaded,
        "milliseconds": 1e3 * statistics.median(times),
        "largest": largest,
        "logit": float(logits.ravel()[largest]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, measure every mode in turn, and print and write what was found."""
    if arguments is None and sys.argv[1:2] == ["child"]:
        print(json.dumps(child(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx_memory", description=__doc__)
    parser.add_argument("file", nargs="?", help="a compressed model file (default: random weights and codes)")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--late", nargs="+", default=["layer3", "layer4"], help="how names of late layers begin")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3, help="processes per mode, in turn")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/onnx_memory.json"))
    options = parser.parse_args(arguments)
    here = machine()
    print_machine(here)
    with tempfile.TemporaryDirectory() as folder:
        files = written(options, Path(folder))
        found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        for _ in range(options.rounds):
            for mode in MODES:
                command = [sys.executable, "-m", "benchmarks.onnx_memory", "child", files[mode], mode]
                done = subprocess.run([*command, str(options.repeats)], capture_output=True, text=True, check=True)
                found[mode].append(json.loads(done.stdout))
        sizes = {mode: Path(path).stat().st_size for mode, path in files.items()}
    results = {
        mode: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]} | {"bytes": sizes[mode]}
        for mode, rounds in found.items()
    }
    report(results)
    about = {"machine": here, "repeats": options.repeats, "rounds": options.rounds, "late": options.late}
    source = "random" if options.file is None else Path(options.file).name
    write_json(options.json, {**about, "limits": LIMITS, "file": source, "results": results})
    return 0


def written(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """The file of every mode."""
    import onnx

    from src import convert

    source = options.file
    if source is None:
        from src import api
        from src.architectures.named import find

        from .onnx_files import quantized_at_random

        source = str(folder / "random.safetensors")
        architecture = find(options.arch)
        api.save(quantized_at_random(architecture.build(architecture.n_classes)), source, arch=options.arch)
    usual, dense = str(folder / "usual.onnx"), str(folder / "dense.onnx")
    for path, more in ((usual, []), (dense, ["--dense"])):
        if status := convert.main([source, path, "--image_size", str(SIDE), *more]):
            raise SystemExit(status)
    files = {"usual": usual, "dense": dense, "low memory": usual}
    for mode, halved in (("late layers coded", False), ("late layers halved", True)):
        files[mode] = str(folder / f"{'halved' if halved else 'coded'}.onnx")
        onnx.save(late_decoding(onnx.load(usual), options.late, halved), files[mode])
    return files


def report(results: dict[str, dict[str, Any]]) -> None:
    """The table, and how it stands to what is claimed."""
    usual = results["usual"]
    rows = []
    for mode, one in results.items():
        one["ratio"] = one["milliseconds"] / usual["milliseconds"]
        if one["largest"] != usual["largest"] or abs(one["logit"] / usual["logit"] - 1) > 1e-4:
            raise SystemExit(f"{mode} computes something else: {one} and {usual}")
        rows.append(
            [
                mode, f"{one['bytes']:,}", f"{one['MiB']:.0f}", f"{one['load']:.2f}", f"{one['milliseconds']:.1f}",
                f"{one['ratio']:.2f}",
            ]
        )  # fmt: skip
    print_table("onnxruntime, one thread", ["mode", "bytes", "MiB", "s to load", "ms", "times"], rows)
    part = results["low memory"]["MiB"] / usual["MiB"]
    print(f"memory with the option, of the usual: {part:.2f} {verdict(part, 1 / 3)}")
    for mode in MODES[3:]:
        one = results[mode]
        enough = one["MiB"] <= LIMITS["MiB"] and one["ratio"] <= LIMITS["ratio"]
        print(f"{mode}: {one['MiB']:.0f} MiB at {one['ratio']:.2f}; worth a mode: {'yes' if enough else 'no'}")


if __name__ == "__main__":
    raise SystemExit(main())
