"""Groups of exchangeable channels in any network: which positions of which tensors a permutation moves together.

The form that users write (`groups`) names layers, and whole axes of them move. A network that concatenates, shuffles
channels or has attention heads needs more: a channel is wherever its values are, in some positions of some axes of some
tensors (paper section 3.2.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...common.errors import GroupError
from .operations import check_permutation


@dataclass(frozen=True)
class Places:
    """Where the channels of a group stand in one tensor.

    Attributes:
        tensor: name of a parameter or buffer of the network, for example `layer1.0.conv1.weight`.
        shape: sizes of the axes whose positions are counted, 1 for every other axis of the tensor: (C, 1, 1, 1) counts
            rows, (1, C, 1, 1) input channels, (R, c, 1, 1) the inputs of each row of a grouped convolution.
        positions: (n, r) int64, positions in an array of that shape, flat: channel i stands at the r positions of row
            i, and permuting moves position j of one channel to position j of another.
        reads: whether the layer consumes the channels here (a child); False: it produces or follows them (a parent).
    """

    tensor: str
    shape: tuple[int, ...]
    positions: Tensor
    reads: bool


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that may be exchanged.

    Attributes:
        label: names the group in messages.
        places: all that moves with them.
        n_blocks: a permutation must stay within this many equal blocks of consecutive channels (1: anything goes).
    """

    label: str
    places: tuple[Places, ...]
    n_blocks: int = 1

    @property
    def width(self) -> int:
        """Number of channels C."""
        return int(self.places[0].positions.shape[0])

    @property
    def parents(self) -> tuple[str, ...]:
        """Names of the modules that produce or follow the channels."""
        return _modules(self.places, reads=False)

    @property
    def children(self) -> tuple[str, ...]:
        """Names of the modules that consume them."""
        return _modules(self.places, reads=True)

    def backwards(self) -> Tensor:
        """The permutation (C,) that reverses the channels of each block: none of several keeps its place."""
        size = self.width // self.n_blocks
        return torch.cat([torch.arange(size - 1, -1, -1) + block * size for block in range(self.n_blocks)])

    def random(self, generator: torch.Generator) -> Tensor:
        """A random permutation (C,) that stays within the blocks."""
        size = self.width // self.n_blocks
        parts = [torch.randperm(size, generator=generator) + block * size for block in range(self.n_blocks)]
        return torch.cat(parts)

    def apply(self, model: nn.Module, p: Tensor) -> None:
        """Reorder the channels by p (C,): channel p[i] moves to the place of channel i; in place.

        Raises:
            GroupError: p is no permutation of the group's channels, or the network has no such tensor.
        """
        check_permutation(p, self.width, self.n_blocks)
        for places in self.places:
            tensor = named_tensor(model, places.tensor)
            tensor.data.copy_(permuted(tensor.data, places, p))


def _modules(places: Sequence[Places], reads: bool) -> tuple[str, ...]:
    return tuple(dict.fromkeys(place.tensor.rpartition(".")[0] for place in places if place.reads == reads))


def named_tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called `name`.

    Raises:
        GroupError: there is none.
    """
    prefix, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(prefix)
    except AttributeError:
        raise GroupError(f"the network has no tensor {name!r}") from None
    found = module._parameters.get(leaf, module._buffers.get(leaf))
    if found is None:
        raise GroupError(f"the network has no tensor {name!r}")
    return found


def permuted(tensor: Tensor, places: Places, p: Tensor) -> Tensor:
    """`tensor` with its channels at `places` in the order p (C,); the tensor itself is not changed.

    Raises:
        GroupError: the tensor does not have the axes of `places`.
    """
    counted = [axis for axis, size in enumerate(places.shape) if size > 1]
    fits = len(places.shape) == tensor.dim() and all(tensor.shape[axis] == places.shape[axis] for axis in counted)
    if not fits:
        raise GroupError(f"{places.tensor} has the shape {tuple(tensor.shape)}, which does not fit {places.shape}")
    order = counted + [axis for axis in range(tensor.dim()) if axis not in counted]
    moved = tensor.permute(order)
    n = torch.Size([tensor.shape[axis] for axis in counted]).numel()
    source = torch.arange(n)
    source[places.positions.reshape(-1)] = places.positions[p].reshape(-1)
    flat = moved.reshape(n, -1).index_select(0, source.to(tensor.device))
    back = [order.index(axis) for axis in range(tensor.dim())]
    return flat.reshape(moved.shape).permute(back)
