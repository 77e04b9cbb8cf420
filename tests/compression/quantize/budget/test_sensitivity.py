"""Laws of a wanted size that is spent on what changes the outputs, on a small trained network."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from src.architectures.detector_outputs import batch_outputs, detector_outputs
from src.common.errors import DataError
from src.compression.quantize.budget.changes import ENERGY, KL, Trial, changes, tensors_of
from src.compression.quantize.budget.gain import gains
from src.compression.quantize.budget.loss import Losses, disturbance
from src.compression.quantize.budget.sensitivity import INPUTS, losses_by_inputs, some_inputs
from src.compression.quantize.budget.tradeoff import Tradeoff, measure
from src.compression.quantize.budget.wanted import Budget
from src.compression.quantize.calibrate.calibrate import calibrate
from src.compression.quantize.calibrate.sharing import Alone
from src.compression.quantize.compress import compress
from src.compression.quantize.plan import QuantizationSpec, make_plan
from src.model_files.size import model_size
from tests.support import detectors

TINY = 2.0**-10


class Digits(nn.Module):
    """Norms behind convolutions, a residual, tied weights, and a layer that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.second, self.norm2 = nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.one, self.other = nn.Linear(24, 24), nn.Linear(24, 24)
        self.other.weight = self.one.weight
        self.head, self.unused = nn.Linear(24, 10), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = (x + self.norm2(self.second(x))).relu().amax((2, 3))
        return self.head(self.other(self.one(x).relu()).relu())


@cache
def inputs() -> Tensor:
    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


@cache
def trained() -> nn.Module:
    torch.manual_seed(0)
    net, labels = Digits(), torch.from_numpy(load_digits().target)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(4):
        for part in torch.randperm(1200).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs()[part]), labels[part]).backward()
            optimizer.step()
    return net.eval()


def made_smaller(net: nn.Module) -> nn.Module:
    """The same function, with weights before a norm that are a thousand times smaller."""
    net = copy.deepcopy(net)
    norm = net.norm2
    with torch.no_grad():
        net.second.weight *= TINY
        norm.running_mean *= TINY
        norm.running_var *= TINY**2
    norm.eps *= TINY**2
    return net


def tradeoff_of(net: nn.Module) -> Tradeoff:
    return measure(net, QuantizationSpec(k=16, k_means_n_iters=10), model_size(net).bits, show_progress=False)


def losses(net: nn.Module, tradeoff: Tradeoff, batches: Any = None, **more: Any) -> Losses:
    batches = inputs()[:128].split(64) if batches is None else batches
    return losses_by_inputs(net, tradeoff, batches, show_progress=False, **more)


@pytest.fixture(scope="module")
def known() -> tuple[nn.Module, Tradeoff, Losses]:
    net, tradeoff = trained(), tradeoff_of(trained())
    return net, tradeoff, losses(net, tradeoff)


@cache
def of_smaller() -> tuple[Tradeoff, Losses]:
    net = made_smaller(trained())
    tradeoff = tradeoff_of(net)
    return tradeoff, losses(net, tradeoff)


def chosen(tradeoff: Tradeoff, ratio: float = 12) -> dict[str, tuple[int, int]]:
    return {layer.name: (layer.d, layer.k) for layer in tradeoff.plan_for(Budget(ratio=ratio)).layers}


def test_the_size_of_weights_before_a_norm_means_nothing(known) -> None:
    net, tradeoff, found = known
    small, of_small, found_of_small = made_smaller(net), *of_smaller()
    with torch.no_grad():
        assert torch.allclose(small(inputs()[:50]), net(inputs()[:50]), atol=1e-4)
    assert chosen(of_small) != chosen(tradeoff)  # by sums of squares the layer is worth nothing
    by_photos = of_small.with_losses(found_of_small)
    assert chosen(by_photos) == chosen(tradeoff.with_losses(found))
    ratio = by_photos.losses.sensitivities["second"] / found.sensitivities["second"]
    assert ratio == pytest.approx(TINY**-2, rel=0.1)


def test_the_same_inputs_and_seed_give_the_same_and_the_network_stays_as_it_is(known) -> None:
    net, tradeoff, found = known
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert losses(net, tradeoff) == found
    assert found.unit == KL
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert set(found.sensitivities) == {"first", "second", "one", "head", "unused"}  # tied weights once


class OneOf(Alone):
    """A process whose rows are kept, and who is given those of the others afterwards."""

    def __init__(self, rank: int, world_size: int, rows: list[list[Any]]) -> None:
        super().__init__(rank, world_size)
        self.rows, self.calls = rows, 0

    def gather(self, rows: Sequence[Any]) -> list[Any]:
        self.calls += 1
        if len(self.rows) < self.calls:
            self.rows.append([])
        self.rows[self.calls - 1] += rows
        return self.rows[self.calls - 1]


def test_processes_that_share_inputs_find_what_one_finds(known) -> None:
    net, tradeoff, found = known
    batches, rows = inputs()[:64].split(32), []
    whole = losses(net, tradeoff, batches)
    for rank in (1, 2):  # of three processes one has no inputs to show
        with contextlib.suppress(KeyError):  # the others' rows are not there yet
            losses(net, tradeoff, batches, processes=OneOf(rank, 3, rows))
    shared = losses(net, tradeoff, batches, processes=OneOf(0, 3, rows))
    assert shared.unit == whole.unit
    for name, value in whole.sensitivities.items():
        assert shared.sensitivities[name] == pytest.approx(value, rel=1e-6)
        assert value == pytest.approx(found.sensitivities[name], rel=0.5)  # of fewer inputs: about the same


def test_no_weight_is_free_and_what_no_input_reaches_gets_least(known) -> None:
    _, tradeoff, found = known
    rates = {weight.names[0]: found.sensitivities[weight.names[0]] * weight.power for weight in tradeoff.weights}
    assert min(rates, key=rates.__getitem__) == "unused"
    assert min(rates.values()) > 0
    largest = tradeoff.with_losses(found).plan_for(Budget(ratio=12)).layers
    shares = {layer.name: layer.distortion / layer.power for layer in largest}
    assert max(shares, key=shares.__getitem__) == "unused"


def test_a_larger_size_never_predicts_a_larger_loss_and_is_used_up(known) -> None:
    _, tradeoff, found = known
    by_inputs, last = tradeoff.with_losses(found), np.inf
    for size in np.geomspace(-(-by_inputs.smallest // 8) + 64, by_inputs.largest // 16, 12).astype(int):
        prediction = by_inputs.plan_for(Budget(size=int(size)))
        assert prediction.loss <= last
        assert 0.97 * 8 * size <= prediction.bits <= 8 * size
        assert prediction.unit == KL
        assert prediction.loss == pytest.approx(sum(layer.loss for layer in prediction.layers))
        last = prediction.loss
    settings = by_inputs.of_settings()
    assert by_inputs.plan_for(Budget(size=-(-settings.bits // 8))).loss <= settings.loss


def test_a_network_of_the_same_size_keeps_more_answers_than_by_sums_of_squares(known) -> None:
    net, _, _ = known
    small, images = made_smaller(net), inputs()[1200:]
    of_small, found = of_smaller()
    kept = []
    for one in (of_small, of_small.with_losses(found)):
        plan = one.plan_for(Budget(ratio=14)).plan
        model = compress(copy.deepcopy(small), plan, show_progress=False)[0].eval()
        with torch.no_grad():
            kept.append(float((model(images).argmax(1) == small(images).argmax(1)).float().mean()))
    assert kept[1] > kept[0]


def test_what_calibrating_leaves_is_about_what_is_predicted(known) -> None:
    net, tradeoff, _ = known
    batches, names = inputs()[:1024].split(64), ["first", "second", "one", "head", "unused"]
    cpu = torch.device("cpu")
    predicted = gains(net, tradeoff.plan, names, batches, outputs=lambda net, x: net(x), seed=0, device=cpu)
    found = calibrate(net, tradeoff.plan, batches, show_progress=False)
    assert predicted["unused"] == 1
    for name, lost in found.lost.items():
        assert 0.3 < predicted[name] / (lost[-1][1] / lost[0][1]) < 3
    order = sorted(found.lost, key=predicted.__getitem__)
    assert order[0] == min(found.lost, key=lambda name: found.lost[name][-1][1] / found.lost[name][0][1])


def test_inputs_that_say_nothing_of_each_other_leave_all_and_equal_ones_hardly_anything() -> None:
    net = nn.Sequential(nn.Linear(32, 64, bias=False))
    plan = make_plan(net, QuantizationSpec(k=4))
    draw = torch.Generator().manual_seed(0)
    apart, alike = torch.randn(4096, 32, generator=draw), torch.randn(4096, 1, generator=draw).expand(-1, 32)
    for x, least, most in ((apart, 0.95, 1.0), (alike, 0.0, 0.2), (apart * 0, 1.0, 1.0)):
        (found,) = gains(
            net, plan, ["0"], x.split(64), outputs=lambda net, x: net(x), seed=0, device=torch.device("cpu")
        ).values()
        assert least <= found <= most


def test_norms_undo_what_only_stretches(known) -> None:
    net, tradeoff, _ = known
    trials = []
    for name in ("second", "one"):
        weight = dict(net.named_modules())[name].weight.detach()
        codebook, codes = weight.reshape(-1, 1).unique(return_inverse=True, dim=0)
        trials += [Trial(name, factor * codebook, codes, 1.0) for factor in (1.0, 0.5)]
    found = changes(
        net, tradeoff.plan, trials, inputs()[:64].split(64), device=torch.device("cpu"), show_progress=False
    )
    same, stretched, as_it_is, smaller = found.sums
    assert same == as_it_is == 0
    assert 0 < stretched < 1e-3 * smaller  # only the norm's epsilon is left


@pytest.mark.parametrize(
    ("outputs", "kind"),
    [
        (lambda net, x: net(x), KL),
        (lambda net, x: {"out": net(x)[:, :, None, None].expand(-1, -1, 4, 4), "aux": net(x)}, KL),
        (lambda net, x: [net(x), net(x)[:, :4]], ENERGY),
        (lambda net, x: (net(x).view(-1, 2, 5), 3, [None]), ENERGY),
        (lambda net, x: net(x)[:, 0], ENERGY),
    ],
)
def test_outputs_of_every_form_are_compared(known, outputs, kind) -> None:
    net, tradeoff, _ = known
    found = losses(net, tradeoff, inputs()[:32].split(32), outputs=outputs)
    assert found.unit == kind
    assert all(0 < value < np.inf for value in found.sensitivities.values())


def test_what_cannot_be_told_is_one_message(known) -> None:
    net, tradeoff, _ = known
    bad = inputs()[:32].clone()
    bad[3, 0, 2, 2] = np.nan
    with pytest.raises(DataError, match=r"inputs of layer 'first' are not finite.*check the images"):
        losses(net, tradeoff, [bad])
    with pytest.raises(DataError, match="outputs of the network are not finite"):
        losses(net, tradeoff, outputs=lambda net, x: net(x) / 0)
    with pytest.raises(DataError, match="no floating-point values"):
        losses(net, tradeoff, outputs=lambda net, x: net(x).argmax(1))
    with pytest.raises(DataError, match="shapes of the network's outputs depend on its values"):
        losses(net, tradeoff, outputs=lambda net, x: net(x)[net(x) > net(x).mean()])


@pytest.mark.parametrize("make", [detectors.retinanet, detectors.fasterrcnn])
def test_a_detector_is_judged_by_its_heads_not_by_the_boxes_that_it_chooses(make) -> None:
    torch.manual_seed(0)
    model = make(5).eval()
    images = [torch.rand(3, height, 80, generator=torch.Generator().manual_seed(height)) for height in (64, 70)]
    ready = model.transform(images)[0].tensors
    given, wanted = batch_outputs(model, images), detector_outputs(model, ready)
    assert all(torch.equal(one, other) for one, other in zip(tensors_of(given), wanted, strict=True))
    tradeoff = measure(model, QuantizationSpec(k=4, k_means_n_iters=2), model_size(model).bits, show_progress=False)
    found = losses(model, tradeoff, [images], outputs=batch_outputs)
    assert found.unit == ENERGY
    usual = [found.sensitivities[weight.names[0]] * weight.power for weight in tradeoff.weights]
    assert sum(one > 0.1 * float(np.median(usual)) for one in usual) > 0.5 * len(usual)  # most were seen to matter


def test_so_many_inputs_are_shown_from_all_of_them() -> None:
    """Inputs often lie sorted by class: the first ones would be of one class."""
    given = torch.arange(1000.0)[:, None]
    for size in (1, 60, 64, 1000):
        shown = some_inputs(given.split(size))
        assert [len(batch) for batch in shown] == [64] * (INPUTS // 64)
        numbers = torch.cat(shown).flatten()
        steps = numbers.diff()
        assert bool((steps > 0).all()), size
        assert float(steps.max()) <= 2 * 1000 / INPUTS, size
        assert numbers[0] < 1000 / INPUTS
        assert numbers[-1] >= 1000 - 3 * 1000 / INPUTS
    assert torch.equal(torch.cat(some_inputs(given[:65].split(64))), given[:65])
    assert [len(batch) for batch in some_inputs(given[:65].split(64))] == [33, 32]
    assert len(some_inputs([{"x": given[:5]}] * 3, 6)) == 2
    assert len(some_inputs([[given[:5], given[:4]]] * 9, 4)) == 2
    assert [one["x"][0] for one in some_inputs([{"x": given[i : i + 1]} for i in range(9)], 3)] == [0, 3, 6]
    assert some_inputs([]) == []


def test_the_disturbance_rises_and_is_the_distortion_where_little_is_lost() -> None:
    lost = np.linspace(0, 2.001, 50)
    found = disturbance(lost, 2.0)
    assert (np.diff(found) >= 0).all()
    assert found[0] == 0
    assert np.isfinite(found).all()
    assert disturbance(np.array(1e-6), 2.0) == pytest.approx(1e-6)
    assert disturbance(np.array(1.0), 2.0) == 2
    assert disturbance(np.array([0.0]), 0.0) == 0
