"""Laws of the training loop, the optimizers and the schedules, on a tiny real task."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.common.errors import RunError
from src.common.randomness import stream
from src.compression.finetune.checkpoint import Checkpoint
from src.compression.finetune.gradients import GradientWatch
from src.compression.finetune.hooks import Resumed
from src.compression.finetune.loop import FinetuneSpec, Outcome, finetune
from src.compression.finetune.optimizers import OptimizerSpec, Schedule, ScheduleSpec, make_optimizer
from src.compression.finetune.task import StepLoss, evaluating
from src.compression.quantize.layers import QuantizedLayer
from src.engines.launch import Launch
from src.engines.single import SingleProcess
from src.model_files.pth import read_tensors, save_compressed
from src.model_files.state_dict import load_state
from tests.support.helpers import quantized, spec


class Blobs:
    """Three separable clouds of points in 16 dimensions."""

    metric_name = "accuracy"
    steps_per_epoch = 6
    position = 0

    def __init__(self, seed: int = 0, spoil_at: int | None = None) -> None:
        draw = stream(0, "blobs")
        centres = torch.randn(3, 16, generator=draw) * 2
        self.labels = torch.arange(96) % 3
        self.points = centres[self.labels] + torch.randn(96, 16, generator=draw) * 0.5
        self.seed = seed
        self.spoil_at = spoil_at
        self.steps = 0
        self.modes: list[bool] = []

    def training_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(96, generator=stream(self.seed, "order", epoch))
        self.position = start
        for part in order.chunk(self.steps_per_epoch)[start:]:
            self.position += 1
            yield self.points[part], self.labels[part]

    def in_words(self, batch: tuple[Tensor, Tensor]) -> str:
        return f"on {len(batch[1])} points of batch {self.position}."

    def training_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> StepLoss:
        self.steps += 1
        self.modes.append(model.training)
        points, labels = batch
        logits = model(points)
        loss = F.cross_entropy(logits, labels)
        if self.steps == self.spoil_at:
            loss = loss * float("nan")
        return StepLoss(loss, len(labels), {"accuracy": (logits.argmax(1) == labels).float().mean()})

    def validate(self, model: nn.Module, label: str) -> dict[str, float]:  # noqa: ARG002 (of a protocol)
        with evaluating(model), torch.no_grad():
            logits = model(self.points)
        return {
            "accuracy": 100 * float((logits.argmax(1) == self.labels).float().mean()),
            "loss": float(F.cross_entropy(logits, self.labels)),
        }


class Notes:
    """A recorder that writes models to a folder and everything else into a list."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.events: list[tuple] = []
        self.rates: dict[int, float] = {}
        self.figures: dict[int, dict[str, float]] = {}

    def step(self, step: int, figures: dict[str, float]) -> None:
        self.events.append(("step", step))
        self.rates[step] = figures["learning_rate"]
        self.figures[step] = figures

    def validation(self, epoch: int, step: int, metrics: dict[str, float]) -> None:  # noqa: ARG002 (of a protocol)
        self.events.append(("validation", epoch, step))

    def model(self, epoch: int, model: nn.Module) -> None:
        self.events.append(("model", epoch))
        self._keep(f"{epoch}", model)

    def best(self, epoch: int, model: nn.Module) -> None:
        self.events.append(("best", epoch))
        self._keep("best", model)

    def _keep(self, name: str, model: nn.Module) -> None:
        if self.folder is not None:
            save_compressed(model, self.folder / f"{name}.pth")


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    return quantized(model, spec(8, ignored=["5"]))


def run(
    model: nn.Module,
    task: Blobs,
    recorder: Notes,
    epochs: int = 3,
    schedule: ScheduleSpec | None = None,
    lr: float = 0.01,
    **options,
) -> Outcome:
    how = FinetuneSpec(
        epochs=epochs,
        optimizer=OptimizerSpec("adam", lr),
        lr_scheduler=schedule or ScheduleSpec(),
        show_progress=False,
        **options,
    )
    return finetune(model, task, how, SingleProcess(Launch(), torch.device("cpu")), recorder)


def test_the_order_of_saving_validating_and_training() -> None:
    recorder = Notes()
    outcome = run(network(), Blobs(), recorder, epochs=2, log_every_n_steps=3)
    best = {epoch for kind, epoch, *_ in recorder.events if kind == "best"}
    wanted: list[tuple] = [("model", 0), ("validation", 0, 0), ("best", 0)]
    wanted += [
        ("step", 1),
        ("step", 3),
        ("step", 6),
        ("model", 1),
        ("validation", 1, 6),
        *([("best", 1)] if 1 in best else []),
    ]
    wanted += [("step", 9), ("step", 12), ("model", 2), ("validation", 2, 12), *([("best", 2)] if 2 in best else [])]
    assert recorder.events == wanted
    assert outcome.best_epoch == max(best)
    assert sorted(outcome.history) == [0, 1, 2]
    assert set(recorder.figures[1]) == {"loss", "accuracy", "learning_rate", "images_per_second"}


def test_fine_tuning_learns_and_reports_what_it_reached() -> None:
    model, task = network(), Blobs()
    outcome = run(model, task, Notes(), epochs=6, lr=0.02)
    accuracies = {epoch: metrics["accuracy"] for epoch, metrics in outcome.history.items()}
    assert outcome.initial == accuracies[0] < 80
    assert outcome.last == accuracies[6] > 95
    assert outcome.best == max(accuracies.values())
    assert outcome.best_epoch == min(epoch for epoch, value in accuracies.items() if value == outcome.best)
    assert outcome.seconds_per_step > 0
    assert task.validate(model, "") == outcome.history[6]


def test_saved_models_are_those_of_their_epochs(tmp_path: Path) -> None:
    outcome = run(network(), Blobs(), Notes(tmp_path), epochs=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.pth", "1.pth", "2.pth", "3.pth", "best.pth"]
    for epoch, metrics in outcome.history.items():
        twin = network()
        load_state(twin, read_tensors(tmp_path / f"{epoch}.pth"), "file")
        # float32 norms, folded
        assert Blobs().validate(twin, "") == pytest.approx(metrics, rel=1e-4)
    best, own = read_tensors(tmp_path / "best.pth"), read_tensors(tmp_path / f"{outcome.best_epoch}.pth")
    assert all(torch.equal(best[key], own[key]) for key in own)


def test_validation_before_training_can_be_skipped_and_no_epoch_only_validates() -> None:
    recorder = Notes()
    outcome = run(network(), Blobs(), recorder, epochs=1, skip_initial_validation=True)
    assert recorder.events[0] == ("model", 0)
    assert ("validation", 0, 0) not in recorder.events
    assert outcome.initial is None
    assert outcome.best_epoch == 1
    recorder = Notes()
    outcome = run(network(), Blobs(), recorder, epochs=0)
    assert recorder.events == [("model", 0), ("validation", 0, 0), ("best", 0)]
    assert outcome.last == outcome.initial == outcome.best


def test_codes_never_change_while_codebooks_norms_and_dense_layers_do() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    run(model, Blobs(), Notes(), epochs=1)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if "codes_matrix" not in key}
    assert all(m.training for m in model.modules())


def test_norms_and_layers_that_were_frozen_stay_frozen() -> None:
    model = network()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model[0].state_dict())
    run(model, Blobs(), Notes(), epochs=1)
    assert all(torch.equal(value, before[key]) for key, value in model[0].state_dict().items())


def test_training_runs_in_training_mode_and_validation_gives_it_back() -> None:
    task = Blobs()
    run(network().eval(), task, Notes(), epochs=2)
    assert task.modes == [True] * 12
    model = network()
    model[1].eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model] == [True, False, True, True, True, True]


def test_the_same_seed_gives_the_same_run_and_another_order_another() -> None:
    states = []
    for seed in (1, 1, 2):
        model = network()
        outcome = run(model, Blobs(seed), Notes(), epochs=2)
        states.append((model.state_dict(), outcome.history))
    assert states[0][1] == states[1][1]
    assert all(torch.equal(value, states[1][0][key]) for key, value in states[0][0].items())
    assert not all(torch.equal(value, states[2][0][key]) for key, value in states[0][0].items())


def test_a_loss_that_is_no_number_stops_the_run_naming_the_step_before_the_model_is_touched(tmp_path: Path) -> None:
    model, recorder = network(), Notes(tmp_path)
    with pytest.raises(RunError, match="step 9") as error:
        run(model, Blobs(spoil_at=9), recorder, epochs=3)
    assert error.value.status == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert recorder.events[-1] in {("best", 1), ("validation", 1, 6)}
    assert all(torch.isfinite(t).all() for t in read_tensors(tmp_path / "1.pth").values())


@pytest.mark.parametrize(
    ("spoilt", "value"), [("0.codebook", float("nan")), ("3.codebook", float("inf")), ("1.weight", float("-inf"))]
)
def test_the_layer_whose_gradient_went_first_is_named_and_the_step_is_not_taken(spoilt: str, value: float) -> None:
    """A gradient is spoilt in step 8 while the loss is still a number: after a step with it the network would be
    lost."""
    model, task, passes = network(), Blobs(), []
    parameter = model.get_parameter(spoilt)

    def spoil(gradient: Tensor) -> Tensor:
        passes.append(copy.deepcopy(model.state_dict()))
        return gradient.index_fill(0, torch.tensor([0]), value) if len(passes) == 8 else gradient

    parameter.register_hook(spoil)
    kind = type(model[int(spoilt[0])]).__name__
    words = rf"no longer a number at step 8\. The gradient of layer '{spoilt[0]}' \({kind}, its {spoilt[2:]}\) went first, at step 8"
    with pytest.raises(RunError, match=words):
        run(model, task, Notes(), epochs=3)
    assert all(torch.equal(p, passes[-1][name]) for name, p in model.named_parameters())


def test_of_gradients_lost_in_one_step_the_one_nearest_to_the_loss_is_named() -> None:
    with pytest.raises(
        RunError, match=r"The gradient of layer '5' \(Linear, its (bias|weight)\) went first, at step 9"
    ):
        run(network(), Blobs(spoil_at=9), Notes(), epochs=3)


def test_where_looking_has_to_wait_the_first_step_is_still_known() -> None:
    """On a GPU the gradients are read every `log_every` steps: the watch remembers what happened in between."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    watch = GradientWatch(model)
    for step in range(1, 6):
        model.zero_grad()
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        watch.end_of_pass()
        with torch.no_grad():
            if step == 3:
                model[0].bias.grad[0] = torch.nan
            if step > 3:
                model[1].weight.grad[0] = torch.inf
        watch.check(step)
    assert watch.first() == (3, "0.bias")


def test_a_step_is_the_optimizers_own_step() -> None:
    """Two epochs by hand, with torch's Adam and the documented cosine."""
    model, twin = network(), network()
    run(model, Blobs(), Notes(), epochs=2, lr=0.02)
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.02)
    task, number = Blobs(), 0
    for epoch in (1, 2):
        twin.train()
        for batch in task.training_batches(epoch):
            cosine = (
                1e-6
                + (0.02 - 1e-6) * (1 + float(torch.cos(torch.tensor(torch.pi * number / 12, dtype=torch.float64)))) / 2
            )
            optimizer.param_groups[0]["lr"] = cosine
            optimizer.zero_grad()
            task.training_loss(twin, batch).loss.backward()
            optimizer.step()
            number += 1
    # float32 parameters; the rate is computed by recurrence in one case and in closed form in the other
    assert all(
        torch.allclose(value.double(), twin.state_dict()[key].double(), rtol=1e-4, atol=1e-6)
        for key, value in model.state_dict().items()
    )


def rates(
    schedule: ScheduleSpec, epochs: int = 4, metrics: list[float] | None = None, lr: float = 0.1, steps: int = 3
) -> list[float]:
    """The rate of every step, and the one after the last."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=lr)
    told = Schedule(optimizer, schedule, epochs, steps)
    found = []
    for epoch in range(epochs):
        for _ in range(steps):
            found.append(told.learning_rate)
            optimizer.step()
            told.after_step()
        told.after_epoch((metrics or [0.0] * epochs)[epoch])
    return [*found, told.learning_rate]


def test_the_cosine_falls_every_step_from_the_learning_rate_to_min_lr() -> None:
    found = rates(ScheduleSpec("cosine", min_lr=1e-3))
    assert found[0] == 0.1
    assert found[-1] == pytest.approx(1e-3)
    assert all(after < before for before, after in pairwise(found))
    assert found[6] == pytest.approx((0.1 + 1e-3) / 2)  # half way


class Overflowing(Blobs):
    """In its first `n_left_out` steps the scaled loss overflows, though the loss itself does not."""

    def __init__(self, n_left_out: int) -> None:
        super().__init__()
        self.n_left_out = n_left_out

    def training_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> StepLoss:
        found = super().training_loss(model, batch)
        if self.steps > self.n_left_out:
            return found
        return StepLoss(found.loss * (1e37 / found.loss.detach()), found.n_images, found.scalars)


@pytest.mark.parametrize("kind", ["cosine", "multistep", "plateau", "none"])
def test_the_schedule_waits_where_the_scaler_leaves_a_step_out(kind: str) -> None:
    schedule = ScheduleSpec(kind, min_lr=1e-3, milestones=(1,), patience=0)
    usual, waiting = Notes(), Notes()
    run(network(), Blobs(), usual, 2, schedule, log_every_n_steps=1, amp="fp16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(network(), Overflowing(3), waiting, 2, schedule, log_every_n_steps=1, amp="fp16")
    found = [waiting.rates[step] for step in range(1, 13)]
    expected = [usual.rates[step] for step in range(1, 13)]
    if kind == "cosine":
        assert found == [expected[0]] * 3 + expected[:9]
    elif kind != "plateau":  # whose metrics differ
        assert found == expected


def test_an_epoch_without_a_step_is_no_warning() -> None:
    model = network()
    before = copy.deepcopy(dict(model.named_parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, Overflowing(6), Notes(), 1, ScheduleSpec("multistep", milestones=(1,)), amp="fp16")
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_the_plateau_waits_for_a_higher_metric() -> None:
    spec_ = ScheduleSpec("plateau", min_lr=1e-4, patience=1, factor=0.1)
    assert set(rates(spec_, 4, [10, 20, 30, 40])) == {0.1}  # rising: an accuracy that improves keeps the rate
    falling = rates(spec_, 6, [40, 30, 20, 10, 5, 1])
    assert falling[::3] == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert rates(spec_, 12, [0.0] * 12)[-1] == pytest.approx(1e-4)  # not below min_lr


def test_multistep_and_none() -> None:
    found = rates(ScheduleSpec("multistep", factor=0.5, milestones=(1, 3)), 4)
    assert found == pytest.approx([0.1] * 3 + [0.05] * 6 + [0.025] * 4)
    assert set(rates(ScheduleSpec("none"), 4)) == {0.1}
    with pytest.raises(ValueError, match=r"'linear'.*cosine, plateau, multistep, none"):
        rates(ScheduleSpec("linear"))


def test_the_loop_tells_the_schedule_of_every_epoch_and_its_metric() -> None:
    recorder = Notes()
    run(
        network(),
        Blobs(),
        recorder,
        epochs=3,
        schedule=ScheduleSpec("multistep", factor=0.5, milestones=(1, 2)),
        log_every_n_steps=1,
    )
    assert list(recorder.rates.values()) == pytest.approx([0.01] * 6 + [0.005] * 6 + [0.0025] * 6)
    # with a rate of zero nothing is learned, so that the accuracy cannot rise after the first epoch
    recorder = Notes()
    model = network()
    model[1].momentum = 0.0
    run(
        model,
        Blobs(),
        recorder,
        epochs=3,
        lr=1e-30,
        schedule=ScheduleSpec("plateau", min_lr=0.0, patience=0),
        log_every_n_steps=1,
    )
    assert [recorder.rates[step] for step in (1, 7, 13)] == pytest.approx([1e-30, 1e-30, 1e-31], rel=1e-3)
    recorder = Notes()
    run(
        network(),
        Blobs(),
        recorder,
        epochs=2,
        lr=0.02,
        schedule=ScheduleSpec("plateau", patience=0),
        log_every_n_steps=1,
    )
    assert recorder.rates[12] == 0.02  # the accuracy rose


def test_last_epoch_continues_a_schedule() -> None:
    whole = rates(ScheduleSpec("multistep", factor=0.5, milestones=(1, 3)), 4)
    rest = rates(ScheduleSpec("multistep", factor=0.5, milestones=(1, 3), last_epoch=1), 2, lr=whole[6])
    assert rest[3:] == pytest.approx(whole[9:])


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_weight_decay_and_the_learning_rate_are_honoured(name: str) -> None:
    ends = []
    for decay in (0.0, 0.5):
        layer = nn.Linear(4, 1, bias=False)
        layer.weight.data.fill_(1)
        optimizer = make_optimizer(layer, OptimizerSpec(name, 0.1, 0.0, decay))
        layer.weight.grad = torch.full_like(layer.weight, 0.25)
        optimizer.step()
        ends.append(float(layer.weight.detach()[0, 0]))
    if name == "sgd":
        assert ends == pytest.approx([1 - 0.1 * 0.25, 1 - 0.1 * (0.25 + 0.5)])
    else:  # the first step of Adam has the length of the learning rate; only zero gradients tell the decay
        layer.weight.data.fill_(1)
        optimizer = make_optimizer(layer, OptimizerSpec(name, 0.1, 0.0, 0.5))
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        assert float(layer.weight.detach()[0, 0]) == pytest.approx(0.9)
        assert ends == pytest.approx([0.9, 0.9])
        assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_momentum_is_sgds_and_only_trainable_parameters_are_given() -> None:
    model = network()
    model[0].codebook.requires_grad_(False)
    optimizer = make_optimizer(model, OptimizerSpec("sgd", 0.1, 0.8))
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in model.parameters() if p.requires_grad}
    assert optimizer.param_groups[0]["momentum"] == 0.8
    assert any(isinstance(m, QuantizedLayer) for m in model.modules())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer(model, OptimizerSpec())


class TooLarge(Blobs):
    """Blobs of which one batch needs more memory than there is, forward or backward."""

    def __init__(self, step: int, backward: bool) -> None:
        super().__init__()
        self.step, self.backward = step, backward

    def training_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> StepLoss:
        found = super().training_loss(model, batch)
        if self.steps == self.step:
            if not self.backward:
                torch.empty(1 << 50, dtype=torch.uint8)
            found.loss.register_hook(lambda _: torch.empty(1 << 50, dtype=torch.uint8))
        return found


class Kept:
    """Keeps checkpoints in a list."""

    def __init__(self) -> None:
        self.checkpoints: list[Checkpoint] = []

    def keep(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.append(copy.deepcopy(checkpoint))


@pytest.mark.parametrize("backward", [False, True])
def test_running_out_of_memory_names_the_batch_and_the_last_checkpoint_resumes(backward: bool) -> None:
    how = FinetuneSpec(epochs=1, checkpoint_every_n_steps=2, show_progress=False)
    engine, kept, model = SingleProcess(Launch(), torch.device("cpu")), Kept(), network()
    finetune(model, Blobs(), how, engine, Notes())
    with pytest.raises(RunError, match=r"out of memory on 16 points of batch 4\."):
        finetune(network(), TooLarge(4, backward), how, engine, Notes(), keeper=kept)
    assert kept.checkpoints[-1].position.step == 2
    again = network()
    finetune(again, Blobs(), how, engine, Notes(), resumed=Resumed(kept.checkpoints[-1]))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
