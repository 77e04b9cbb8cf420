"""The way through a network: what waits there gives what passes from the start give, and nothing stays behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.common.errors import DataError
from src.compression.quantize.calibrate.arrivals import THREAD, Arrivals, Holding
from src.compression.quantize.calibrate.calibrate import Calibration, Part, Surroundings, calibrate
from src.compression.quantize.plan import LayerSpec
from tests.compression.quantize.calibrate.test_calibrate import OWN_SPECS, Everything, digits, plan_of, trained
from tests.support import detectors


def same(one: Calibration, other: Calibration) -> None:
    """Both found the same, bit by bit."""
    assert one.lost == other.lost
    assert one.plain == other.plain
    assert one.clusterings.keys() == other.clusterings.keys()
    for name, clustering in one.clusterings.items():
        assert torch.equal(clustering.codes, other.clusterings[name].codes)
        assert torch.equal(clustering.codebook, other.clusterings[name].codebook)
    assert one.norms.keys() == other.norms.keys()
    for name, found in one.norms.items():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, other.norms[name], strict=True))


def passes_left() -> int:
    """Threads of passes."""
    return sum(thread.name == THREAD for thread in threading.enumerate())


class Counted:
    """Runs networks, and counts how often."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, model: nn.Module, batch: Any) -> object:
        self.passes += 1
        return model(**batch) if isinstance(batch, dict) else model(batch)


def both_ways(
    net: nn.Module, plan: Any, batches: Sequence[Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Calibration, int, int]:
    """What is found, and passes that it took with passes that wait, and with passes from the start for every item."""
    waiting, anew = Counted(), Counted()
    found = calibrate(net, plan, batches, show_progress=False, within=Surroundings(run=waiting))
    with monkeypatch.context() as changed:
        changed.setattr(Arrivals, "_look", lambda *_: None)
        same(found, calibrate(net, plan, batches, show_progress=False, within=Surroundings(run=anew)))
    assert passes_left() == 0
    return found, waiting.passes, anew.passes


def test_every_layer_computes_once_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (images, _) = trained(), digits()
    batches = [*images[:96].split(32), images[96:101]]
    found, waiting, anew = both_ways(net, plan_of(net), batches, monkeypatch)
    assert set(found.norms) == {"norm", "norm2", "late_norm"}
    assert waiting == 1 + 2 * 4  # the order, then every batch in both networks
    assert anew == 1 + (6 + 5 + 2) * 4  # weights, all but the first with the dense network too, and a norm in both


def test_weights_that_are_used_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Everything().eval()
    batches = [{"tokens": part} for part in torch.randint(0, 50, (40, 12)).split(16)]
    _, waiting, anew = both_ways(net, plan_of(net, 8, layer_specs=OWN_SPECS), batches, monkeypatch)
    assert waiting == 1 + 2 * 3 + 3 * 2 * 3  # up, down and own.in_proj_weight have passes of their own
    assert anew > 2 * waiting


@pytest.mark.parametrize("make", [detectors.fasterrcnn, detectors.retinanet])
def test_detectors(make: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = make(3).eval()
    draw = torch.Generator().manual_seed(1)
    batches = [[torch.rand(3, h, w, generator=draw) for h, w in sides] for sides in (((64, 80), (64, 64)), ((72, 64),))]
    plan = plan_of(net, 8, layer_specs={"roi_heads.box_head.fc6": LayerSpec(subvector_size=8)})
    found, waiting, anew = both_ways(net, plan, batches, monkeypatch)
    assert not found.plain
    assert waiting < anew


def test_a_vision_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    models = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")
    net = models.VisionTransformer(**sizes).eval()
    found, waiting, _ = both_ways(net, plan_of(net, 8), torch.randn(24, 3, 16, 16).split(8), monkeypatch)
    assert not found.plain
    assert waiting == 1 + 2 * 3


class Keeps(nn.Module):
    """Keeps what it computed in its attributes until later in the pass, goes another way when its inputs are negative,
    and skips a weight when they are small."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(16, 16) for _ in range(4))
        self.norm = nn.BatchNorm1d(16)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.first(x)
        steps = [self.second, self.third][:: -1 if float(x.mean()) < 0 else 1]
        if float(x.abs().mean()) < 0.1:
            steps = []
        for step in steps:
            x = x + step(x).tanh()
        return self.last(self.norm(x + self.kept))


def test_passes_that_go_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Keeps().eval()
    batches = [torch.randn(32, 16) + 0.3, torch.randn(20, 16) - 0.3, 0.01 * torch.randn(8, 16), torch.rand(30, 16)]
    found, _, _ = both_ways(net, plan_of(net, 8), batches, monkeypatch)
    assert set(found.lost) == {"first", "second", "third", "last"}
    assert "norm" in found.norms


def test_what_waits_is_bounded() -> None:
    net, (images, _) = trained(), digits()
    plan, batches = plan_of(net), images[:256].split(64)
    with pytest.raises(
        DataError, match=r"(?s)0\.1 MiB .*needs (\d+) MiB .*calibration\.memory.*calibration\.batch_size"
    ) as e:
        calibrate(net, plan, batches, show_progress=False, memory=1 << 17)
    least = int(str(e.value).partition("needs ")[2].split()[0]) << 20
    enough, little = Counted(), Counted()
    found = calibrate(net, plan, batches, show_progress=False, within=Surroundings(run=enough))
    same(found, calibrate(net, plan, batches, show_progress=False, memory=least, within=Surroundings(run=little)))
    assert little.passes > enough.passes
    holding = Holding(100)
    assert holding.fits("a", 60)
    assert not holding.fits("b", 50)
    assert holding.fits("a", 40)
    assert holding.fits("b", 60)
    assert not holding.fits("a", 41)
    assert holding.fits("b", 100)
    holding.leave("b")
    assert holding.fits("c", 100)


class Fails(nn.Module):
    """Does something on a batch that starts with 1."""

    def __init__(self, what: Callable[[], object]) -> None:
        super().__init__()
        self.first, self.second, self.what = nn.Linear(8, 16), nn.Linear(16, 8), what

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        if float(x[0, 0]) == 1:
            self.what()
        return self.second(y)


def raises(error: BaseException) -> Callable[[], object]:
    def act() -> object:
        raise error

    return act


ENDS: list[tuple[Callable[[], object], type[BaseException], str | None]] = [
    (raises(IndexError("no such token")), DataError, "calibration: the network fails .*IndexError: no such token"),
    (raises(torch.OutOfMemoryError("CUDA out of memory")), torch.OutOfMemoryError, "out of memory"),
    (raises(KeyboardInterrupt("in a pass")), KeyboardInterrupt, "in a pass"),
    (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt, None),  # it interrupts the thread that waits
]


@pytest.mark.parametrize(("what", "error", "words"), ENDS)
def test_whatever_ends_a_pass_reaches_the_caller_and_nothing_is_left(
    what: Callable[[], object], error: type[BaseException], words: str | None
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which programs in the background do not have
    net, images = Fails(what), torch.randn(48, 8)
    images[32, 0] = 1
    with pytest.raises(error, match=words):
        calibrate(net, plan_of(net, 4), images.split(16), show_progress=False)
    assert passes_left() == 0


def test_images_of_another_size_than_the_network_can_take() -> None:
    net, (images, _) = trained(), digits()
    larger = nn.functional.interpolate(images[:16], size=12)
    with pytest.raises(DataError, match=r"calibration: the network fails on its inputs of shape \(16, 1, 12, 12\)"):
        calibrate(net, plan_of(net, 4), [images[:16], larger], show_progress=False)
    assert passes_left() == 0


def test_a_batch_that_makes_the_inputs_of_a_layer_infinite() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    images = torch.randn(32, 8)
    images[20, 3] = torch.nan
    with pytest.raises(DataError, match=r"layer '0' are not finite"):
        calibrate(net, plan_of(net, 4), images.split(16), show_progress=False)
    assert passes_left() == 0


class Kept:
    """Parts by label; after some of them it stops the calibration, as a crash would."""

    def __init__(self, stop_after: int) -> None:
        self.parts: dict[str, Part] = {}
        self.left = stop_after

    def recall(self, label: str) -> Part | None:
        return self.parts.get(label)

    def keep(self, label: str, part: Part) -> None:
        self.parts[label] = part
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_finished_parts_are_not_found_again_and_the_result_is_the_same(stop_after: int) -> None:
    net, (images, _) = trained(), digits()
    plan, batches, kept = plan_of(net), images[:64].split(32), Kept(stop_after)
    whole, rest = Counted(), Counted()
    found = calibrate(net, plan, batches, show_progress=False, within=Surroundings(run=whole))
    with pytest.raises(KeyboardInterrupt):
        calibrate(net, plan, batches, show_progress=False, within=Surroundings(parts=kept))
    assert len(kept.parts) == stop_after
    again = calibrate(net, plan, batches, show_progress=False, within=Surroundings(run=rest, parts=kept))
    same(found, again)
    assert len(kept.parts) == 7
    assert rest.passes <= whole.passes
    if stop_after == 7:
        assert rest.passes == 1  # the order
