"""A quantized network under DDP and FSDP2: python -m tests.support.wrapped ddp|fsdp FILE, in two processes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from src.compression.quantize.layers import QuantizedLayer
from tests.support.helpers import quantized, spec

STEPS = 3


def network() -> nn.Module:
    """A quantized network of convolutions, linear layers and attention, the same everywhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Flatten(2), Turned(), nn.Linear(16, 8))
    return quantized(model, spec(4))


class Turned(nn.Module):
    """Attention over the positions of a map (B, C, n)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return self.attention(x, x, x, need_weights=False)[0]


def inputs() -> Tensor:
    """What both processes train on, together (4, 3, 6, 6)."""
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(2))


def trained(model: nn.Module, x: Tensor) -> Tensor:
    """`STEPS` of gradient descent, then the output in evaluation mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        model(x)
        return model(x)


def main() -> None:
    """Train on half of the inputs in each process; process 0 writes outputs for all of them and the codebooks."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model = network()
    codes = {name: layer.codes_matrix.clone() for name, layer in _layers(model).items()}
    mine = inputs()[rank::2]
    if sys.argv[1] == "ddp":
        output = trained(DistributedDataParallel(model), mine)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for child in (model[2], model[4], model[5]):
            fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
        output = trained(model, mine)
    both = [torch.empty_like(output) for _ in range(2)]
    distributed.all_gather(both, output)
    books = {name: _whole(layer.codebook) for name, layer in _layers(model).items()}
    assert all(torch.equal(layer.codes_matrix, codes[name]) for name, layer in _layers(model).items())
    if rank == 0:
        torch.save({"outputs": torch.stack(both, 1).flatten(0, 1), "books": books}, Path(sys.argv[2]))
    distributed.destroy_process_group()


def _layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


if __name__ == "__main__":
    main()
