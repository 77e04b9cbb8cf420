"""Real networks: their groups are found and hold, and equal the hand-written ones where there are such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from src.architectures import ARCHITECTURES
from src.architectures.detector_outputs import detector_outputs
from src.common.errors import GroupError
from src.compression.permute.follow.find import FoundGroups, find_groups
from src.compression.permute.verification import check_groups

MODELS = torchvision.models
CLASSIFIERS = MODELS.list_models(MODELS)
DETECTORS = MODELS.list_models(MODELS.detection)
SEGMENTATION = MODELS.list_models(MODELS.segmentation)
SAMPLE = (
    *("resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "densenet121", "resnext50_32x4d", "vit_b_16", "swin_t"),
    *("googlenet", "squeezenet1_1", "ssdlite320_mobilenet_v3_large", "lraspp_mobilenet_v3_large"),
)
LEAST_GROUPS = {"vit_b_16": 49, "swin_t": 48, "resnext50_32x4d": 53, "densenet121": 120, "shufflenet_v2_x0_5": 80}
"""Known for some, so that a rule that freezes too much is noticed."""
TIMM = (
    *("efficientnet_lite0", "tf_efficientnet_lite0", "efficientnet_b0", "mobilenetv3_small_100"),
    *("mobilenetv4_conv_small", "mobilenetv4_hybrid_medium", "mobilenetv2_100", "mnasnet_100"),
    *("fbnetc_100", "ghostnet_100", "ghostnetv2_100", "hardcorenas_a"),
    *("mixnet_s", "lcnet_050", "tinynet_e", "resnet18d"),
    *("resnet50d", "resnext50_32x4d", "seresnet18", "skresnet18"),
    *("resnest14d", "ecaresnet50t", "rexnet_100", "regnety_002"),
    *("regnetx_002", "regnetz_b16", "densenet121", "dla34"),
    *("dpn68", "inception_v4", "xception41", "hrnet_w18_small"),
    *("vovnet39a", "cspdarknet53", "cspresnet50", "darknet53"),
    *("repvgg_a0", "vgg11_bn", "res2net50_26w_4s", "nfnet_l0"),
    *("dm_nfnet_f0", "eca_nfnet_l0", "nf_resnet50", "convnext_atto"),
    *("convnextv2_atto", "deit_tiny_patch16_224", "vit_tiny_patch16_224", "eva02_tiny_patch14_224"),
    *("cait_xxs24_224", "xcit_nano_12_p16_224", "pit_ti_224", "levit_128s"),
    *("mobilevit_xxs", "mobilevitv2_050", "edgenext_xx_small", "efficientformer_l1"),
    *("efficientformerv2_s0", "poolformer_s12", "pvt_v2_b0", "swin_tiny_patch4_window7_224"),
    *("swinv2_cr_tiny_ns_224", "twins_svt_small", "mixer_s32_224", "resmlp_12_224"),
    *("gmlp_ti16_224", "convmixer_768_32", "coatnet_nano_rw_224", "maxvit_nano_rw_256"),
    *("crossvit_tiny_240", "volo_d1_224", "focalnet_tiny_srf", "fastvit_t8"),
    *("repvit_m0_9", "starnet_s1", "tiny_vit_5m_224", "davit_tiny"),
    *("hiera_tiny_224", "sequencer2d_s", "botnet26t_256", "halonet26t"),
    *("lambda_resnet26t", "gernet_s", "tresnet_m", "selecsls42"),
    *("nest_tiny", "visformer_tiny"),
)


def torchvision_network(name: str) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """With random weights, and one pass of it."""
    torch.manual_seed(0)
    backbone = {} if name in CLASSIFIERS else {"weights_backbone": None}
    late = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # seconds of truncated normals
    small = {"image_size": 64} if name.startswith("vit_") and name != "vit_h_14" else {}
    model = MODELS.get_model(name, weights=None, **backbone, **late, **small)
    sides = {"inception_v3": 299, "ssd300_vgg16": 300, "maxvit_t": 224, "alexnet": 224, "vit_h_14": 224}
    side = sides.get(name, 64)
    x = torch.rand(1, 3, side, side)
    return model, (lambda net: detector_outputs(net, x)) if name in DETECTORS else (lambda net: net(x))


def verified(model: nn.Module, run: Callable[[nn.Module], Any]) -> FoundGroups:
    """The groups, all of which must hold; some must be read by a layer."""
    found = find_groups(model, run)
    assert found.notes == ()
    assert any(group.children for group in found.groups)
    _, dropped = check_groups(model, found.groups, run)
    assert [group.label for group in dropped] == []
    return found


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "maskrcnn"])
def test_groups_equal_the_hand_written_ones(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build(architecture.n_classes)
    x = torch.rand(1, 3, 64, 64)
    found = find_groups(model, lambda net: architecture.outputs(net, x))
    by_hand = architecture.groups(model)
    expected = {(frozenset(group.parents), frozenset(group.children)) for group in by_hand}
    assert {(frozenset(group.parents), frozenset(group.children)) for group in found.groups} == expected
    assert len(found.groups) == len(by_hand)
    assert found.left_alone == ()
    assert found.notes == ()


@pytest.mark.parametrize("name", SAMPLE)
def test_groups_of_a_sample_of_networks_hold(name: str) -> None:
    found = verified(*torchvision_network(name))
    assert len(found.groups) >= LEAST_GROUPS.get(name, 1)
    assert found.left_alone == (("aux1", "aux2") if name == "googlenet" else ())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*CLASSIFIERS, *DETECTORS, *SEGMENTATION} - set(SAMPLE)))
def test_groups_of_every_network_of_torchvision_hold(name: str) -> None:
    found = verified(*torchvision_network(name))
    assert found.left_alone == (("AuxLogits",) if name == "inception_v3" else ())


@pytest.mark.slow
def test_blocks_of_a_grouped_convolution_are_one_group() -> None:
    """ResNeXt-101 64x4d has 64 blocks in each of 33 convolutions."""
    model, run = torchvision_network("resnext101_64x4d")
    found = find_groups(model, run)
    assert len(found.groups) == 104
    assert sum(group.n_blocks == 64 for group in found.groups) == 66


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detectors_whole_pass_shows_the_same_groups_as_its_heads(name: str) -> None:
    """With a threshold so low that boxes are left for all heads."""
    model, run = torchvision_network(name)
    for part in (model, getattr(model, "roi_heads", None)):
        if hasattr(part, "score_thresh"):
            part.score_thresh = -1e9
    image = torch.rand(3, 128, 128)
    whole, heads = find_groups(model, lambda net: net([image])), find_groups(model, run)
    assert {(g.parents, g.children) for g in whole.groups} == {(g.parents, g.children) for g in heads.groups}


def test_other_networks_are_no_detectors() -> None:
    with pytest.raises(GroupError, match="ResNet is no detector"):
        detector_outputs(MODELS.resnet18(), torch.rand(1, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_groups_of_networks_of_timm_hold(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    side = model.default_cfg["input_size"][-1]
    if not model.default_cfg.get("fixed_input_size") and not name.startswith("halonet"):
        side = 96
    x = torch.rand(1, 3, side, side)
    found = find_groups(model, lambda net: net(x))
    _, dropped = check_groups(model, found.groups, lambda net: net(x))
    assert [group.label for group in dropped] == []
    assert any(group.children for group in found.groups)
