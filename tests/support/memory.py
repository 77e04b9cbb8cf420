"""Peak memory of a piece of code in a process of its own, so that nothing else counts: python -m tests.support.memory
NAME [ARGUMENTS]."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT


def peak_bytes() -> int:
    """The largest resident set of this process since it was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def grown(action: Callable[[], object]) -> int:
    """Bytes by which `action` raises the peak above what is resident before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = peak_bytes()
    action()
    return peak_bytes() - before


def cluster_a_layer(n: str) -> int:
    """k-means of n vectors of 9 values, 256 centroids."""
    import torch

    from src.common.randomness import stream
    from src.compression.quantize.kmeans import cluster

    vectors = torch.randn(int(n), 9, generator=stream(0, "vectors"))
    cluster("src", vectors[:5000], 256, 2, stream(0, "warm up"))  # what is compiled and loaded once does not count
    return grown(lambda: cluster("src", vectors, 256, 3, stream(0, "draw")))


def quantize_a_layer(n: str, d: str, pruned: str, kind: str) -> int:
    """Quantizing a linear layer of n subvectors of d values, a share of which is zero."""
    import torch
    from torch import nn

    from src.common.randomness import stream
    from src.compression.quantize.compress import compress
    from src.compression.quantize.plan import make_plan
    from tests.support.helpers import spec

    def quantize(layer: nn.Module) -> None:
        compress(layer, make_plan(layer, spec(256, kind, 2, fc=int(d))), show_progress=False)

    quantize(nn.Linear(int(d), 5000))  # what is compiled and loaded once does not count
    layer = nn.Linear(int(d) * 100, int(n) // 100, bias=False)
    with torch.no_grad():
        layer.weight.normal_(generator=stream(0, "weight"))
        layer.weight[: int(float(pruned) * layer.out_features)] = 0.0
    return grown(lambda: quantize(layer))


def read_files(*names: str) -> int:
    """Reading model files, refused ones too."""
    from src.common.errors import UserError
    from src.model_files.open_model_file import read_model_file

    def read() -> None:
        for name in names:
            with contextlib.suppress(UserError):
                read_model_file(Path(name))

    read_model_file(ROOT / "tests" / "data" / "format1.safetensors")
    return grown(read)


def evaluate_large_layers(decode: str) -> int:
    """A pass through sixteen linear layers of 4 MB, with random codes."""
    import torch
    from torch import nn

    from src.common.randomness import stream
    from src.model_files.decoding import set_decode
    from tests.support.helpers import quantized_layer

    parts = [quantized_layer(nn.Linear(1024, 1024, device="meta"), 8, 256).to_empty(device="cpu") for _ in range(16)]
    for part in parts:
        draw = stream(0, "codes")
        codes = torch.randint(256, (1024 * 128,), generator=draw)
        part.set_codes(torch.randn(256, 8, generator=draw) / 32, codes)
        nn.init.zeros_(part.bias)
    model, x = set_decode(nn.Sequential(*parts).eval(), decode), torch.ones(1, 1024)
    with torch.no_grad():
        parts[0](x)  # what is loaded once does not count
        parts[0].forget()
        return grown(lambda: model(x))


JOBS = {job.__name__: job for job in (cluster_a_layer, quantize_a_layer, read_files, evaluate_large_layers)}


def in_a_process_of_its_own(job: Callable[..., int], *arguments: object) -> int:
    """The growth that `job` reports from a fresh process; skips where the system does not tell it."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc, which this system does not have")
    command = [sys.executable, "-m", "tests.support.memory", job.__name__, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout))


if __name__ == "__main__":
    print(json.dumps(JOBS[sys.argv[1]](*sys.argv[2:])))
