"""Learning from a teacher: laws of the loss, of what it leaves alone, and of the stages that it compares."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model, mobilenet_v2, resnet18

from src.common.errors import SettingsError
from src.common.randomness import stream
from src.compression.finetune.distillation import (
    Distillation,
    DistillationSpec,
    check_stages,
    difference,
    divergence,
    find_stages,
    watching,
)
from src.compression.finetune.hooks import Resumed
from src.compression.finetune.loop import FinetuneSpec, finetune
from src.compression.finetune.optimizers import OptimizerSpec
from src.compression.finetune.task import StepLoss
from src.compression.finetune.teacher import fold_norms
from tests.compression.finetune.test_loop import Blobs, Notes
from tests.run.test_resume import CPU, Drops, Stops, StopsAt


def logits(seed: int, size: float = 3.0) -> Tensor:
    return torch.randn(5, 7, generator=stream(seed, "logits"), dtype=torch.float64) * size


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergence_is_its_formula_and_zero_for_equal_answers(temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    p, q = (torch.softmax(one / temperature, 1) for one in (teacher, student))
    wanted = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    assert float(divergence(student, teacher, temperature)) == pytest.approx(float(wanted), rel=1e-5)
    shifted = teacher + torch.arange(5)[:, None]  # softmax does not see it
    assert float(divergence(shifted, teacher, temperature)) == pytest.approx(0, abs=1e-6)


def test_gradients_do_not_shrink_with_the_temperature() -> None:
    """For a high T the gradient becomes (s - t) / N, both centred: it does not depend on T any more."""
    student, teacher = logits(0).requires_grad_(), logits(1)
    centred = (student - teacher) - (student - teacher).mean(1, keepdim=True)
    wanted = centred.detach() / 7 / 5
    for temperature in (100.0, 1000.0):
        (found,) = torch.autograd.grad(divergence(student, teacher, temperature), student)
        assert torch.allclose(found, wanted, rtol=0.1, atol=1e-2)


def test_the_difference_of_stages_is_a_share_of_their_square_whatever_their_scale() -> None:
    one, other = logits(0), logits(1)
    share = float((one - other).square().sum() / other.square().sum())
    for scale in (1e-3, 1.0, 1e3):
        stages = {"a": one * scale, "b": other}, {"a": other * scale, "b": other}
        assert float(difference(*stages)) == pytest.approx(share / 2, rel=1e-4)


def small(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


class Taught(Blobs):
    """Blobs whose loss is that of a distillation; labels may be wrong."""

    def __init__(self, learned: Distillation, wrong: bool = False) -> None:
        super().__init__()
        self.learned = learned
        if wrong:
            self.labels = (self.labels + 1) % 3

    def training_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> StepLoss:
        points, labels = batch
        with watching(model, self.learned.stages) as seen:
            found = model(points)
        loss, parts = self.learned.loss(points, found, seen, nn.functional.cross_entropy(found, labels))
        return StepLoss(loss, len(labels), parts)


def train(task: Blobs, model: nn.Module, epochs: int = 3, **more):
    how = FinetuneSpec(epochs, OptimizerSpec(learning_rate=0.02), log_every_n_steps=1, show_progress=False)
    notes = Notes()
    finetune(model, task, how, CPU, notes, **more)
    return notes


def test_without_weight_of_labels_wrong_ones_change_nothing_and_the_teachers_answers_are_learnt() -> None:
    teacher = small()
    train(Blobs(), teacher, epochs=6)
    students = [small(1) for _ in range(2)]
    for student, wrong in zip(students, (False, True), strict=True):
        torch.manual_seed(5)
        train(Taught(Distillation(copy.deepcopy(teacher), DistillationSpec()), wrong), student, epochs=6)
    assert all(torch.equal(value, students[1].state_dict()[name]) for name, value in students[0].state_dict().items())
    points = Blobs().points
    answers = [model.eval()(points).argmax(1) for model in (teacher, students[1])]
    assert float((answers[0] == answers[1]).float().mean()) > 0.95


def test_the_parts_add_up_with_their_weights() -> None:
    teacher, student = small(), small(1)
    spec = DistillationSpec(weight=0.7, temperature=3.0, labels=0.2, features=0.4, stages=("0", "2"))
    task = Taught(Distillation(teacher, spec))
    found = task.training_loss(student, (task.points, task.labels))
    parts = found.scalars
    weights = {"divergence": 0.7, "cross_entropy": 0.2, "feature_difference": 0.4}
    assert parts.keys() == weights.keys()
    total = sum(weights[name] * float(value) for name, value in parts.items())
    assert float(found.loss.detach()) == pytest.approx(total, rel=1e-6)
    assert all(not value.requires_grad for value in parts.values())


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    teacher = small()
    spec = DistillationSpec(features=1.0, stages=("0", "2"))
    task = Taught(Distillation(copy.deepcopy(teacher), spec))
    loss = task.training_loss(teacher.eval(), (task.points, task.labels)).loss
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)


def test_the_teacher_stays_as_it_is_and_is_in_no_checkpoint() -> None:
    teacher = small().train()
    before = copy.deepcopy(teacher.state_dict())
    spec = DistillationSpec(features=1.0, stages=("0",), labels=1.0)
    keeper, student = StopsAt(1), small(1)
    train(Taught(Distillation(teacher, spec)), student, epochs=1, keeper=keeper)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not teacher[0]._forward_hooks
    assert not student[0]._forward_hooks
    names = {name.partition(".")[2] for name in keeper.states[-1].tensors if name.startswith("model.")}
    assert names == set(student.state_dict())


def test_stages_of_a_network_that_an_engine_wraps_are_found_in_it() -> None:
    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    model, points = small().eval(), Blobs().points
    with watching(Wrapped(model), ["0", "2"]) as seen:
        Wrapped(model)(points)
    assert list(seen) == ["0", "2"]
    assert torch.equal(seen["0"], model[0](points))


def test_the_teachers_type_is_its_own() -> None:
    teacher, points = small(), Blobs().points
    exact, _ = Distillation(copy.deepcopy(teacher), DistillationSpec()).answers(points)
    rough, _ = Distillation(copy.deepcopy(teacher), DistillationSpec(), torch.bfloat16).answers(points)
    assert torch.equal(exact, teacher.eval()(points))
    assert rough.dtype == torch.bfloat16
    assert torch.allclose(exact, rough.float(), atol=0.05)
    assert not torch.equal(exact, rough.float())


@pytest.fixture
def image() -> Tensor:
    return torch.zeros(1, 3, 64, 64)


def test_stages_are_the_last_modules_before_maps_become_smaller(image: Tensor) -> None:
    assert find_stages(resnet18(), image) == ("layer1", "layer2", "layer3", "layer4")
    found = find_stages(mobilenet_v2(), image)
    assert found == ("features.3", "features.6", "features.13", "features")
    with pytest.raises(SettingsError, match=r"distillation.features: .*distillation.stages"):
        find_stages(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 4)), image)
    check_stages(resnet18(), ("layer1", "layer2.0.conv1"))
    with pytest.raises(SettingsError, match=r"distillation.stages: the network has no module 'layer9'; it has conv1,"):
        check_stages(resnet18(), ("layer1", "layer9"))


@pytest.mark.parametrize("at", [pytest.param(4, marks=pytest.mark.slow), 9])
def test_a_distilled_training_resumes_to_the_same_end(at: int) -> None:
    def run(keeper: StopsAt, resumed: Resumed | None) -> tuple[nn.Module, Notes]:
        teacher, model, notes = Drops(), Drops(), Notes()
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(1.5)
        torch.manual_seed(1 if resumed is None else 99)
        spec = DistillationSpec(labels=0.3, features=0.5, stages=("body.0", "body.5"))
        how = FinetuneSpec(3, log_every_n_steps=1, checkpoint_every_n_steps=1, show_progress=False)
        finetune(model, Taught(Distillation(teacher, spec)), how, CPU, notes, keeper=keeper, resumed=resumed)
        return model, notes

    model, notes = run(StopsAt(1), None)
    keeper = StopsAt(1, at)
    with pytest.raises(Stops):
        run(keeper, None)
    again, notes_again = run(StopsAt(1), Resumed(keeper.states[-1]))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert all(notes.figures[step]["loss"] == figures["loss"] for step, figures in notes_again.figures.items())


class Normed(nn.Module):
    """Norms that may be folded and norms that may not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.read_twice, self.second_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.shared, self.third_norm = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8)
        self.batch_only = nn.BatchNorm2d(8, track_running_stats=False)
        self.plain = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_norm(self.first(x)).relu()
        both = self.read_twice(x)
        x = both + self.second_norm(both)
        x = self.third_norm(self.shared(x)) + self.shared(x)
        return self.head(self.plain(self.batch_only(x)).mean((2, 3)))


def trained_a_little(model: nn.Module, side: int = 16) -> nn.Module:
    """With statistics of its own in every norm."""
    model.train()
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _ in range(3):
            model(2 * torch.randn(8, 3, side, side, generator=draw) + 1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(0.5, 2, generator=draw)
                module.bias.normal_(generator=draw)
    return model.eval()


def test_norms_of_a_teacher_are_folded_only_where_they_alone_read_a_convolution() -> None:
    torch.manual_seed(0)
    model, x = trained_a_little(Normed()), torch.randn(4, 3, 16, 16)
    wanted = model(x)
    assert fold_norms(model) == 2
    assert isinstance(model.first_norm, nn.Identity)
    assert isinstance(model.plain[1], nn.Identity)
    assert isinstance(model.second_norm, nn.BatchNorm2d)
    assert isinstance(model.third_norm, nn.BatchNorm2d)
    assert torch.allclose(model(x), wanted, rtol=1e-4, atol=1e-5)


def test_a_teacher_whose_way_depends_on_its_inputs_stays_as_it_is() -> None:
    class Branching(Normed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.mean() > 0 else -x)

    torch.manual_seed(0)
    model, x = trained_a_little(Branching()), torch.randn(4, 3, 16, 16)
    wanted, state = model(x), copy.deepcopy(model.state_dict())
    assert fold_norms(model) == 0
    assert torch.equal(model(x), wanted)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "densenet121"])
def test_a_fast_teacher_gives_the_same_answers_and_stages(arch: str) -> None:
    torch.manual_seed(0)
    teacher = trained_a_little(get_model(arch, weights=None, num_classes=7), 64)
    x = torch.randn(2, 3, 64, 64)
    stages = find_stages(teacher, x)
    learned = Distillation(teacher, DistillationSpec(features=1.0, stages=stages))
    before, seen = learned.answers(x)
    learned.make_fast()
    after, seen_after = learned.answers(x)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert sum(isinstance(module, nn.Identity) for module in teacher.modules()) >= 15
    for old, new in [(before, after), *((seen[name], seen_after[name]) for name in seen)]:
        assert torch.allclose(old, new, rtol=1e-3, atol=1e-3 * float(old.abs().max()))
