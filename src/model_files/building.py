"""From the tensors of a file to a network: built from shapes alone, checked, and only then given memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..architectures.structure import shapes_of, with_memory, without_weights
from ..compression.quantize.compress import build_quantized
from ..compression.quantize.plan import Plan
from .state_dict import check_state, load_state


def build_and_load(
    build: Callable[[], nn.Module],
    plan: Callable[[nn.Module], Plan] | None,
    state: Mapping[str, Tensor],
    source: str,
    check: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """The network that a file holds, in evaluation mode, on the CPU; nothing is clustered.

    Args:
        build: makes the dense network.
        plan: dense network -> which of its layers are quantized; None: none.
        state: the file's tensors.
        source: the file, for messages.
        check: checks the dense network before its layers are replaced.

    Raises:
        CheckpointError: the file does not fit the network. Nothing of the network's size has been allocated then, so
            that a forged number of classes costs nothing.
    """
    model = without_weights(build)
    if check is not None:
        check(model)
    if plan is not None:
        model = build_quantized(model, plan(model))
    check_state(model, state, source)
    model = with_memory(model).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    load_state(model, state, source)
    return model


def fill(model: nn.Module, plan: Plan, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """Put the tensors of a file into a dense network, in place; it is in evaluation mode then.

    Args:
        model: on any device.
        plan: which of its weights are quantized in the file, and how.
        state: the file's tensors.
        source: the file, for messages.

    Raises:
        CheckpointError: they do not fit; the network is as it was.
    """
    check_state(build_quantized(shapes_of(model), plan), state, source)
    model = build_quantized(model, plan)
    load_state(model, state, source)
    return model.eval()
