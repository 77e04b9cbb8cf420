"""A network and a training loop of one's own: compress, then train the codebooks like any other parameters.

    python examples/own_training_loop.py

Handwritten digits from scikit-learn; a minute on a laptop. Nothing in the loop knows of compression: codebooks are
ordinary parameters, codes are buffers that stay.
"""

import pqf
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4, 128)
        self.last = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.norm(self.first(x)).relu(), 2)
        x = functional.max_pool2d(self.second(x).relu(), 2)
        return self.last(self.hidden(x.flatten(1)).relu())


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)  # made after compressing: it holds the codebooks
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == labels).float().mean())


def main(epochs: int = 8) -> dict[str, float]:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    seen, held_out = order[:1400], order[1400:]

    model = Net()
    train(model, images[seen], labels[seen], epochs, 2e-3)
    found = {"dense": accuracy(model, images[held_out], labels[held_out])}

    model, report = pqf.compress(model, images[:2], k=16, fc_subvector_size=8, k_means_n_iters=50, show_progress=False)
    print(report)
    found["compressed"] = accuracy(model, images[held_out], labels[held_out])
    train(model, images[seen], labels[seen], epochs, 1e-3)
    found["fine-tuned"] = accuracy(model, images[held_out], labels[held_out])
    for name, value in found.items():
        print(f"{name}: {value:.1f} %")
    return found


if __name__ == "__main__":
    main()
