"""Running out of memory is told from other errors, and becomes one message."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from src.common.errors import RunError
from src.common.memory import is_out_of_memory, named_when_out_of_memory

TOO_MANY = 1 << 50
"""Bytes that no machine has, nor addresses for them."""


def test_what_torch_and_numpy_raise_is_known() -> None:
    for make in (lambda: torch.empty(TOO_MANY, dtype=torch.uint8), lambda: np.empty(TOO_MANY, dtype=np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            make()
        assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    for error in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        OSError(28, "x"),
    ):
        assert not is_out_of_memory(error)


def test_it_becomes_an_error_of_the_machine_that_says_where() -> None:
    with pytest.raises(RunError, match=r"^out of memory on a\.png\. What was saved is kept\. .*allocate") as caught:  # noqa: SIM117
        with named_when_out_of_memory(lambda: "on a.png."):
            torch.empty(TOO_MANY, dtype=torch.uint8)
    assert caught.value.status == 1
    assert "\n" not in str(caught.value)


def test_other_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("another"), ValueError("out of memory"), KeyError("x")):
        with pytest.raises(type(error)) as caught, named_when_out_of_memory(pytest.fail):
            raise error
        assert caught.value is error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_runs_out_of_memory_too() -> None:
    with pytest.raises(RunError, match=r"on a\.png\. What was saved is kept\. .CUDA out of memory"):  # noqa: SIM117
        with named_when_out_of_memory(lambda: "on a.png."):
            torch.empty(TOO_MANY, dtype=torch.uint8, device="cuda")
