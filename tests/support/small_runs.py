"""Flags of the smallest real runs of ResNet-18: images of 32 x 32, the published recipe, few iterations of everything."""

from __future__ import annotations


def training(batch: int, workers: int, sls: int, k_means: int) -> list[str]:
    """Flags of `train_resnet`, from random weights: images a batch, loader processes, iterations of both searches."""
    return [
        "--config", "../config/train_resnet18.yaml", "--model.weights", "none", "--recipe", "published",
        "--model.sls_iterations", str(sls), "--model.compression_parameters.k_means_n_iters", str(k_means),
        *evaluation(batch, workers),
    ]  # fmt: skip


def evaluation(batch: int = 8, workers: int = 0) -> list[str]:
    """Flags of `evaluate_resnet` on the same images."""
    return [
        "--dataloader.resize", "32", "--dataloader.image_size", "32", "--dataloader.batch_size", str(batch),
        "--dataloader.num_workers", str(workers), "--device", "cpu",
    ]  # fmt: skip
