"""Learning from the dense network (Hinton et al. 2015): its answers to the same images instead of labels, or beside
them. The paper fine-tunes with labels alone (section 3.4).

loss = weight * T^2 * KL(softmax(t / T) || softmax(s / T)) + labels * (the task's own loss) + features * (what the
outputs of some stages differ), where t and s are the logits of the teacher and of the network that is trained.

Shapes: B images, N classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...common.errors import SettingsError
from .task import evaluating
from .teacher import fold_norms

N_STAGES = 4
"""Stages that `find_stages` gives, at most: those of a ResNet."""


@dataclass(frozen=True)
class DistillationSpec:
    """How much of what is learnt from a teacher; the names are those of the settings.

    Attributes:
        weight: of the divergence from the teacher's answers.
        temperature: T above.
        labels: weight of the task's own loss.
        features: weight of the difference of the stages' outputs; 0: they are not looked at.
        stages: names of the modules whose outputs count.
    """

    weight: float = 1.0
    temperature: float = 2.0
    labels: float = 0.0
    features: float = 0.0
    stages: tuple[str, ...] = ()


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL of the answers softmax(student / T) from softmax(teacher / T), mean over images, in float32.

    T^2 keeps the gradient as large as that of a cross entropy, whatever T is.

    Args:
        student, teacher: logits (B, N).
        temperature: T, above 0; the larger, the more the answers count that the teacher thinks unlikely.
    """
    own = functional.log_softmax(student.float() / temperature, dim=1)
    wanted = functional.log_softmax(teacher.float() / temperature, dim=1)
    return functional.kl_div(own, wanted, reduction="batchmean", log_target=True) * temperature**2


def difference(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """The squared difference of the outputs of stages, as a share of the teacher's own square; mean over stages."""
    shares = [
        functional.mse_loss(student[name].float(), wanted.float()) / wanted.float().square().mean().clamp(min=1e-12)
        for name, wanted in teacher.items()
    ]
    return torch.stack(shares).mean()


class Distillation:
    """A loss that pulls a network towards a teacher.

    The teacher is not part of the network that is trained: no gradients, no checkpoint, not shared out to processes,
    each of which has its own.

    Args:
        teacher: changed in place: to evaluation mode, without gradients. On the device of the training.
        spec: what counts how much.
        amp: type of the teacher's forward pass, whatever that of the trained network is; None: float32.
    """

    def __init__(self, teacher: nn.Module, spec: DistillationSpec, amp: torch.dtype | None = None) -> None:
        self.teacher, self.spec, self.amp = teacher.eval().requires_grad_(False), spec, amp

    def make_fast(self) -> None:
        """Let the teacher's forward pass take less time; what it computes stays, up to rounding. It can then no longer
        be permuted, nor loaded into."""
        fold_norms(self.teacher)
        for parameter in self.teacher.parameters():
            if parameter.dim() == 4 and parameter.device.type == "cpu":  # where convolutions are a fifth faster so
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the modules whose outputs the loss has to be given."""
        return self.spec.stages if self.spec.features else ()

    def loss(
        self, inputs: Tensor, logits: Tensor, seen: Mapping[str, Tensor], own: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts for the log.

        Args:
            inputs: images (B, 3, H, W).
            logits: what the trained network made of them (B, N).
            seen: the outputs of its `stages`, by name.
            own: the task's own loss; None where it does not count.
        """
        wanted, stages = self.answers(inputs)
        kl = divergence(logits, wanted, self.spec.temperature)
        total, parts = self.spec.weight * kl, {"divergence": kl.detach()}
        if own is not None and self.spec.labels:
            total, parts["cross_entropy"] = total + self.spec.labels * own, own.detach()
        if self.stages:
            differ = difference(seen, stages)
            total, parts["feature_difference"] = total + self.spec.features * differ, differ.detach()
        return total, parts

    @torch.no_grad()
    def answers(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's logits (B, N), and the outputs of its stages by name."""
        autocast = torch.autocast(inputs.device.type, dtype=self.amp, enabled=self.amp is not None)
        with watching(self.teacher, self.stages) as seen, autocast:
            logits = self.teacher(inputs)
        return logits, dict(seen)


@contextmanager
def watching(model: nn.Module, names: Sequence[str]) -> Iterator[Mapping[str, Tensor]]:
    """The outputs of the modules `names` of `model`, by name, filled by each forward pass meanwhile.

    An engine may have wrapped the network: it then is the only module in another one, called `module`.
    """
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda _module, _inputs, output: seen.__setitem__(name, output)

    inner: Any = model
    if names and not _has(model, names[0]):
        inner = model.module
    hooks = [inner.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def find_stages(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Names of the modules after which maps become smaller: of each size but 1x1 the last one of the outermost.

    Args:
        model: on the CPU; comes back as it was.
        example: images (B, 3, H, W).

    Raises:
        SettingsError: there are none.
    """
    last: dict[tuple[int, ...], str] = {}

    def note(name: str) -> Any:
        def remember(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and output.shape[-2:].numel() > 1:
                size = tuple(output.shape[-2:])
                if size not in last or name.count(".") <= last[size].count("."):
                    last.pop(size, None)
                    last[size] = name

        return remember

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    if not last:
        raise SettingsError(
            "distillation.features: this network has no maps that become smaller from stage to stage; name the modules "
            "whose outputs are compared with distillation.stages"
        )
    return tuple(last.values())[-N_STAGES:]


def check_stages(model: nn.Module, names: Sequence[str]) -> None:
    """Check that `model` has modules of these names.

    Raises:
        SettingsError: it does not; lists some that it has.
    """
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            outer = ", ".join([one for one in known if one.count(".") == 0][:20])
            raise SettingsError(f"distillation.stages: the network has no module {name!r}; it has {outer}, and more")
