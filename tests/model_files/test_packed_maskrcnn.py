"""Laws of model files of Mask R-CNN: as small as reported, old names and frozen norms wherever a file is read."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from src import convert
from src.architectures import ARCHITECTURES
from src.architectures.maskrcnn import FC6, RESHAPES, head_outputs
from src.common.errors import CheckpointError
from src.common.randomness import stream
from src.compression.quantize.compress import build_quantized
from src.compression.quantize.layers import QuantizedLayer
from src.compression.quantize.plan import make_plan
from src.model_files.inspection import examine
from src.model_files.norms import folded_norms
from src.model_files.open_model_file import open_model_file
from src.model_files.packed import AppliedPermutation, ModelInfo, save_packed
from src.model_files.pth import compressed_state, save_compressed, save_dense
from src.model_files.size import model_size
from src.recipes import quantization_spec
from src.recipes.initial_model import starting_model
from src.run.model_writer import compression_settings
from src.settings import load
from tests.architectures.test_maskrcnn import CONFIG, lively_network, with_old_names
from tests.support.helpers import relative, shuffle

MASKRCNN = ARCHITECTURES["maskrcnn"]
X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Files:
    """A dense network with frozen norms and old names, and what became of it: permuted and quantized, as `.pth` and
    packed."""

    folder: Path
    model: nn.Module
    info: ModelInfo


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Codes and centroids are drawn at random: nothing is clustered."""
    folder, settings = tmp_path_factory.mktemp("maskrcnn"), load(CONFIG)
    dense = lively_network(91, frozen=True)
    torch.save(with_old_names(dense.state_dict()), folder / "dense.pth")
    groups = MASKRCNN.groups(dense)
    drawn = shuffle(dense, groups, reshapes=RESHAPES)
    reshapes = [{name: RESHAPES[name] for name in group.children if name in RESHAPES} for group in groups]
    permutations = tuple(
        AppliedPermutation(parents=g.parents, children=g.children, permutation=p, reshapes=r)
        for g, p, r in zip(groups, drawn, reshapes, strict=True)
    )
    weights = {name: module.weight.detach() for name, module in dense.named_modules() if hasattr(module, "weight")}
    model = build_quantized(copy.deepcopy(dense), make_plan(dense, quantization_spec(settings))).eval()
    draw = stream(0, "codes")
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            layer.set_codes(
                (torch.randn(layer.k, layer.d, generator=draw) * weights[name].std()).half().float(),
                torch.randint(layer.k, (layer.codes_matrix.numel(),), generator=draw),
            )
    info = ModelInfo(
        arch="maskrcnn",
        num_classes=91,
        settings=compression_settings(settings),
        metric={"BoxAP": 36.3, "MaskAP": 33.5},
        permutations=permutations,
        producer="pqf",
    )
    save_packed(model, folder / "model.safetensors", info)
    save_compressed(model, folder / "model.pth")
    torch.save(with_old_names(compressed_state(model)), folder / "old.pth")
    return Files(folder, model, info)


def same_heads(found: nn.Module, wanted: nn.Module, tolerance: float) -> bool:
    with torch.no_grad():
        pairs = zip(head_outputs(found, X), head_outputs(wanted, X), strict=True)
        return all(relative(a, b) <= tolerance for a, b in pairs)


def test_a_packed_file_is_as_small_as_reported_and_gives_the_network_back(files: Files) -> None:
    path = files.folder / "model.safetensors"
    assert model_size(files.model).bits == 55_743_008
    assert path.stat().st_size <= 55_743_008 / 8 * 1.01 + 8 * 1024
    opened = open_model_file(path)
    assert (opened.kind, opened.architecture.name, opened.quantized) == ("packed", "maskrcnn", True)
    assert (opened.info.num_classes, opened.info.metric) == (91, files.info.metric)
    assert same_heads(opened.model, files.model, 1e-4)
    assert opened.info.permutations is not None
    assert files.info.permutations is not None
    for found, wanted in zip(opened.info.permutations, files.info.permutations, strict=True):
        assert (found.parents, found.children, dict(found.reshapes)) == (
            wanted.parents,
            wanted.children,
            dict(wanted.reshapes),
        )
        assert torch.equal(found.permutation, wanted.permutation)


def test_a_published_file_with_old_names_is_recognised_and_packed_like_one_with_new_names(
    files: Files, tmp_path: Path
) -> None:
    for name in ("old", "model"):
        opened = open_model_file(files.folder / f"{name}.pth")
        assert (opened.kind, opened.architecture.name) == ("published", "maskrcnn")
        assert convert.main([str(files.folder / f"{name}.pth"), str(tmp_path / f"{name}.safetensors")]) == 0
    assert (tmp_path / "old.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert convert.main([str(tmp_path / "old.safetensors"), str(tmp_path / "again.pth")]) == 0
    wanted, found = compressed_state(files.model), compressed_state(open_model_file(tmp_path / "again.pth").model)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items() if value.dim() > 1)


def test_a_dense_file_with_old_names_and_frozen_norms_keeps_both_its_function_and_its_norms(
    files: Files, tmp_path: Path
) -> None:
    assert convert.main([str(files.folder / "dense.pth"), str(tmp_path / "dense.safetensors"), "--dense"]) == 0
    opened = open_model_file(tmp_path / "dense.safetensors")
    assert (opened.kind, opened.architecture.name) == ("dense", "maskrcnn")
    norm = opened.model.backbone.body.bn1
    assert isinstance(norm, FrozenBatchNorm2d)
    assert norm.eps == 0
    assert same_heads(opened.model, lively_network(91, frozen=True), 0)


def test_a_dequantized_copy_computes_the_same(files: Files, tmp_path: Path) -> None:
    assert convert.main([str(files.folder / "model.safetensors"), str(tmp_path / "dequantized.pth"), "--dense"]) == 0
    dequantized = open_model_file(tmp_path / "dequantized.pth")
    assert dequantized.kind == "dense"
    assert same_heads(dequantized.model, files.model, 1e-4)


def test_noise_is_measured_in_the_order_of_the_coded_network(files: Files) -> None:
    dense = lively_network(91, frozen=True)
    shuffle(dense, MASKRCNN.groups(dense), reshapes=RESHAPES)
    found = examine(files.folder / "model.safetensors", files.folder / "dense.pth")
    assert any("permutations were applied" in note for note in found.notes)
    quantized_layers = dict(files.model.named_modules())
    rows = {row.name: row for row in found.rows if row.k is not None}
    assert FC6 in rows
    assert len(rows) == 70
    for name, row in rows.items():
        weight, layer = dense.get_submodule(name).weight.detach(), quantized_layers[name]
        assert isinstance(layer, QuantizedLayer)
        noise = relative(layer.dequantize_stored().detach(), weight)
        assert row.sqnr == pytest.approx(-20 * float(torch.tensor(noise, dtype=torch.float64).log10()), abs=1e-6)


def test_a_file_of_another_network_is_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="fit"):
        open_model_file(files.folder / "model.pth", arch="resnet50")
    save_dense(ARCHITECTURES["resnet50"].build(3), tmp_path / "resnet50.pth")
    with pytest.raises(CheckpointError, match="fit"):
        examine(files.folder / "model.safetensors", tmp_path / "resnet50.pth")


@pytest.mark.parametrize("name", ["model.safetensors", "old.pth"])
def test_norms_that_were_frozen_are_frozen_when_training_goes_on(name: str, files: Files) -> None:
    """A file holds them as scale and shift, which is all there is to them."""
    start = starting_model(load(CONFIG), MASKRCNN, files.folder / name, 91, False)
    assert start.compressed is not None
    assert not folded_norms(start.model)
    assert any(isinstance(module, FrozenBatchNorm2d) for module in start.model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in start.model.modules())
    wanted, found = compressed_state(files.model), compressed_state(start.model)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], tensor.to(found[key].dtype)) for key, tensor in wanted.items())
