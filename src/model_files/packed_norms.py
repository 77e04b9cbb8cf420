"""The batch norms of a packed file: one tensor with the two vectors of each, and the two numbers of `norm_training`.

It takes hardly more than the vectors and their entries in the header did:
- byte 2, 1, 0 of every 32-bit number of all first vectors, then of all second ones;
- six zlib streams, each after its length (4 bytes, lowest first): byte 3 of the first vectors and of the second ones;
  the higher and the lower bytes of STEPS times the first numbers, and those of STEPS times the second ones, rounded,
  as 16-bit numbers plus 32896.

Precision. In training a batch of N values per channel estimates a deviation to about 1 / sqrt(2 N) of it and a mean to
1 / sqrt(N) deviations: 1 % for a hundred images of a 7 x 7 map, if all its values were independent. A step of 1 / STEPS
is off by half of that at most.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..common.errors import CheckpointError
from .bit_packing import Bytes
from .norm_training import TrainingVectors, from_numbers, named, to_numbers, training_vectors_of
from .norms import NORM_VECTORS, TRAINING_VECTORS
from .pth import key_of

STREAM = ".norms"
"""No tensor of a network can have this name: a module's is not empty."""
STEPS = 32
_OFFSET = (1 << 15) + 128
"""Numbers within four of zero then have the same higher byte, which costs next to nothing."""
_N_PLANES = 6


def take_norms(model: nn.Module, state: dict[str, Tensor], tied: Mapping[str, str]) -> tuple[dict[str, int], Tensor]:
    """Take the norms of `model` that are whole out of the tensors of a file: their widths, and the stream.

    Norms of other types than 32-bit floats stay.
    """
    whole = {
        name: one
        for name, one in training_vectors_of(model).items()
        if key_of(name, "weight") not in tied and state[key_of(name, "weight")].dtype == torch.float32
    }
    if not whole:
        return {}, torch.empty(0, dtype=torch.uint8)
    weights, biases = (torch.cat([state.pop(key_of(name, leaf)) for name in whole]) for leaf in NORM_VECTORS)
    deviations, own = (torch.cat([one[part] for one in whole.values()]) for part in (0, 1))
    return {name: one[0].numel() for name, one in whole.items()}, encode(weights, biases, (deviations, own))


def put_norms(
    source: str, tensors: Mapping[str, Tensor], widths: Mapping[str, int], tied: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file with its norms under names of their own, and `tied` with what was added to them.

    Raises:
        CheckpointError: the stream is damaged.
    """
    try:
        norms = decode(tensors[STREAM], widths)
    except ValueError as error:
        raise CheckpointError(f"{source} cannot be read: its batch norms are damaged ({error})") from error
    others = {name: tensor for name, tensor in tensors.items() if name != STREAM}
    if norms.keys() & others.keys():
        raise CheckpointError(f"{source} cannot be read: it holds a batch norm twice")
    more: dict[str, str] = {}
    for name, owner in tied.items():  # a norm that is used twice
        layer, _, leaf = owner.rpartition(".")
        if leaf == "weight" and layer in widths:
            more |= {key_of(name.rpartition(".")[0], one): key_of(layer, one) for one in TRAINING_VECTORS}
    return {**others, **norms}, {**tied, **more}


def encode(weights: Tensor, biases: Tensor, training: TrainingVectors) -> Tensor:
    """The stream of all norms of a file, one after the other: vectors (C,) of 32-bit floats, and how they train."""
    counted = ((STEPS * to_numbers(weights, training).numpy()).round() + _OFFSET).clip(0, 0xFFFF)
    vectors = [_bytes(one.contiguous().numpy(), "<f4") for one in (weights, biases)]
    numbers = [_bytes(one, "<u2") for one in counted]
    parts = [one[:, byte].tobytes() for one in vectors for byte in (2, 1, 0)]
    for plane in (vectors[0][:, 3], vectors[1][:, 3], *(one[:, byte] for one in numbers for byte in (1, 0))):
        stream = zlib.compress(plane.tobytes(), 9)
        parts += [len(stream).to_bytes(4, "little"), stream]
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def decode(stream: Tensor, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The two vectors of each norm and how it trains, by name of the tensor; the inverse of `encode`.

    Raises:
        ValueError: the stream does not hold norms of these widths.
    """
    n, contents = sum(widths.values()), stream.numpy().tobytes()
    if stream.dtype != torch.uint8 or not 1 <= 6 * n <= len(contents):
        raise ValueError(f"{len(contents)} bytes for {n} channels")
    lower = np.frombuffer(contents[: 6 * n], np.uint8).reshape(2, 3, n)[:, ::-1]
    upper = _planes(contents[6 * n :], n)
    vectors = np.concatenate([lower, np.stack(upper[:2])[:, None]], axis=1)  # (2, 4, n), lowest byte first
    weights, biases = (torch.from_numpy(np.ascontiguousarray(one.T).view("<f4").reshape(n).copy()) for one in vectors)
    numbers = np.stack([upper[at].astype(np.float64) * 256 + upper[at + 1] - _OFFSET for at in (2, 4)]) / STEPS
    training = from_numbers(weights, torch.from_numpy(numbers))
    parts = [one.split(list(widths.values())) for one in (weights, biases, *training)]
    return named((*NORM_VECTORS, *TRAINING_VECTORS), widths, parts)


def _bytes(numbers: np.ndarray, dtype: str) -> Bytes:
    """Every number's bytes (C, B), lowest first."""
    return numbers.astype(dtype).view(np.uint8).reshape(len(numbers), -1)


def _planes(contents: bytes, n: int) -> list[Bytes]:
    """The zlib streams, each of `n` bytes; nothing is unpacked beyond that."""
    planes, at = [], 0
    for _ in range(_N_PLANES):
        length = int.from_bytes(contents[at : at + 4], "little")
        decoder = zlib.decompressobj()
        try:
            plane = decoder.decompress(contents[at + 4 : at + 4 + length], n + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        if len(plane) != n or not decoder.eof or decoder.unused_data:
            raise ValueError(f"not {n} channels")
        planes.append(np.frombuffer(plane, np.uint8))
        at += 4 + length
    if at != len(contents):
        raise ValueError("something follows the last stream")
    return planes
