"""Whether what was derived from a codebook and codes is still right.

On the CPU values are compared with a copy, which sees every change, whoever made it: versions miss what is written
through `data`, a NumPy view or a fused optimizer. Elsewhere a comparison would wait for the device at every layer, so
versions are compared; a codebook counts those of its `data` too (`read_only.Codebook`), and what a fused optimizer
changes is expected wherever there are gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .read_only import Codebook, DequantizedWeight


def must_be_plain() -> bool:
    """Whether operators are being followed rather than only run: by torch.compile, torch.export, torch.jit.trace or
    torch.func."""
    if torch.compiler.is_compiling():
        return True
    # what torch.autograd.Function asks itself; there is no public question for it
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def is_ordinary(tensor: object) -> bool:
    """Whether a tensor holds values itself: a proxy of torch.fx, a fake or a distributed tensor does not."""
    return type(tensor) in (Codebook, nn.Parameter, Tensor)


def _version(tensor: Tensor) -> tuple[Any, ...]:
    """Equal as long as nothing was written into `tensor` and it was not moved or replaced."""
    # tensors made in inference mode cannot be changed outside it and count no versions
    return (
        id(tensor),
        tensor.data_ptr(),
        tensor.dtype,
        tensor.device,
        -1 if tensor.is_inference() else tensor._version,
    )


def _copy(tensor: Tensor) -> Tensor | None:
    """A copy to compare with, on the CPU."""
    if tensor.device.type != "cpu":
        return None
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()


def _same(tensor: Tensor, copy: Tensor | None, version: tuple[Any, ...]) -> bool:
    if copy is None or tensor.device.type != "cpu":
        return _version(tensor) == version
    return tensor.dtype == copy.dtype and torch.equal(tensor, copy)


@dataclass(frozen=True)
class SeenCodes:
    """Codes as they were when they were last used.

    Attributes:
        version: of the tensor then.
        copy: its values, on whatever device.
    """

    version: tuple[Any, ...]
    copy: Tensor

    @staticmethod
    def of(codes: Tensor) -> SeenCodes:
        """Remember `codes` (R, m)."""
        with torch.inference_mode(False), torch.no_grad():
            return SeenCodes(version=_version(codes), copy=codes.detach().clone())

    def still(self, codes: Tensor) -> bool:
        """Whether `codes` are these."""
        return _same(codes, self.copy, self.version)

    def check_change(self, codes: Tensor, k: int) -> None:
        """Refuse codes that an average over buffers made: averages of whole numbers are cut off, so all that changed
        are lower.

        Raises:
            RuntimeError: that is so, or a code is not below k.
        """
        if codes.shape != self.copy.shape or codes.device != self.copy.device:
            return
        changed = codes != self.copy
        n = int(changed.sum())
        if n and (int(codes.min()) < 0 or int(codes.max()) >= k):
            raise RuntimeError(f"the codes of a quantized layer were changed to values outside 0 ... {k - 1}")
        if n and self.version[0] == id(codes) and bool((codes <= self.copy).all()):
            raise RuntimeError(
                f"{n} of {codes.numel()} codes of a quantized layer were lowered in place, as an average over buffers "
                "does with whole numbers: average only parameters (AveragedModel(..., use_buffers=False)) and copy "
                "codes_matrix from the trained network, or set new codes with layer.set_codes(codebook, codes)"
            )


@dataclass(frozen=True)
class KeptWeight:
    """A dequantized weight, and what it was made from."""

    weight: DequantizedWeight
    weight_version: int
    seen: SeenCodes | None
    codebook_version: tuple[Any, ...]
    codebook: Tensor | None
    channels_last: bool

    @staticmethod
    def of(codebook: Tensor, seen: SeenCodes | None, channels_last: bool, weight: Tensor) -> KeptWeight:
        """Keep `weight`, which was made from `codebook` and the codes `seen`."""
        return KeptWeight(
            weight=DequantizedWeight.of(weight),
            weight_version=weight._version,
            seen=seen,
            codebook_version=_version(codebook),
            codebook=_copy(codebook),
            channels_last=channels_last,
        )

    def was_written_into(self) -> bool:
        """Whether somebody wrote into it through a view."""
        return self.weight._version != self.weight_version

    def still(self, codebook: Tensor, seen: SeenCodes | None, channels_last: bool) -> bool:
        """Whether it is what codebook and codes give."""
        if seen is not self.seen or channels_last != self.channels_last:
            return False
        if codebook.device.type != "cpu" and (type(codebook) is not Codebook or codebook.grad is not None):
            return False  # its changes may not show
        return _same(codebook, self.codebook, self.codebook_version)
