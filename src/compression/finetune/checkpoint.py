"""The whole state of a training: everything that the next step depends on, so that it can resume as if it had never
stopped."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...common.errors import CheckpointError, RunError
from ...engines.engine import Engine
from .average import MovingAverage
from .optimizers import Schedule
from .outcome import Outcome

MODEL, OPTIMIZER, STATISTICS, AVERAGE = "model.", "optimizer.", "statistics.", "average."
CODES = "codes_matrix"


@dataclass(frozen=True)
class Position:
    """How far a training has come.

    Attributes:
        epoch: epochs trained to their end.
        batch: batches of the next epoch that are done.
        validated: whether the metrics after `epoch` epochs are known.
        step: batches in all, as logs count steps.
    """

    epoch: int = 0
    batch: int = 0
    validated: bool = False
    step: int = 0

    def __str__(self) -> str:
        if self.batch:
            return f"in epoch {self.epoch + 1}, after batch {self.batch}"
        done = f"after epoch {self.epoch}" if self.epoch else "before training"
        return done if self.validated else f"{done}, before the validation there"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training as named tensors on the CPU and as values that JSON can hold."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]

    @property
    def position(self) -> Position:
        """Where the training stood."""
        return Position(**self.values["position"])


@dataclass
class Training:
    """What changes while a network is trained.

    Attributes:
        model: the network itself, not as an engine wraps it.
        optimizer: over its parameters.
        schedule: of the optimizer.
        scaler: of the loss.
        average: of what the network was; None: it is not taken.
        position: how far it has come.
        outcome: what it reached so far.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    average: MovingAverage | None = None
    position: Position = field(default_factory=Position)
    outcome: Outcome = field(default_factory=Outcome)


def take(training: Training, engine: Engine) -> Checkpoint:
    """The state of `training`; all processes must call this, each brings its random states and running statistics.

    Raises:
        RunError: a value of the network is not finite, so that there is nothing worth saving.
    """
    tensors = {}
    trained = dict(training.model.named_parameters(remove_duplicate=False))
    for name, tensor in training.model.state_dict().items():
        # a buffer may hold an infinity on purpose (masks do)
        if bool((~torch.isfinite(tensor) if name in trained else torch.isnan(tensor)).any()):
            raise RunError(f"{name} holds values that are no numbers; the checkpoint saved before is kept")
        small = name.rpartition(".")[2] == CODES and _is_of_bytes(tensor)
        tensors[MODEL + name] = (tensor.to(torch.uint8) if small else tensor).detach().cpu().clone()
    numbers: dict[str, dict[str, Any]] = {}
    saved = training.optimizer.state_dict()
    for index, state in saved["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{OPTIMIZER}{index}.{key}"] = value.detach().cpu().clone()
            else:
                numbers.setdefault(str(index), {})[key] = value
    if engine.world_size > 1:
        for rank in range(engine.world_size):
            own = _statistics(training)
            engine.broadcast([own], rank)
            tensors[f"{STATISTICS}{rank}"] = own.cpu()
    if training.average is not None:
        tensors |= {f"{AVERAGE}{name}": tensor.cpu().clone() for name, tensor in training.average.values.items()}
    groups = [{key: group[key] for key in ("lr", "initial_lr") if key in group} for group in saved["param_groups"]]
    values: dict[str, Any] = {
        "position": asdict(training.position),
        "outcome": training.outcome.as_values(),
        "schedule": training.schedule.state(),
        "scaler": training.scaler.state_dict(),
        "optimizer": {"numbers": numbers, "groups": groups},
        "processes": engine.gather([_random_states(engine.device)]),
    }
    if training.average is not None:
        values["averaged steps"] = training.average.steps
    return Checkpoint(tensors, values)


def _is_of_bytes(tensor: Tensor) -> bool:
    """Whether a byte holds every value; of a user's tensor too, which may bear the name of codes."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or not tensor.numel():
        return False
    return int(tensor.min()) >= 0 and int(tensor.max()) < 256


def restore(checkpoint: Checkpoint, training: Training, position: Position, *, same_schedule: bool = True) -> None:
    """Put a checkpoint into `training`, which was made with the same settings, before an engine wraps it.

    Args:
        checkpoint: from `take`.
        training: changed in place.
        position: the checkpoint's own, or where else to resume.
        same_schedule: False: the learning rate is that of the new schedule at this position, as if it had been so from
            the start.

    Raises:
        CheckpointError: it is that of another network or optimizer, or damaged.
    """
    try:
        own = training.model.state_dict()
        found = {
            name.removeprefix(MODEL): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(MODEL)
        }
        if {name: tensor.shape for name, tensor in own.items()} != {
            name: tensor.shape for name, tensor in found.items()
        }:
            raise CheckpointError("resume: the checkpoint is that of another network")
        training.model.load_state_dict(found)
        _restore_optimizer(checkpoint, training.optimizer)
        if training.average is not None:
            training.average.steps = int(checkpoint.values["averaged steps"])
            for name, average in training.average.values.items():
                average.copy_(checkpoint.tensors[AVERAGE + name])
        training.position = position
        training.outcome = Outcome.of_values(checkpoint.values["outcome"])
        if same_schedule:
            training.schedule.load(checkpoint.values["schedule"])
            for group, rates in zip(
                training.optimizer.param_groups, checkpoint.values["optimizer"]["groups"], strict=True
            ):
                group.update(rates)
        else:
            training.schedule.go_to(position.step, position.epoch)
        if training.scaler.is_enabled() and checkpoint.values["scaler"]:
            training.scaler.load_state_dict(checkpoint.values["scaler"])
    except CheckpointError:
        raise
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise _unfit(error) from error


def _unfit(error: Exception) -> CheckpointError:
    return CheckpointError(f"resume: the checkpoint does not fit this run ({type(error).__name__}: {error})")


def restore_own(checkpoint: Checkpoint, training: Training, engine: Engine) -> None:
    """Put back what each process has of its own: random states and running statistics; after an engine has wrapped the
    network.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    try:
        rows = checkpoint.values["processes"]
        statistics = checkpoint.tensors.get(f"{STATISTICS}{engine.rank}")
        if statistics is not None and len(rows) == engine.world_size:
            place = 0
            for buffer in _moving(training):
                buffer.copy_(statistics[place : place + buffer.numel()].view(buffer.shape))
                place += buffer.numel()
        _set_random_states(rows[engine.rank % len(rows)], engine.device)
    except (KeyError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise _unfit(error) from error


def _moving(training: Training) -> list[Tensor]:
    own = [buffer for buffer in training.model.buffers() if buffer.is_floating_point()]
    return own if training.average is None else own + training.average.statistics


def _statistics(training: Training) -> Tensor:
    """All running statistics one after the other, in double precision, which holds them exactly."""
    parts = [buffer.detach().reshape(-1).double() for buffer in _moving(training)]
    return torch.cat(parts) if parts else torch.zeros(1, dtype=torch.float64)


def _restore_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(OPTIMIZER):
            index, _, key = name.removeprefix(OPTIMIZER).partition(".")
            state.setdefault(int(index), {})[key] = tensor
    for index, numbers in checkpoint.values["optimizer"]["numbers"].items():
        state.setdefault(int(index), {}).update(numbers)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _random_states(device: torch.device) -> dict[str, Any]:
    """Of every generator that a library may draw from in this process."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 (it is other libraries' generator)
    states = {
        "torch": _text(torch.get_rng_state().numpy().tobytes()),
        "python": [version, _text(np.array(words, dtype=np.uint32).tobytes()), gauss],
        "numpy": [_text(np.asarray(keys, dtype=np.uint32).tobytes()), int(position), int(has_gauss), float(cached)],
    }
    if device.type == "cuda":
        states["cuda"] = _text(torch.cuda.get_rng_state(device).numpy().tobytes())
    elif device.type == "mps":
        states["mps"] = _text(torch.mps.get_rng_state().numpy().tobytes())
    return states


def _set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(_bytes(states["torch"]))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(np.frombuffer(base64.b64decode(words), dtype=np.uint32).tolist()), gauss))
    keys, position, has_gauss, cached = states["numpy"]
    state = ("MT19937", np.frombuffer(base64.b64decode(keys), dtype=np.uint32), position, has_gauss, cached)
    np.random.set_state(state)  # noqa: NPY002
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_bytes(states["cuda"]), device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(_bytes(states["mps"]))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
