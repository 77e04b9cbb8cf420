"""A reader of Core ML packages, made for the tests: weights decoded from the bytes, and the program run with PyTorch.

Only the program itself is parsed with coremltools' protocol buffers. Core ML cannot be run here, so what it would
compute is computed by the same operations in PyTorch, in 32-bit floats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

Array = np.ndarray[Any, Any]
TYPES = {
    10: np.float16,
    11: np.float32,
    12: np.float64,
    21: np.int8,
    22: np.int16,
    23: np.int32,
    31: np.uint8,
    32: np.uint16,
    1: np.bool_,
}
"""Of the program, by its number there."""
UNSIGNED_BITS = {35: 4, 36: 2, 37: 1, 38: 6, 39: 3, 31: 8}
"""Of codes, by the number of their type (UINT4, UINT2, UINT1, UINT6, UINT3, UINT8)."""
SENTINEL = 0xDEADBEEF


class Package:
    """What a package holds."""

    def __init__(self, path: Path) -> None:
        from coremltools.proto import Model_pb2

        data = path / "Data" / "com.apple.CoreML"
        self.spec = Model_pb2.Model()
        self.spec.ParseFromString((data / "model.mlmodel").read_bytes())
        self.blob = (data / "weights" / "weight.bin").read_bytes()
        function = self.spec.mlProgram.functions["main"]
        (block,) = function.block_specializations.values()
        self.operations = list(block.operations)
        self.result = block.outputs[0]
        self.by_output = {op.outputs[0].name: op for op in self.operations}
        self.values: dict[str, Any] = {}

    def types(self) -> list[str]:
        return [op.type for op in self.operations]

    def of_type(self, kind: str) -> list[Any]:
        return [op for op in self.operations if op.type == kind]

    def given(self, op: Any, name: str) -> Any:
        """The value of an operation's input; None where it has none."""
        if name not in op.inputs:
            return None
        argument = op.inputs[name].arguments[0]
        return self.value(argument.name) if argument.WhichOneof("binding") == "name" else self.constant(argument.value)

    def value(self, name: str) -> Any:
        if name not in self.values:
            self.values[name] = self.compute(self.by_output[name])
        return self.values[name]

    def constant(self, value: Any) -> Any:
        kind = value.type.tensorType
        shape = [dimension.constant.size for dimension in kind.dimensions]
        if value.WhichOneof("value") == "blobFileValue":
            found = self.from_blob(value.blobFileValue.offset, kind.dataType, int(np.prod(shape)))
            return found.reshape(shape)
        tensor = value.immediateValue.tensor
        which = tensor.WhichOneof("value")
        if which == "bytes":
            return np.frombuffer(tensor.bytes.values, TYPES[kind.dataType]).reshape(shape)
        found = list(getattr(tensor, which).values)
        if which == "strings":
            return found[0]
        return np.array(found).reshape(shape)

    def from_blob(self, offset: int, kind: int, n: int) -> Array:
        """Values of a blob: 64 bytes say where they are, and codes of less than a byte lie one after the other, the
        first in the lowest bits."""
        sentinel, _ = np.frombuffer(self.blob, "<u4", 2, offset)
        assert sentinel == SENTINEL
        size, start = (int(number) for number in np.frombuffer(self.blob, "<u8", 2, offset + 8))
        raw = np.frombuffer(self.blob, np.uint8, size, start)
        bits = UNSIGNED_BITS.get(kind, 8)
        if bits == 8:
            return np.frombuffer(raw.tobytes(), TYPES[kind], n)
        single = np.unpackbits(raw, bitorder="little")[: n * bits].reshape(n, bits)
        return (single * (1 << np.arange(bits))).sum(1).astype(np.uint8)

    def decoded(self) -> dict[str, Array]:
        """What every `constexpr_lut_to_dense` stands for, by its name, reshaped where that follows."""
        found = {}
        for op in self.of_type("constexpr_lut_to_dense"):
            name = op.outputs[0].name
            after = [o for o in self.of_type("reshape") if o.inputs["x"].arguments[0].name == name]
            found[name] = self.value(after[0].outputs[0].name if after else name)
        return found

    def compute(self, op: Any) -> Any:
        if op.type == "const":
            return self.constant(op.attributes["val"])
        return getattr(self, f"_{op.type}")(op)

    def run(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of one image (1, 3, S, S)."""
        self.values = {"images": images.numpy()}
        return torch.from_numpy(np.array(self.value(self.result), np.float32))

    # --- operations ---

    def _constexpr_lut_to_dense(self, op: Any) -> Array:
        codes, table = self.given(op, "indices"), self.given(op, "lut")
        axis = int(self.given(op, "vector_axis"))
        size = table.shape[-1]
        assert table.shape[:-2] == (1,) * codes.ndim
        vectors = table.reshape(-1, size)[codes]  # (..., d)
        moved = np.moveaxis(vectors, -1, axis + 1)
        return moved.reshape(*codes.shape[:axis], codes.shape[axis] * size, *codes.shape[axis + 1 :])

    def _constexpr_blockwise_shift_scale(self, op: Any) -> Array:
        assert "offset" not in op.inputs
        scale = self.given(op, "scale")
        return self.given(op, "data").astype(scale.dtype) * scale

    def _reshape(self, op: Any) -> Array:
        return self.given(op, "x").reshape([int(n) for n in self.given(op, "shape")])

    def _transpose(self, op: Any) -> Array:
        return self.given(op, "x").transpose([int(n) for n in self.given(op, "perm")])

    def _cast(self, op: Any) -> Array:
        kind = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32, "uint16": np.uint16, "int16": np.int16}
        return self.given(op, "x").astype(kind[self.given(op, "dtype")])

    def _wide(self, op: Any, name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self.given(op, name), np.float32))

    def _conv(self, op: Any) -> Array:
        x, weight = self._wide(op, "x"), self._wide(op, "weight")
        bias = self._wide(op, "bias") if "bias" in op.inputs else None
        kind = self.given(op, "pad_type")
        pad = [int(n) for n in self.given(op, "pad")] if kind == "custom" else [0, 0, 0, 0]
        assert kind in ("custom", "valid")
        x = F.pad(x, (pad[2], pad[3], pad[0], pad[1]))
        strides = [int(n) for n in self.given(op, "strides")]
        dilations = [int(n) for n in self.given(op, "dilations")]
        return F.conv2d(x, weight, bias, strides, 0, dilations, int(self.given(op, "groups"))).numpy()

    def _batch_norm(self, op: Any) -> Array:
        mean, variance, gamma, beta = (self._wide(op, name) for name in ("mean", "variance", "gamma", "beta"))
        return F.batch_norm(
            self._wide(op, "x"), mean, variance, gamma, beta, eps=float(self.given(op, "epsilon"))
        ).numpy()

    def _max_pool(self, op: Any) -> Array:
        pad = [int(n) for n in self.given(op, "pad")]
        x = F.pad(self._wide(op, "x"), (pad[2], pad[3], pad[0], pad[1]), value=-np.inf)
        return F.max_pool2d(
            x, [int(n) for n in self.given(op, "kernel_sizes")], [int(n) for n in self.given(op, "strides")]
        ).numpy()

    def _reduce_mean(self, op: Any) -> Array:
        return (
            self.given(op, "x")
            .astype(np.float32)
            .mean(tuple(int(n) for n in self.given(op, "axes")), keepdims=bool(self.given(op, "keep_dims")))
        )

    def _relu(self, op: Any) -> Array:
        return np.maximum(self.given(op, "x"), 0)

    def _clip(self, op: Any) -> Array:
        return np.clip(self.given(op, "x"), self.given(op, "alpha"), self.given(op, "beta"))

    def _relu6(self, op: Any) -> Array:
        return np.clip(self.given(op, "x"), 0, 6)

    def _add(self, op: Any) -> Array:
        return self.given(op, "x").astype(np.float32) + self.given(op, "y").astype(np.float32)

    def _conv_transpose(self, op: Any) -> Array:
        x, weight, bias = (self._wide(op, name) for name in ("x", "weight", "bias"))
        assert self.given(op, "pad_type") == "custom"
        assert not self.given(op, "pad").any()
        return F.conv_transpose2d(x, weight, bias, [int(n) for n in self.given(op, "strides")]).numpy()

    def _linear(self, op: Any) -> Array:
        return F.linear(self._wide(op, "x"), self._wide(op, "weight"), self._wide(op, "bias")).numpy()

    def _matmul(self, op: Any) -> Array:
        x, y = self._wide(op, "x"), self._wide(op, "y")
        x = x.transpose(-1, -2) if self.given(op, "transpose_x") else x
        return (x @ (y.transpose(-1, -2) if self.given(op, "transpose_y") else y)).numpy()
