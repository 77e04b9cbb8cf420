"""A Mask R-CNN that starts from a classifier: its backbone is the classifier's, its other layers are new. Numbers of
boxes."""

from __future__ import annotations

import logging

import pytest
import torch
from torchvision.models import resnet18, resnet50

from src import architectures
from src.architectures.detectors import set_box_numbers
from src.architectures.maskrcnn import build
from src.common.errors import CheckpointError
from src.model_files.pth import save_dense
from src.recipes.initial_model import dense_model
from tests.support.logs import logged


def test_a_classifier_gives_the_backbone(tmp_path):
    classifier = resnet50(num_classes=7)
    save_dense(classifier, tmp_path / "classifier.pth")
    with logged("the backbone starts from it", logging.INFO):
        model = dense_model(architectures.get("maskrcnn", "detection"), tmp_path / "classifier.pth", 11, True)
    body = model.backbone.body.state_dict()
    wanted = {name: tensor for name, tensor in classifier.state_dict().items() if not name.startswith("fc.")}
    assert body.keys() == wanted.keys()
    assert all(torch.equal(body[name], tensor) for name, tensor in wanted.items())
    assert model.roi_heads.box_predictor.cls_score.out_features == 11


def test_a_classifier_of_another_shape_does_not_fit(tmp_path):
    save_dense(resnet18(num_classes=7), tmp_path / "classifier.pth")
    with pytest.raises(CheckpointError, match="does not fit the network"):
        dense_model(architectures.get("maskrcnn", "detection"), tmp_path / "classifier.pth", 11, False)


def test_a_classifier_is_not_mistaken_for_a_backbone_by_a_classifier(tmp_path):
    classifier = resnet18(num_classes=7)
    save_dense(classifier, tmp_path / "classifier.pth")
    model = dense_model(architectures.get("resnet18", "classification"), tmp_path / "classifier.pth", 11, False)
    assert model.fc.out_features == 7


@pytest.mark.slow
def test_fewer_boxes_are_proposed_and_learned_from():
    model = build(11)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = {"proposed": [], "learned": []}
    model.rpn.register_forward_hook(
        lambda _module, _inputs, output: seen["proposed"].extend(len(boxes) for boxes in output[0])
    )
    model.roi_heads.box_head.register_forward_hook(lambda _module, _inputs, output: seen["learned"].append(len(output)))
    set_box_numbers(model, boxes_per_image=8, proposals=20)
    with torch.no_grad():
        model.eval()(list(images))
        assert max(seen["proposed"]) <= 20
        targets = [
            {
                "boxes": torch.tensor([[5.0, 5, 40, 40]]),
                "labels": torch.tensor([1]),
                "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
            }
        ] * 2
        seen["learned"].clear()
        model.train()(list(images), targets)
        assert 0 < seen["learned"][0] <= 2 * 8
