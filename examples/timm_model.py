"""A timm network with a new number of classes: compress it, and make it dense again for other tools.

    python examples/timm_model.py [mobilenetv3_small_050]

`pretrained=True` gives timm's weights; random ones keep this example short and offline.
"""

import sys

import pqf
import timm
import torch


def main(name: str = "mobilenetv3_small_050", k_means_n_iters: int = 10) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10).eval()
    images = torch.rand(2, 3, 64, 64)

    for group in pqf.groups(model, images)[:5]:
        print(f"{group.width} channels may be reordered together: {group.label}")
    # the classifier stays as it is: it is small, and every value of it counts
    model, report = pqf.compress(
        model, images, k_means_n_iters=k_means_n_iters, search="published", sls_iterations=1000,
        ignored_modules=["classifier"], calibration=[torch.rand(16, 3, 64, 64)],
    )  # fmt: skip
    print(report)

    dense = pqf.dequantize(model)
    with torch.no_grad():
        assert torch.allclose(dense(images), model(images), atol=1e-5)
    print(f"a dense copy of class {type(dense).__name__} computes the same")


if __name__ == "__main__":
    main(*sys.argv[1:2])
