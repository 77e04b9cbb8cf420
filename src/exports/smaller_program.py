"""What makes an ML program smaller, and as exact as 16-bit floats let it be, before coremltools folds it.

The operations are made by coremltools' builder, which is handed in: one file imports the package.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

SMALL = 100
"""Values of a constant from which on coremltools itself stores equal ones once."""


def replace(function: Any, old: Any, new: Any) -> None:
    """Let the variable `new` be used in place of what the operation `old` gives, which goes."""
    function.replace_uses_of_var_after_op(anchor_op=old, old_var=old.outputs[0], new_var=new, force_replace=True)
    function.remove_ops([old])


def norms_in_two(function: Any, builder: Any, place_of: Callable[[Any], AbstractContextManager[Any]]) -> None:
    """Give batch norms mean 0 and variance 1, in place: two vectors instead of four, rounded to 16 bits once and not
    thrice.

    Args:
        function: of an ML program.
        builder: makes operations.
        place_of: an operation -> a context in which new ones belong to the same part of the network.
    """
    with function:
        norms = [op for op in function.operations if op.op_type == "batch_norm"]
        for number, norm in enumerate(norms):
            mean, variance = np.float64(norm.mean.val), np.float64(norm.variance.val)
            epsilon = float(norm.epsilon.val)
            factor = (1.0 if norm.gamma is None else np.float64(norm.gamma.val)) / np.sqrt(variance + epsilon)
            summand = (0.0 if norm.beta is None else np.float64(norm.beta.val)) - mean * factor
            with place_of(norm):
                new = builder.batch_norm(
                    x=norm.x,
                    mean=np.zeros(mean.shape, np.float32),
                    variance=np.ones(mean.shape, np.float32),
                    gamma=np.float32(factor * np.sqrt(1 + epsilon)),
                    beta=np.float32(summand),
                    epsilon=norm.epsilon,
                    name=f"norm_{number}",
                    before_op=norm,
                )
            replace(function, norm, new)


def small_constants_once(function: Any) -> None:
    """Let equal small constants, such as the strides of all convolutions, be one, in place."""
    first: dict[object, Any] = {}
    for constant in [op for op in function.operations if op.op_type == "const"]:
        variable = constant.outputs[0]
        value = np.asarray(variable.val)
        if value.size >= SMALL or variable in function.outputs or not variable.child_ops:
            continue
        key = (str(variable.sym_type), value.shape, value.dtype.str, value.tobytes())
        if key in first:
            replace(function, constant, first[key])
        else:
            first[key] = variable
