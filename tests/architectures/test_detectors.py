"""torchvision's detection networks by name: heads, classes, norms and names of their published weights, settings."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models._api import WeightsEnum

from src import architectures
from src.architectures.architecture import n_outputs
from src.architectures.detectors import (
    BOXES,
    MAX_SIZE,
    MIN_SIZE,
    PROPOSALS,
    ImageSizes,
    finds_keypoints,
    finds_masks,
    image_sizes,
    memory_settings,
    old_names,
    set_box_numbers,
    set_image_size,
)
from src.architectures.maskrcnn import MASKRCNN, OLD_NAMES
from src.architectures.structure import without_weights
from src.common.errors import CheckpointError, SettingsError
from src.common.randomness import stream
from src.model_files.open_model_file import open_model_file
from src.model_files.packed import ModelInfo, save_packed
from src.recipes.initial_model import dense_model
from tests.support import detectors
from tests.support.helpers import lively

NAMES = models.list_models(module=models.detection)
FROZEN = {name for name in NAMES if not name.endswith("v2") and not name.startswith("ssd")}
"""Those whose published weights have frozen norms."""
SMALL = "fasterrcnn_mobilenet_v3_large_320_fpn"
ALL = [name if name == SMALL else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_counted_and_what_the_network_finds_is_known(name: str) -> None:
    found = architectures.get(name, "detection")
    model = without_weights(lambda: found.build(7))
    assert n_outputs(found, model) == 7
    assert found.name == f"torchvision:{name}"
    assert found.n_classes == (2 if "keypoint" in name else 91)
    if "rcnn" in name:
        assert (found.head, found.rows_per_class) == ("roi_heads.box_predictor.cls_score", 1)
        assert "roi_heads.box_predictor.bbox_pred" in found.heads_beside
    assert finds_masks(model) == ("maskrcnn" in name)
    assert finds_keypoints(model) == ("keypoint" in name)


def test_the_names_of_earlier_versions_are_found_in_the_network() -> None:
    assert old_names(without_weights(lambda: MASKRCNN.build(5))) == OLD_NAMES


# --- weights as torchvision loads them ---


def detections(model: nn.Module) -> list[Tensor]:
    """What a network finds in an image however little it believes in it."""
    set_image_size(model.eval(), 64, 96)
    for part in model.modules():
        if hasattr(part, "score_thresh"):
            part.score_thresh = 0.0
    with torch.no_grad():
        (output,) = model([torch.rand(3, 64, 80, generator=stream(0, "image"))])
    return list(output.values())


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    found, wanted = detections(ours), detections(theirs)
    assert len(wanted[0]) > 0
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_weights_with_norms_that_learn_give_torchvisions_network(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = lively(models.get_model(name, weights=None, weights_backbone=None))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    found = architectures.get(name, "detection")
    assert same(dense_model(found, tmp_path / "theirs.pth", 1, False), theirs)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_published_weights_give_torchvisions_network(
    name: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, their eps and the layers' names are those with which torchvision itself loads what it publishes."""
    found = architectures.get(name, "detection")
    torch.manual_seed(0)
    build = found.build_frozen if name in FROZEN else found.build
    state = lively(build(found.n_classes)).state_dict()
    if old:
        then = {now: past for past, now in found.old_names.items()}
        state = OrderedDict((renamed(key, then), tensor) for key, tensor in state.items())
        if not then or set(state) == set(build(found.n_classes).state_dict()):
            pytest.skip("has no layer with an older name")
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: OrderedDict(state))
    theirs = models.get_model(name, weights="DEFAULT")
    torch.save(dict(state), tmp_path / "published.pth")
    assert same(dense_model(found, tmp_path / "published.pth", 1, False), theirs)


def renamed(key: str, names: dict[str, str]) -> str:
    layer, _, leaf = key.rpartition(".")
    return f"{names.get(layer, layer)}.{leaf}"


# --- settings of the network ---


def test_sizes_are_set_where_there_are_any() -> None:
    model = detectors.retinanet(3)
    assert image_sizes(model) == ImageSizes(64, 96)
    assert set_image_size(model, None, None) == []
    assert image_sizes(model) == ImageSizes(64, 96)
    assert set_image_size(model, 32, 200) == []
    assert image_sizes(model) == ImageSizes(32, 200)
    fixed = detectors.ssd(3)
    assert set_image_size(fixed, 32, None) == [MIN_SIZE]
    assert set_image_size(fixed, 32, 64) == [MIN_SIZE, MAX_SIZE]
    sizes = image_sizes(fixed)
    assert sizes is not None
    assert (sizes.fixed, sizes.of(1000, 10)) == ((64, 96), (64, 96))
    assert set_image_size(nn.Linear(1, 1), 32, 64) == [MIN_SIZE, MAX_SIZE]


@pytest.mark.parametrize(("given", "missing"), [((100, None), MAX_SIZE), ((None, 60), MIN_SIZE)])
def test_a_size_that_contradicts_the_networks_own_is_refused(given: tuple, missing: str) -> None:
    with pytest.raises(SettingsError, match=rf"the long side cannot be shorter.*{missing} is not set"):
        set_image_size(detectors.fcos(3), *given)


def test_the_size_of_an_image_is_torchvisions() -> None:
    model = detectors.fcos(3)
    sizes = image_sizes(model)
    assert sizes is not None
    for width, height in ((96, 64), (64, 96), (300, 200), (1000, 90), (31, 33)):
        image, _ = model.transform.resize(torch.zeros(3, height, width), None)
        assert sizes.of(width, height) == tuple(image.shape[-2:])


def test_numbers_of_boxes_are_set_where_there_are_any() -> None:
    model = detectors.fasterrcnn(3)
    assert set_box_numbers(model, 8, 20) == []
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 8
    assert model.rpn._pre_nms_top_n == {"training": 40, "testing": 20}
    assert set_box_numbers(detectors.fcos(3), 8, None) == [BOXES]
    assert set_box_numbers(detectors.ssd(3), 8, 20) == [BOXES, PROPOSALS]
    assert memory_settings(model) == [MAX_SIZE, BOXES, PROPOSALS]
    assert memory_settings(detectors.retinanet(3)) == [MAX_SIZE]
    assert memory_settings(detectors.ssd(3)) == []


def test_a_forged_number_of_classes_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    """SSDlite computes while it is built, so that it cannot be built without memory."""
    found = architectures.get("ssdlite320_mobilenet_v3_large", "detection")
    save_packed(found.build(5), tmp_path / "forged.safetensors", ModelInfo(found.name, 1 << 24))
    with pytest.raises(CheckpointError, match=r"16,777,216 classes.* has rows for 5"):
        open_model_file(tmp_path / "forged.safetensors")
