"""Any torchvision network: compress it, save it, load it again.

    python examples/torchvision_model.py [mobilenet_v3_small]

Random weights keep this example short and offline; with `weights="DEFAULT"` it is the published network, and images of
your own (no labels needed) as `calibration` repair its batch norms.
"""

import sys
import tempfile
from pathlib import Path

import pqf
import torch
from torchvision import models


def main(name: str = "mobilenet_v3_small", k_means_n_iters: int = 10) -> None:
    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    images = torch.rand(1, 3, 224, 224)

    model, report = pqf.compress(
        model, images, k_means_n_iters=k_means_n_iters, sls_iterations=1000, search="published"
    )
    print(report)
    print(pqf.inspect(model))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        pqf.save(model, file, arch=f"torchvision:{name}")
        print(f"{file.stat().st_size:,} bytes on disk")
        loaded = pqf.load(file, into=models.get_model(name, weights=None))
    with torch.no_grad():
        assert torch.allclose(loaded(images), model(images), atol=1e-5)
    print("the loaded network computes the same")


if __name__ == "__main__":
    main(*sys.argv[1:2])
