"""Laws of Mask R-CNN: its groups keep its function, its size is the paper's, old names are the same layers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from src.architectures import ARCHITECTURES
from src.architectures.detectors import set_image_size
from src.architectures.maskrcnn import FC6, OLD_NAMES, RESHAPES, head_outputs
from src.common.errors import CheckpointError, GroupError
from src.common.randomness import stream
from src.compression.permute.groups import Group, check_function
from src.compression.quantize.compress import build_quantized
from src.compression.quantize.layers import QuantizedLayer
from src.compression.quantize.plan import make_plan
from src.model_files.pth import compressed_state, is_compressed, save_compressed, save_dense
from src.model_files.size import ModelSize, model_size
from src.model_files.state_dict import load_state
from src.recipes import load_compressed, quantization_spec
from src.recipes.compress import plan_compression
from src.recipes.initial_model import dense_model
from src.recipes.specs import with_current_names
from src.settings import load
from tests.support.helpers import lively, relative, shuffle

CONFIG = "../config/train_maskrcnn.yaml"
MASKRCNN = ARCHITECTURES["maskrcnn"]
EXACT = 1e-9
"""Only the order of additions changes in float64, through some fifty layers."""


def lively_network(n_classes: int = 5, frozen: bool = False) -> nn.Module:
    """Random weights, norms and biases; eval mode."""
    torch.manual_seed(0)
    model = lively(MASKRCNN.build_frozen(n_classes) if frozen and MASKRCNN.build_frozen else MASKRCNN.build(n_classes))
    draw = stream(0, "biases")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and module.bias is not None:
                module.bias.copy_((torch.rand(module.bias.shape, generator=draw) - 0.5) / 10)
    return model


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """One lively network for the tests that do not change it."""
    return lively_network()


def detections(model: nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
    """What the network finds, few and unfiltered, with the mask logits beside it."""
    set_image_size(model, 64, 96)
    model.rpn._post_nms_top_n = {"training": 40, "testing": 40}
    model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.0, 8
    logits: list[Tensor] = []
    hook = model.roi_heads.mask_predictor.register_forward_hook(lambda _module, _inputs, output: logits.append(output))
    with torch.no_grad():
        found = model(images)
    hook.remove()
    return [*found, {"mask_logits": logits[0]}]


# --- the law ---


@pytest.mark.parametrize("frozen", [False, True])
def test_random_permutations_of_all_groups_keep_boxes_scores_labels_and_mask_logits(frozen: bool) -> None:
    model = lively_network(frozen=frozen).double()
    images = [torch.rand(3, 64, 80, dtype=torch.float64, generator=stream(1, "image"))]
    before, weights = detections(model, images), copy.deepcopy(model.state_dict())
    shuffle(model, MASKRCNN.groups(model), reshapes=MASKRCNN.reshapes)
    after = detections(model, images)
    assert len(before[0]["boxes"]) == 8
    for one, other in zip(before, after, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if name == "labels":
                assert torch.equal(one[name], other[name])
            else:
                assert relative(other[name], one[name]) < EXACT, name
    # every layer took part, but for the values of classes, boxes and anchors, which are outputs
    still = {key for key, value in model.state_dict().items() if value.numel() > 1 and torch.equal(value, weights[key])}
    assert still == {
        "rpn.head.cls_logits.bias", "rpn.head.bbox_pred.bias", "roi_heads.box_predictor.cls_score.bias",
        "roi_heads.box_predictor.bbox_pred.bias", "roi_heads.mask_predictor.mask_fcn_logits.bias",
    }  # fmt: skip


def test_a_forgotten_layer_is_found_although_random_weights_detect_nothing(network: nn.Module) -> None:
    groups = MASKRCNN.groups(network)
    example = torch.randn(1, 3, 64, 64, generator=stream(0, "example"))
    check_function(network, groups[-8:], example, MASKRCNN.reshapes, outputs=MASKRCNN.outputs)
    for wrong in (
        Group(("roi_heads.mask_head.3.0",), ("roi_heads.mask_head.3.0",)),
        Group(("rpn.head.conv.0.0",), ("rpn.head.cls_logits",)),
        Group(("roi_heads.box_head.fc7",), ("roi_heads.box_predictor.bbox_pred",)),
    ):
        with pytest.raises(GroupError, match=r"permutations\[1\]"):
            check_function(network, [groups[-1], wrong], example, MASKRCNN.reshapes, outputs=MASKRCNN.outputs)


def test_the_heads_outputs_depend_on_every_weight(network: nn.Module) -> None:
    model = copy.deepcopy(network)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    sum(output.square().sum() for output in head_outputs(model, torch.randn(1, 3, 64, 64))).backward()  # type: ignore[union-attr]
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_frozen_norms_are_not_trained_and_everything_else_is() -> None:
    assert MASKRCNN.build_frozen is not None
    with torch.device("meta"):
        frozen, learned = MASKRCNN.build_frozen(5), MASKRCNN.build(5)
    assert all(p.requires_grad for p in frozen.parameters())
    extra = {name for name, _ in learned.named_parameters()} - {name for name, _ in frozen.named_parameters()}
    norms = {name for name, module in learned.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {name.rpartition(".")[0] for name in extra} == norms
    assert all(module.eps == 0 for module in frozen.modules() if isinstance(module, FrozenBatchNorm2d))


# --- size ---


def test_the_size_is_the_papers_to_the_bit() -> None:
    settings = load(CONFIG)
    for build in (MASKRCNN.build, MASKRCNN.build_frozen):
        assert build is not None
        with torch.device("meta"):
            model = build(91)
        assert model_size(model) == ModelSize(0, 0, 1_422_544_416, 1_422_544_416)
        plan = make_plan(model, quantization_spec(settings))
        assert [note.partition(": ")[2][:25] for note in plan.notes] == ["named in ignored_modules,"]
        size = model_size(build_quantized(model, plan))
        assert size == ModelSize(50_975_744, 1_699_840, 3_067_424, 1_422_544_416)
        assert size.bits == 55_743_008
        assert (f"{size.megabytes:.2f}", f"{size.ratio:.2f}") == ("6.65", "25.52")


# --- old and new names ---

OLD = """
model:
  arch: maskrcnn
  compression_parameters:
    ignored_modules: [rpn.head.conv, backbone.fpn.inner_blocks.1, backbone.fpn.inner_blocks.1.0, roi_heads.mask_head.mask_fcn2]
    layer_specs:
      roi_heads.mask_head.mask_fcn1: {k: 64, large_subvectors: True}
      roi_heads.mask_head.0.0: {k: 32}
      backbone.fpn.layer_blocks.3: {k: 16}
  permutations:
    - [{parents: [backbone.fpn.inner_blocks.0, backbone.fpn.inner_blocks.0.0, backbone.fpn.inner_blocks.1,
                  backbone.fpn.inner_blocks.2, backbone.fpn.inner_blocks.3]},
       {children: [backbone.fpn.layer_blocks.0, backbone.fpn.layer_blocks.1, backbone.fpn.layer_blocks.2, backbone.fpn.layer_blocks.3]}]
    - [{parents: [roi_heads.mask_head.mask_fcn1]}, {children: [roi_heads.mask_head.mask_fcn2]}]
    - [{parents: [roi_heads.mask_head.mask_fcn4]}, {children: [roi_heads.mask_predictor.conv5_mask]}]
  permutation_specs:
    rpn.head.conv: {optimization: [STOCHASTIC]}
    roi_heads.box_head.fc6: {optimization: [GREEDY]}
"""


def test_old_names_in_a_settings_file_are_the_same_layers(tmp_path: Path, network: nn.Module) -> None:
    (tmp_path / "old.yaml").write_text(OLD)
    given = load(str(tmp_path / "old.yaml"))
    settings = with_current_names(given, MASKRCNN)
    plan = make_plan(network, quantization_spec(settings))
    assert not any("take no effect" in note for note in plan.notes)
    assert {"rpn.head.conv.0.0", "backbone.fpn.inner_blocks.1.0", "roi_heads.mask_head.1.0"}.isdisjoint(plan.layers)
    first = plan.layers["roi_heads.mask_head.0.0"]
    assert (first.k, first.d) == (32, 18)  # k from the new name, blocks from the old
    assert plan.layers["backbone.fpn.layer_blocks.3.0"].k == 16
    intent = plan_compression(settings, MASKRCNN, network, torch.randn(1, 3, 64, 64))
    assert len(intent.groups[0].parents) == 4
    specs = intent.search.permutation_specs
    assert specs["rpn.head.conv.0.0"].optimization == ("STOCHASTIC",)
    assert (specs[FC6].reshape, specs[FC6].optimization) == (RESHAPES[FC6], ("GREEDY",))


def test_every_old_name_is_a_layer_of_this_torchvision(network: nn.Module) -> None:
    modules = dict(network.named_modules())
    assert len(OLD_NAMES) == 13
    for old, now in OLD_NAMES.items():
        assert isinstance(modules[now], nn.Conv2d)
        assert not isinstance(modules.get(old), nn.Conv2d)


def with_old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    new_names = {now: old for old, now in OLD_NAMES.items()}
    return {
        f"{new_names.get(key.rpartition('.')[0], key.rpartition('.')[0])}.{key.rpartition('.')[2]}": value
        for key, value in state.items()
    }


def test_a_dense_file_with_old_names_and_frozen_norms_loads_and_keeps_its_function(tmp_path: Path) -> None:
    model = lively_network(7, frozen=True)
    torch.save(with_old_names(model.state_dict()), tmp_path / "dense.pth")
    loaded = dense_model(MASKRCNN, tmp_path / "dense.pth", 91, True).eval()
    assert isinstance(loaded.backbone.body.bn1, FrozenBatchNorm2d)
    assert loaded.backbone.body.bn1.eps == 0
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(head_outputs(model, x), head_outputs(loaded, x), strict=True))


def test_a_dense_file_with_norms_that_learn_gets_such_norms(tmp_path: Path) -> None:
    model = lively_network(3)
    save_dense(model, tmp_path / "dense.pth")
    loaded = dense_model(MASKRCNN, tmp_path / "dense.pth", 91, True)
    assert isinstance(loaded.backbone.body.bn1, nn.BatchNorm2d)
    assert loaded.roi_heads.box_predictor.cls_score.out_features == 3


def test_our_layer_names_and_shapes_are_torchvisions() -> None:
    with torch.device("meta"):
        theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
        ours = MASKRCNN.build(91).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


def test_a_compressed_file_with_old_names_and_folded_norms_loads_with_the_published_settings(tmp_path: Path) -> None:
    spec = quantization_spec(load(CONFIG))
    model = lively_network(91, frozen=True)
    dense = copy.deepcopy(model)
    quantized = build_quantized(model, make_plan(model, spec)).eval()
    draw = stream(0, "codes")
    modules = dict(dense.named_modules())
    for name, layer in quantized.named_modules():
        if isinstance(
            layer, QuantizedLayer
        ):  # codes drawn at random, centroids from the layer's own scale: nothing is clustered
            book = torch.randn(layer.k, layer.d, generator=draw) * modules[name].weight.std()
            layer.set_codes(book.half().float(), torch.randint(layer.k, (layer.codes_matrix.numel(),), generator=draw))
    save_compressed(quantized, tmp_path / "new.pth")
    torch.save(with_old_names(compressed_state(quantized)), tmp_path / "old.pth")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = head_outputs(quantized, x)
        for file in ("new.pth", "old.pth"):
            loaded = load_compressed(tmp_path / file, MASKRCNN, spec)
            assert isinstance(loaded.backbone.body.bn1, nn.BatchNorm2d)
            # float32 through some fifty layers: the norms' folding rounds once more
            assert all(relative(a, b) < 1e-4 for a, b in zip(head_outputs(loaded, x), wanted, strict=True))


def test_a_file_that_holds_a_layer_under_both_names_is_refused(network: nn.Module) -> None:
    state = dict(network.state_dict())
    state["rpn.head.conv.weight"] = state["rpn.head.conv.0.0.weight"]
    assert not is_compressed(state)
    with pytest.raises(CheckpointError, match="unexpected"):
        load_state(copy.deepcopy(network), MASKRCNN.current_state(state), "both.pth")
