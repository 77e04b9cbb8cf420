"""Modules whose weight is a codebook and codes.

The module itself stays: its class (a quantized one is a subclass, made on the fly), forward, hooks and attributes. Only
the parameter gives way to a property that dequantizes. The codebook is the only parameter of a quantized weight; the
codes are a buffer and never change. In training the weight is dequantized in every forward pass, and the gradient of a
centroid is the sum of the gradients of the subvectors that use it (paper section 3.4); a centroid of zeros stands for
blocks that were pruned, and stays. Where no gradient is needed the dequantized weight is kept, so that inference runs
at the speed of the dense layer.

`placing` puts them into a network, the parameters that are not their module's `weight` too.

Shapes: R rows, m subvectors per row, d subvector length, k centroids. codes_matrix (R, m), codebook (k, d). In the
layout "output" (`subvectors`) codes_matrix is (R / d, values of a row).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .members import Dequantize, Members
from .read_only import ADVICE, DequantizedWeight, watch
from .stored_codebook import as_stored, check_codebook_bits, eight_bit_scale, some_are_zero, stored_values
from .subvectors import bits_per_code, codes_shape, from_subvectors, scripted_vectors
from .watch import KeptWeight, SeenCodes, is_ordinary, must_be_plain

CODES_DTYPE = torch.int32


class QuantizedLayer(nn.Module):
    """What a quantized weight consists of, mixed into the class of the module whose `weight` it is.

    Attributes:
        codebook: parameter (k, d).
        codes_matrix: buffer (R, m) int32, values below k.
        codebook_scale: buffer () float32, a power of two: what files divide the codebook by; only where they do.
        codebook_bits: of a value of the codebook in files, 16 or 8 (`stored_codebook`).
        keeps_weight: whether the dequantized weight is kept in evaluation.
        weight_shape: shape of the dequantized weight.
        layout: along what its subvectors run, "input" or "output".
        quantized_kind: the type of the dense module, with the parameter's name where that is not `weight`.
    """

    if TYPE_CHECKING:  # TorchScript would read them as its own
        quantized_kind: str
        codebook: Tensor
        codes_matrix: Tensor
        codebook_scale: Tensor
        codebook_bits: int
        weight_shape: tuple[int, ...]
        layout: str
        _rebuild: ClassVar[Any]

    def _set_up(self, weight: Tensor, d: int, k: int, kind: str, scale: float, codebook_bits: int, layout: str) -> None:
        """Make room for codes and codebook of a weight; the values come from `set_codes` or a file."""
        bits_per_code(k)
        shape_of_codes = codes_shape(weight.shape, d, layout)
        self.weight_shape = tuple(weight.shape)
        self.layout = layout
        self.quantized_kind = kind
        codebook = nn.Parameter(
            torch.zeros(k, d, dtype=weight.dtype, device=weight.device), requires_grad=weight.requires_grad
        )
        # in the weight's place: the order of parameters is that of optimizers and files
        others = {name: value for name, value in self._parameters.items() if name != "weight"}
        self._parameters.clear()
        self._parameters.update({"codebook": codebook, **others})
        self.register_buffer("codes_matrix", torch.zeros(shape_of_codes, dtype=CODES_DTYPE, device=weight.device))
        self.codebook_bits = check_codebook_bits(codebook_bits)
        self.has_scale = scale != 1 and codebook_bits == 16
        if self.has_scale:
            self.register_buffer("codebook_scale", torch.tensor(scale, dtype=torch.float32, device=weight.device))
        self.channels_last = False
        self._kept: KeptWeight | None = None
        self._seen: SeenCodes | None = None
        self._members: Members | None = None
        self._has_zeros = False
        self.keeps_weight = True

    @property
    def k(self) -> int:
        """Number of centroids."""
        return self.codebook.shape[0]

    @property
    def d(self) -> int:
        """Length of a subvector."""
        return self.codebook.shape[1]

    def set_codes(self, codebook: Tensor, codes: Tensor) -> None:
        """Copy a codebook (k, d) and codes (R*m,) or (R, m) in.

        Raises:
            ValueError: a shape does not fit, or a code is not below k.
        """
        if codebook.shape != self.codebook.shape or codes.numel() != self.codes_matrix.numel():
            raise ValueError(
                f"expected codebook {tuple(self.codebook.shape)} and {self.codes_matrix.numel()} codes, got "
                f"{tuple(codebook.shape)} and {codes.numel()}"
            )
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.k):
            raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} for {self.k} centroids")
        with torch.no_grad():
            self.codebook.copy_(codebook)
            self.codes_matrix.copy_(codes.reshape(self.codes_matrix.shape))
        self.forget()

    def forget(self) -> None:
        """Take codebook and codes as they are now: what was derived from them is made anew when it is needed."""
        self._kept = self._members = None
        watched = self.keeps_weight and is_ordinary(self.codes_matrix)
        self._seen = SeenCodes.of(self.codes_matrix) if watched else None
        codebook = self._parameters["codebook"]
        watch(codebook)
        if is_ordinary(codebook) and not self.codebook.is_meta:
            self._has_zeros = some_are_zero(self.codebook)

    def dequantize(self) -> Tensor:
        """The weight with the codebook as it is trained; differentiable with respect to the codebook.

        Raises:
            RuntimeError: the codes were averaged in place (see `SeenCodes`).
        """
        return self._dequantize(self.codebook)

    def dequantize_stored(self) -> Tensor:
        """The weight with the codebook as it comes back from a file; the gradient passes the rounding unchanged."""
        rounded = as_stored(self.codebook, self.codebook_bits, self._buffers.get("codebook_scale"))
        if torch.is_grad_enabled() or must_be_plain():  # what is traced with gradients is the same as without
            rounded = self.codebook + (rounded - self.codebook).detach()
        return self._dequantize(rounded)

    def stored_codebook(self) -> Tensor:
        """The codebook as a file stores it, (k, d) float16 or int8; times `stored_scale`, where there is one, it is the
        codebook."""
        return stored_values(self.codebook.detach(), self.codebook_bits, self._buffers.get("codebook_scale"))

    def stored_scale(self) -> Tensor | None:
        """() float32: what a file multiplies the stored codebook by; None: nothing."""
        return eight_bit_scale(self.codebook) if self.codebook_bits == 8 else self._buffers.get("codebook_scale")

    def _dequantize(self, codebook: Tensor) -> Tensor:
        if self._has_zeros:  # blocks that were pruned stay pruned
            codebook = torch.where((codebook == 0).all(1, keepdim=True), codebook.detach(), codebook)
        if must_be_plain() or not is_ordinary(codebook):
            # plain operators, which everything that follows operators understands
            subvectors = F.embedding(self.codes_matrix, codebook)
        else:
            self.check_codes()
            members = self.members() if torch.is_grad_enabled() and codebook.requires_grad else None
            subvectors = Dequantize.apply(codebook, self.codes_matrix.view(-1), members)
        weight = from_subvectors(subvectors, self.weight_shape, self.layout)
        if len(self.weight_shape) == 4 and self.channels_last:
            return weight.contiguous(memory_format=torch.channels_last)
        return weight

    def check_codes(self) -> None:
        """Notice codes that were changed since they were last seen.

        Raises:
            RuntimeError: by an average over buffers.
        """
        seen = self._seen
        if not (self.keeps_weight or self.training):  # nothing is held that was made from them, nor a copy of them
            self._seen = self._members = None
        elif seen is None or not seen.still(self.codes_matrix):
            if seen is not None:
                seen.check_change(self.codes_matrix, self.k)
            self._members = None
            self._seen = SeenCodes.of(self.codes_matrix)

    def members(self) -> Members:
        """The subvectors of each centroid, sorted when first asked for and again if the codes were replaced."""
        members = self._members
        if members is None:
            with torch.inference_mode(False), torch.no_grad():
                members = self._members = Members.of(self.codes_matrix.reshape(-1), self.k)
        return members

    @property
    def weight(self) -> Tensor:
        """The weight to compute with; it cannot be written into.

        Training: dequantized anew. Evaluation: dequantized from the codebook as a file stores it, so that what is
        measured is what is saved, and kept while codebook and codes do not change.
        """
        if torch.jit.is_scripting():
            as_trained = self.training or self.has_scale or self.codebook_bits == 8
            vectors = scripted_vectors(self.codebook, self.codes_matrix, as_trained, self.layout == "output")
            return vectors.view(self.weight_shape)
        else:
            return self.computed()

    @torch.jit.unused
    def computed(self) -> Tensor:
        """What `weight` returns, wherever the weight is read."""
        if must_be_plain() or not is_ordinary(self.codebook):
            return self.dequantize() if self.training else self.dequantize_stored()
        if self.training:
            self._kept = None
            return DequantizedWeight.of(self.dequantize())
        if torch.is_grad_enabled() and self.codebook.requires_grad:
            self._kept = None  # a step may follow, and fused optimizers count no versions
            return DequantizedWeight.of(self.dequantize_stored())
        if not self.keeps_weight:
            self._kept = None
            return DequantizedWeight.of(self.dequantize_stored())
        self.check_codes()
        kept, seen = self._kept, self._seen
        if kept is not None and kept.was_written_into():
            self._kept = None
            raise RuntimeError(f"a dequantized weight was written into: {ADVICE}")
        if kept is None or not kept.still(self.codebook, seen, self.channels_last):
            self._kept = None  # free the old one before the new one is made
            with torch.inference_mode(False), torch.no_grad():
                kept = KeptWeight.of(self.codebook, seen, self.channels_last, self.dequantize_stored())
            self._kept = kept
        return kept.weight

    def train(self, mode: bool = True) -> QuantizedLayer:
        """Set the mode; the kept weight is dropped."""
        self._kept = None
        super().train(mode)
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self.forget()

    def _apply(self, *arguments: Any, **options: Any) -> QuantizedLayer:
        super()._apply(*arguments, **options)
        self.forget()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(f"weight: {ADVICE}")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**plain_state(super()), "_kept": None, "_seen": None, "_members": None}  # which `forget` makes anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = {"codebook_bits": 16, "layout": "input", "keeps_weight": True}  # pickles of then do not say it
        super().__setstate__({**before, **state})
        self.forget()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self)._rebuild, (dense_type(self), ("weight",), False), self.__getstate__()

    def extra_repr(self) -> str:
        """What the module says of itself, and how its weight is quantized."""
        own = super().extra_repr()
        bits = "" if self.codebook_bits == 16 else f", codebook_bits={self.codebook_bits}"
        bits += "" if self.layout == "input" else f", layout={self.layout}"
        return f"{own}{', ' if own else ''}k={self.k}, d={self.d}, codes={tuple(self.codes_matrix.shape)}{bits}"


def plain_state(parent: Any) -> dict[str, Any]:
    """The state of a module as its own class gives it (before Python 3.11 objects have no method for it)."""
    return dict(parent.__getstate__() if hasattr(parent, "__getstate__") else parent.__self__.__dict__)


def dense_type(module: nn.Module) -> Any:
    """The class that a module had before one of its parameters was quantized."""
    return getattr(type(module), "_dense_type", type(module))


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a module has in a state dict besides codebook and codes, without the modules below it, by name."""
    skipped = set(module._non_persistent_buffers_set)
    if isinstance(module, QuantizedLayer):
        skipped |= {"codebook", "codes_matrix", "codebook_scale"}
    tensors = [*module._parameters.items(), *module._buffers.items()]
    return {name: tensor for name, tensor in tensors if tensor is not None and name not in skipped}


def share_codes(quantized: QuantizedLayer, twin: QuantizedLayer) -> None:
    """Tie two quantized weights that were one parameter."""
    quantized._parameters["codebook"] = twin._parameters["codebook"]
    quantized._buffers["codes_matrix"] = twin.codes_matrix
    if twin.has_scale:
        quantized._buffers["codebook_scale"] = twin.codebook_scale
    quantized.forget()


def set_memory_format(model: nn.Module, channels_last: bool) -> nn.Module:
    """Lay out the weights of 4-d convolutions, dequantized ones included, channels last or contiguous; in place."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module.channels_last = channels_last
            module._kept = None
    return model.to(memory_format=layout)
