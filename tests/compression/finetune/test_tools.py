"""The usual tools of fine-tuning: laws of each, and that a training with all of them resumes as if it had not stopped."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice, pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.compression.finetune.average import MovingAverage
from src.compression.finetune.hooks import Resumed
from src.compression.finetune.loop import FinetuneSpec, Outcome, finetune
from src.compression.finetune.optimizers import OptimizerSpec, Schedule, ScheduleSpec, make_optimizer
from src.compression.finetune.task import StepLoss
from tests.compression.finetune.test_loop import Blobs, Notes, network
from tests.run.test_resume import CPU, Drops, Stops, StopsAt

PLAIN = ScheduleSpec("none")


def train(model: nn.Module, task: Blobs, notes: Notes | None = None, **changes) -> Outcome:
    given = {"epochs": 1, "optimizer": OptimizerSpec("sgd", 0.05, 0.9), "lr_scheduler": PLAIN, **changes}
    how = FinetuneSpec(**{"log_every_n_steps": 1, "show_progress": False, **given})
    return finetune(model, task, how, CPU, notes or Notes())


class InParts(Blobs):
    """The same points in the same order, in smaller batches; of the first ones of an epoch only."""

    def __init__(self, parts: int, used: int = 96) -> None:
        super().__init__()
        self.used = used
        self.steps_per_epoch = parts

    def training_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: ARG002 (of a protocol)
        order = torch.arange(self.used)
        self.position = start
        for part in order.split(-(-self.used // self.steps_per_epoch))[start:]:
            self.position += 1
            yield self.points[part], self.labels[part]


def without_norms() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()


class Doubled(InParts):
    """In double precision, so that sums in another order agree."""

    def training_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> StepLoss:
        return super().training_loss(model, (batch[0].double(), batch[1]))

    def validate(self, model: nn.Module, label: str) -> dict[str, float]:  # noqa: ARG002 (of a protocol)
        return {"accuracy": 0.0}


@pytest.mark.parametrize(("used", "parts", "whole"), [(96, 6, 3), (96, 12, 6), (88, 6, 3)])
def test_batches_that_are_accumulated_are_one_larger_batch(used: int, parts: int, whole: int) -> None:
    """The last batch of 88 in six parts is smaller: gradients are means over images, not over batches."""
    small, large = without_norms(), without_norms()
    train(small, Doubled(parts, used), accumulate=parts // whole, epochs=2)
    train(large, Doubled(whole, used), epochs=2)
    for own, wanted in zip(small.parameters(), large.parameters(), strict=True):
        assert torch.allclose(own, wanted, rtol=1e-12, atol=1e-14)


def test_what_is_left_of_an_epoch_is_a_step_of_its_own() -> None:
    """Six batches in steps of four: 64 images, then 32."""
    small, other = without_norms(), without_norms()
    train(small, Doubled(6), accumulate=4)
    optimizer, task = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9), Doubled(1)
    for part in (slice(0, 64), slice(64, 96)):
        optimizer.zero_grad()
        task.training_loss(other, (task.points[part], task.labels[part])).loss.backward()
        optimizer.step()
    for own, wanted in zip(small.parameters(), other.parameters(), strict=True):
        assert torch.allclose(own, wanted, rtol=1e-12, atol=1e-14)


def test_the_schedule_counts_steps_of_the_optimizer_when_batches_are_accumulated() -> None:
    notes, single = Notes(), Notes()
    cosine = ScheduleSpec("cosine", min_lr=1e-3)
    train(network(), Blobs(), notes, accumulate=2, epochs=2, lr_scheduler=cosine)
    train(network(), InParts(3), single, epochs=2, lr_scheduler=cosine)
    assert [notes.rates[number] for number in range(1, 13)] == [
        single.rates[number] for number in range(1, 7) for _ in range(2)
    ]


def test_a_batch_that_is_left_out_at_the_end_does_not_lose_those_before_it() -> None:
    class LeavesOut(Doubled):
        def training_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            yield from islice(super().training_batches(epoch, start), 5)
            self.position = 6

    small, other = without_norms(), without_norms()
    train(small, LeavesOut(6), accumulate=6)
    train(other, Doubled(1, 80))
    for own, wanted in zip(small.parameters(), other.parameters(), strict=True):
        assert torch.allclose(own, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_clipped_gradients_keep_their_direction_and_get_the_norm(amp: str) -> None:
    moved = {}
    for limit in (None, 1e-3, 1e9):
        model = without_norms()
        before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
        train(model, Doubled(1), clip_gradients=limit, optimizer=OptimizerSpec("sgd", 1.0, 0.0), amp=amp)
        moved[limit] = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(moved[None], moved[1e9])
    assert float(moved[1e-3].norm()) == pytest.approx(1e-3, rel=1e-3)  # torch divides by the norm + 1e-6
    assert float(F.cosine_similarity(moved[None], moved[1e-3], dim=0)) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["cosine", "multistep", "plateau", "none"])
@pytest.mark.parametrize("warmup", [0.5, 1.0, 2.5])
def test_a_warm_up_multiplies_the_schedule_by_a_straight_line(kind: str, warmup: float) -> None:
    spec = ScheduleSpec(kind, min_lr=1e-4, milestones=(1, 2), patience=0, factor=0.5, warmup=warmup)
    found, usual = [], []
    for rates, how in ((found, spec), (usual, ScheduleSpec(**{**vars(spec), "warmup": 0.0}))):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        told = Schedule(optimizer, how, 4, 6)
        for _epoch in range(4):
            for _ in range(6):
                rates.append(told.learning_rate)
                optimizer.step()
                told.after_step()
            told.after_epoch(0.0)
    n = round(6 * warmup)
    assert found == pytest.approx([rate * min(1.0, (step + 1) / n) for step, rate in enumerate(usual)], rel=1e-12)
    assert found[n - 1 :] == usual[n - 1 :]
    assert all(after > before for before, after in pairwise(found[: min(n, 6)]))


def test_codebooks_have_a_rate_of_their_own() -> None:
    """A step of plain SGD moves each parameter by its rate times its gradient."""
    models = [network() for _ in range(2)]
    starts = copy.deepcopy(models[0].state_dict())
    for model, factor in zip(models, (1.0, 0.25), strict=True):
        train(model, InParts(1), optimizer=OptimizerSpec("sgd", 0.05, 0.0, 0.0, factor))
    for name, _ in models[0].named_parameters():
        usual, scaled = (model.get_parameter(name).detach() - starts[name] for model in models)
        factor = 0.25 if name.endswith("codebook") else 1.0
        assert torch.allclose(scaled, usual * factor, rtol=1e-4, atol=1e-7), name
    optimizer = make_optimizer(network(), OptimizerSpec("adam", 0.1, codebook_learning_rate=3.0))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.3])
    assert (
        len(make_optimizer(without_norms(), OptimizerSpec("adam", 0.1, codebook_learning_rate=3.0)).param_groups) == 1
    )


def test_the_moving_average_is_that_of_the_formula_and_codes_stay() -> None:
    model, wanted = network(), {}
    average = MovingAverage(model, 0.9)
    codes = {name: tensor.clone() for name, tensor in model.state_dict().items() if "codes" in name}
    named = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if b.is_floating_point()}}
    wanted = {name: tensor.detach().double().clone() for name, tensor in named.items()}
    assert not any("codes" in name for name in average.values)
    for step in range(120):
        with torch.no_grad():
            for tensor in named.values():
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(step)))
        average.update()
        decay = min(0.9, (1 + step) / (10 + step))
        wanted = {name: decay * wanted[name] + (1 - decay) * named[name].detach().double() for name in named}
    for name, tensor in average.values.items():
        assert torch.allclose(tensor.double(), wanted[name], rtol=1e-4, atol=1e-4)
    own = {name: tensor.detach().clone() for name, tensor in named.items()}
    with average.shown():
        assert all(torch.allclose(named[name].double(), value, rtol=1e-4, atol=1e-4) for name, value in wanted.items())
    assert all(torch.equal(named[name], value) for name, value in own.items())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in codes.items())


class Keeps(Notes):
    """A recorder that keeps the networks of all epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.networks: dict[int, dict[str, Tensor]] = {}

    def model(self, epoch: int, model: nn.Module) -> None:
        self.networks[epoch] = copy.deepcopy(model.state_dict())


def test_the_average_is_validated_saved_and_handed_back_while_training_goes_on_without_it() -> None:
    model, plain, notes, usual = network(), network(), Keeps(), Keeps()
    outcome = train(model, Blobs(), notes, epochs=3, ema=0.9)
    train(plain, Blobs(), usual, epochs=3)
    assert [notes.figures[n]["loss"] for n in range(1, 19)] == [usual.figures[n]["loss"] for n in range(1, 19)]
    assert all(torch.equal(value, notes.networks[3][name]) for name, value in model.state_dict().items())
    assert not torch.equal(model[0].codebook, plain[0].codebook)
    for epoch, metrics in outcome.history.items():
        twin = network()
        twin.load_state_dict(notes.networks[epoch])
        assert Blobs().validate(twin, "") == metrics


class Metrics(Blobs):
    """Validations give what they are told to."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = values

    def validate(self, model: nn.Module, label: str) -> dict[str, float]:  # noqa: ARG002 (of a protocol)
        epoch = 0 if "before" in label else int(label.split()[-1])
        return {"accuracy": self.values[epoch]}


@pytest.mark.parametrize(
    ("patience", "metrics", "last"),
    [(2, (1, 2, 1, 2, 5, 6), 3), (3, (1, 2, 1, 2, 5, 6), 5), (0, (9, 1, 1, 1, 1, 1), 5), (1, (9, 1, 1, 1, 1, 1), 1)],
)
def test_training_ends_when_the_metric_has_not_risen_for_so_many_epochs(
    patience: int, metrics: tuple[float, ...], last: int
) -> None:
    outcome = train(network(), Metrics(*metrics), epochs=5, early_stopping=patience)
    assert max(outcome.history) == last


# --- resuming ---


TOOLS = {
    "accumulate": {"accumulate": 4},
    "clip": {"clip_gradients": 0.1},
    "warm-up": {"lr_scheduler": ScheduleSpec("cosine", 1e-4, warmup=1.5)},
    "warm-up, plateau": {"lr_scheduler": ScheduleSpec("plateau", 1e-4, patience=0, factor=0.5, warmup=2.2)},
    "average": {"ema": 0.95},
    "codebooks": {"optimizer": OptimizerSpec("adam", 0.01, codebook_learning_rate=0.3)},
    "stopping": {"early_stopping": 1},
    "all": {
        "accumulate": 2,
        "clip_gradients": 0.2,
        "lr_scheduler": ScheduleSpec("multistep", factor=0.5, milestones=(1,), warmup=1.5),
        "ema": 0.9,
        "optimizer": OptimizerSpec("sgd", 0.02, 0.9, 1e-3, 2.0),
        "early_stopping": 2,
        "amp": "fp16",
    },
}


def resumable(keeper: StopsAt, resumed: Resumed | None, tools: dict) -> tuple[nn.Module, Outcome, Notes]:
    model, notes = Drops(), Notes()
    torch.manual_seed(1 if resumed is None else 99)  # a new process has another state of the generator
    given = {"epochs": 3, "log_every_n_steps": 1, "checkpoint_every_n_steps": keeper.every, **tools}
    how = FinetuneSpec(**given, show_progress=False)
    return model, finetune(model, Blobs(), how, CPU, notes, keeper=keeper, resumed=resumed), notes


ALONE = [pytest.param(name, 8, marks=pytest.mark.slow) for name in TOOLS if name not in ("all", "warm-up, plateau")]


@pytest.mark.parametrize(("name", "at"), [("all", 5), ("all", 8), ("warm-up, plateau", 3), *ALONE])
def test_every_tool_resumes_to_the_same_end(name: str, at: int) -> None:
    model, outcome, notes = resumable(StopsAt(1), None, TOOLS[name])
    keeper = StopsAt(1, at)
    with pytest.raises(Stops):
        resumable(keeper, None, TOOLS[name])
    again, outcome_again, notes_again = resumable(StopsAt(1), Resumed(keeper.states[-1]), TOOLS[name])
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert {**vars(outcome), "seconds_per_step": 0} == {**vars(outcome_again), "seconds_per_step": 0}
    assert all(notes.figures[step]["loss"] == figures["loss"] for step, figures in notes_again.figures.items())
    assert all(notes.rates[step] == rate for step, rate in notes_again.rates.items())


def test_no_checkpoint_is_taken_while_gradients_wait() -> None:
    keeper = StopsAt(1)
    resumable(keeper, None, {"accumulate": 4})
    assert {state.position.batch for state in keeper.states} == {0, 4}
