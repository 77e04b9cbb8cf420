"""Laws of the file commands: conversions compute the same, inspection counts what is there, packed files need no
settings."""

from __future__ import annotations

import html.parser
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import resnet18

import src.inspect as inspect_command
from src import architectures, convert, evaluate_resnet, train_resnet
from src.compression.quantize.dequantize import dequantized_state
from src.compression.quantize.layers import QuantizedLayer
from src.model_files.beside import likely_figures
from src.model_files.compression_report import read_permutations
from src.model_files.inspection import examine
from src.model_files.norms import TRAINING_VECTORS
from src.model_files.open_model_file import open_model_file
from src.model_files.packed import AppliedPermutation, ModelInfo, load_packed, save_packed
from src.model_files.pth import compressed_state, read_tensors, save_compressed, save_dense
from src.model_files.size import model_size
from src.recipes.compress import FIGURES
from tests.conftest import ROOT
from tests.support import small_runs
from tests.support.helpers import lively, outputs, quantized, relative, shuffle, spec
from tests.support.patience import PATIENCE

CLASSES = 12
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
HOW = spec(256, iterations=0, ignored=["conv1"])


def dense_resnet18() -> nn.Module:
    torch.manual_seed(0)
    return lively(architectures.ARCHITECTURES["resnet18"].build(CLASSES))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense ResNet-18 (`dense.pth`) and what became of it: permuted, quantized, as `.pth` and packed."""
    folder = tmp_path_factory.mktemp("files")
    model = dense_resnet18()
    save_dense(model, folder / "dense.pth")
    groups = architectures.ARCHITECTURES["resnet18"].groups(model)
    drawn = shuffle(model, groups)
    permutations = tuple(
        AppliedPermutation(parents=g.parents, children=g.children, permutation=p, reshapes={})
        for g, p in zip(groups, drawn, strict=True)
    )
    model = quantized(model, HOW).eval()
    save_compressed(model, folder / "model.pth")
    save_packed(
        model,
        folder / "model.safetensors",
        ModelInfo(
            arch="resnet18",
            num_classes=CLASSES,
            settings={"compression_parameters": {"k": 256}},
            metric={"accuracy": 71.5},
            permutations=permutations,
            producer="pqf",
        ),
    )
    return folder


# --- convert ---


def test_every_chain_of_conversions_ends_in_the_same_tensors(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = compressed_state(open_model_file(files / "model.pth").model)
    here = str(files / "model.pth")
    for number, (suffix, flags) in enumerate(
        [(".safetensors", []), (".safetensors", ["--entropy"]), (".pth", []), (".safetensors", []), (".pth", [])]
    ):
        there = str(tmp_path / f"{number}{suffix}")
        assert convert.main([here, there, *flags]) == 0
        assert f"{there}: quantized, {Path(there).stat().st_size:,} bytes" in capsys.readouterr().out
        found = compressed_state(open_model_file(Path(there)).model)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
        here = there


def test_a_packed_file_keeps_what_it_says_when_it_is_repacked(files: Path, tmp_path: Path) -> None:
    assert convert.main([str(files / "model.safetensors"), str(tmp_path / "again.safetensors")]) == 0
    first, second = load_packed(files / "model.safetensors").info, load_packed(tmp_path / "again.safetensors").info
    assert (first.arch, first.num_classes, first.settings, first.metric) == (
        second.arch,
        second.num_classes,
        second.settings,
        second.metric,
    )
    assert first.permutations is not None
    assert second.permutations is not None
    assert all(
        torch.equal(a.permutation, b.permutation) for a, b in zip(first.permutations, second.permutations, strict=True)
    )
    assert second.producer.startswith("pqf 0.")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_dense_copy_is_torchvision_s_and_computes_the_same(suffix: str, files: Path, tmp_path: Path) -> None:
    assert convert.main([str(files / "model.safetensors"), str(tmp_path / f"dense{suffix}"), "--dense"]) == 0
    state = (
        load_file(tmp_path / "dense.safetensors")
        if suffix == ".safetensors"
        else torch.load(tmp_path / "dense.pth", weights_only=True)
    )
    model = resnet18(num_classes=CLASSES)
    model.load_state_dict(state)  # strict: these keys and no others
    wanted = outputs(open_model_file(files / "model.safetensors").model, X)
    assert torch.equal(outputs(model.eval(), X), wanted)
    # and it is read again as what it is
    assert open_model_file(tmp_path / f"dense{suffix}").kind == "dense"


def test_a_decoded_layer_has_at_most_k_distinct_blocks(files: Path) -> None:
    model = open_model_file(files / "model.pth").model
    state = dequantized_state(model)
    assert not any(name.endswith(("codes_matrix", "codebook")) for name in state)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            blocks = state[f"{name}.weight"].reshape(-1, module.d)
            assert len(torch.unique(blocks, dim=0)) <= module.k


@pytest.mark.parametrize("flags", [[], ["--dense"]], ids=["codes", "dense"])
def test_an_onnx_file_computes_pytorch_s_logits(
    flags: list[str], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx", reason="pip install onnx onnxruntime")
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxruntime")
    path = tmp_path / "model.onnx"
    assert convert.main([str(files / "model.safetensors"), str(path), "--image_size", "64", *flags]) == 0
    assert "onnxruntime's logits are PyTorch's to" in capsys.readouterr().out
    opened = open_model_file(files / "model.safetensors").model
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for images in (X, torch.randn(5, 3, 97, 71)):  # other batches and sizes than it was traced with
        (found,) = session.run(None, {"images": images.numpy()})
        wanted = outputs(opened, images).numpy()
        assert np.abs(found - wanted).max() <= 1e-4 * max(1, np.abs(wanted).max())
    graph = onnx.load(str(path)).graph
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    gathers = [node for node in graph.node if node.op_type == "Gather"]
    if flags:
        assert not gathers
        assert path.stat().st_size > model_size(opened).original / 8
    else:
        assert len(gathers) == 20
        assert "layer4.1.conv2.weight" not in sizes
        assert path.stat().st_size < 1.15 * model_size(opened).bits / 8


def test_a_weight_that_was_changed_in_the_graph_is_noticed(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="pip install onnx onnxruntime")
    from src.exports import onnx_weights

    monkeypatch.setattr(
        onnx_weights, "_narrow", lambda codes, k: ((codes.reshape(-1) + 1) % k).numpy().astype(np.uint8)
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(b"what was there")
    assert convert.main([str(files / "model.pth"), str(path), "--image_size", "64", "--overwrite"]) == 1
    assert "logits differ" in capsys.readouterr().err
    assert path.read_bytes() == b"what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.pth", "out.pth"], ["missing.pth does not exist"]),
        (["model.pth", "out.bin"], [".pth, .safetensors, .onnx"]),
        (["model.pth", "dense.pth"], ["already exists", "--overwrite"]),
        (["model.pth", "model.pth", "--overwrite"], ["the file to convert"]),
        (["model.pth", "out.pth", "--entropy"], ["--entropy"]),
        (["dense.pth", "out.safetensors", "--entropy"], ["no codes"]),
        (["model.pth", "out.safetensors", "--arch", "vgg"], ["vgg", "resnet18"]),
        (["model.pth", "out.safetensors", "--arch", "resnet50"], ["does not fit"]),
        (["model.safetensors", "out.pth", "--arch", "resnet34"], ["resnet18", "resnet34"]),
    ],
    ids=lambda value: "-".join(value).replace("/", "") if isinstance(value, list) else None,
)
def test_conversions_that_cannot_be_are_refused(
    arguments: list[str], words: list[str], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(files.iterdir())
    assert convert.main([str(files / a) if "." in a else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert all(word in error for word in words), error
    assert sorted(files.iterdir()) == before


# --- inspect ---


def test_the_table_counts_what_is_there(files: Path) -> None:
    found = examine(files / "model.safetensors")
    model = open_model_file(files / "model.pth").model
    assert sum(row.bits for row in found.rows) == found.size.bits == model_size(model).bits
    assert [row.name for row in found.rows] == [
        name for name, m in model.named_modules() if list(m.named_parameters(recurse=False))
    ]
    state = compressed_state(model)
    coded_rows = [row for row in found.rows if row.k is not None]
    assert len(coded_rows) == 20
    for row in coded_rows:
        codes, codebook = state[f"{row.name}.codes_matrix"].int().flatten() % 65536, state[f"{row.name}.codebook"]
        counts = np.bincount(codes.numpy(), minlength=len(codebook))
        share = counts[counts > 0] / counts.sum()
        assert row.entropy == pytest.approx(-(share * np.log2(share)).sum())
        assert (row.k, row.d) == tuple(codebook.shape)
        assert row.n_codes == len(codes) == sum(row.frequencies)
        assert row.used == len(np.unique(codebook.numpy()[np.unique(codes.numpy())], axis=0))
        assert math.prod(row.shape) == row.n_codes * row.d
        assert row.codes_bits == row.n_codes * int(math.log2(row.k))


def test_equal_blocks_count_once(tmp_path: Path) -> None:
    model = quantized(dense_resnet18(), HOW).eval()
    layer = model.get_submodule("layer1.0.conv1")
    with torch.no_grad():
        layer.codebook[3] = layer.codebook[5] = layer.codebook[7]
    layer.codes_matrix.view(-1)[:6] = torch.tensor([3, 5, 7, 3, 5, 7])
    layer.codes_matrix[layer.codes_matrix == 9] = 10
    save_compressed(model, tmp_path / "model.pth")
    row = next(row for row in examine(tmp_path / "model.pth").rows if row.name == "layer1.0.conv1")
    used = set(layer.codes_matrix.flatten().tolist())
    assert row.used == len(used) - 2


def test_noise_is_measured_against_the_dense_network_in_the_order_of_the_coded_one(files: Path) -> None:
    known = examine(files / "model.safetensors", files / "dense.pth")
    unknown = examine(files / "model.pth", files / "dense.pth")
    dense = dense_resnet18()
    shuffle(dense, architectures.ARCHITECTURES["resnet18"].groups(dense))
    state = dequantized_state(open_model_file(files / "model.pth").model)
    for row in known.rows:
        if row.k is not None:
            wanted = -20 * math.log10(
                relative(state[f"{row.name}.weight"], dense.get_submodule(row.name).weight.detach())
            )
            assert row.sqnr == pytest.approx(wanted, abs=1e-6)
            assert row.sqnr > 0.5
    assert any("not known" in note for note in unknown.notes)
    fc = next(row for row in unknown.rows if row.name == "layer4.1.conv2")
    assert fc.sqnr is not None
    assert fc.sqnr < 0


def test_a_dense_file_is_inspected_too(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_command.main([str(files / "dense.pth")]) == 0
    printed = capsys.readouterr().out
    assert "dense, resnet18" in printed
    assert "layer4.1.conv2" in printed
    assert examine(files / "dense.pth").size.codes == 0


class Page(html.parser.HTMLParser):
    """Collects the text and checks that every element is closed in order."""

    VOID = ("meta", "rect", "line", "polygon", "i")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:  # noqa: ARG002 (of a protocol)
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:  # noqa: ARG002 (of a protocol)
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize(("name", "against"), [("model.safetensors", True), ("model.pth", False), ("dense.pth", False)])
def test_the_page_holds_the_table_and_figures_and_needs_nothing_else(
    name: str, against: bool, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.html"
    flags = ["--against", str(files / "dense.pth")] if against else []
    assert inspect_command.main([str(files / name), "--html", str(path), *flags]) == 0
    printed = capsys.readouterr().out
    text = path.read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.tags.count("svg") == 2
    assert page.tags.count("tr") == 1 + len(examine(files / name).rows)
    assert "script" not in page.tags
    assert not re.search(r"https?://|src=|href=", text)
    for row in re.findall(r"^(layer4\.1\.conv2) +(\S+) +(\S+)", printed, re.M):
        assert all(f"<td>{cell}</td>" in text for cell in row)
    assert ("SQNR" in text) == against


def test_names_from_a_file_cannot_put_elements_into_the_page(files: Path, tmp_path: Path) -> None:
    packed = open_model_file(files / "model.safetensors")
    evil = "<script>alert(1)</script>"
    info = ModelInfo(
        arch="resnet18", num_classes=CLASSES, settings={evil: evil}, metric={evil: 1.0}, permutations=(), producer=evil
    )
    save_packed(packed.model, tmp_path / "<b>.safetensors", info)
    assert inspect_command.main([str(tmp_path / "<b>.safetensors"), "--html", str(tmp_path / "page.html")]) == 0
    page = Page()
    page.feed((tmp_path / "page.html").read_text())
    assert not {"script", "b>.safetensors"} & set(page.tags)
    assert any(evil in text for text in page.texts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.pth"], "does not exist"),
        (["model.pth", "--html", "page.txt"], ".html"),
        (["model.pth", "--against", "model.safetensors"], "compressed"),
        (["model.pth", "--against", "missing.pth"], "--against"),
    ],
)  # fmt: skip
def test_inspections_that_cannot_be_are_refused(
    arguments: list[str], words: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect_command.main([str(files / a) if a[0] != "-" else a for a in arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_module_called_inspect_never_hides_python_s_own(files: Path) -> None:
    """Python started in src/, or with src/ on its path, still finds the standard library's inspect."""
    code = "import inspect, dataclasses; print(inspect.signature(dataclasses.dataclass) is not None, inspect.__file__)"
    for cwd, command in (
        (ROOT / "src", ["-c", code]),
        (ROOT, ["-c", f"import sys; sys.path.insert(0, 'src'); {code}"]),
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        assert done.stdout.startswith("True "), done.stderr
        assert str(ROOT / "src") not in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "src.inspect", str(files / "model.pth")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "entropy of all codes" in done.stdout


# --- training and evaluation with packed files ---

TRAINING = [*small_runs.training(batch=8, workers=0, sls=50, k_means=2), "--epochs", "1"]
SMALL = [*TRAINING, "--model.compression_parameters.large_subvectors", "True"]
EVALUATE = small_runs.evaluation()


@pytest.fixture(scope="module")
def run(small_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with large blocks that writes both formats."""
    output = tmp_path_factory.mktemp("run")
    flags = ["--dataloader.imagenet_path", str(small_images), "--output_path", str(output), "--save_format", "both"]
    assert train_resnet.main([*SMALL, *flags]) == 0
    return output


def test_a_run_writes_both_formats_with_everything_in_the_packed_one(run: Path) -> None:
    names = sorted(path.name for path in (run / "trained_models").iterdir())
    assert names == sorted(f"{stem}.{suffix}" for stem in ("0", "1", "best") for suffix in ("pth", "safetensors"))
    results = json.loads((run / "results.json").read_text())
    best = load_packed(run / "trained_models" / "best.safetensors")
    assert best.info.metric is not None
    assert best.info.metric["accuracy"] == results["best"]
    assert len(json.dumps(best.info.metric)) <= len(json.dumps(likely_figures(FIGURES["classification"])))
    assert load_packed(run / "trained_models" / "1.safetensors").info.metric is None
    assert best.info.settings is not None
    assert best.info.settings["compression_parameters"]["large_subvectors"] is True
    assert best.info.settings["compression_parameters"]["layer_specs"] == {"fc": {"k": 2048}}
    assert (run / "trained_models" / "best.safetensors").stat().st_size <= results["bits"] / 8 * 1.01 + 8192
    ours, theirs = best.state(), read_tensors(run / "trained_models" / "best.pth")
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[key].int(), value.int() & 0xFFFF)
        if key.endswith("codes_matrix")
        else torch.equal(ours[key], value)
        for key, value in theirs.items()
        if not key.endswith(TRAINING_VECTORS)  # which are rounded, to different steps
    )
    # the permutations that are named are those that the run reported
    listed = [g for g in json.loads((run / "compression.json").read_text())["groups"] if g["permutation"] is not None]
    assert best.info.permutations is not None
    assert [(p.permutation.tolist(), list(p.parents)) for p in best.info.permutations] == [
        (g["permutation"], g["parents"]) for g in listed
    ]
    assert len(listed) > 3
    # so are the weights that stay dense, with the reason
    (left,) = json.loads((run / "compression.json").read_text())["dense"]
    assert (left["name"], left["n_values"], left["reason"]) == ("conv1", 9408, "named in ignored_modules")
    assert 0 < left["share"] < 0.01
    note = f"conv1: named in ignored_modules, left uncompressed ({100 * left['share']:.2f} % of all weights)"
    assert note in examine(run / "trained_models" / "best.safetensors").notes
    (unknown,) = examine(run / "trained_models" / "best.pth").notes
    assert unknown.startswith("conv1: was not quantized when the file was made, left uncompressed")
    # the `.pth` beside compression.json is known to have them too
    assert len(open_model_file(run / "trained_models" / "best.pth").info.permutations or ()) == len(listed)


def test_a_packed_file_is_evaluated_without_any_other_setting(
    run: Path, small_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*EVALUATE, "--dataloader.imagenet_path", str(small_images), "--model.state_dict_compressed"]
    assert (
        evaluate_resnet.main([*flags, str(run / "trained_models" / "best.safetensors")]) == 0
    )  # the settings file says small blocks
    said = capsys.readouterr()
    results = json.loads((run / "results.json").read_text())
    assert f"top-1 accuracy: {results['best']:.2f} %" in said.out
    assert "what the settings file says about that is not used" in said.out
    assert evaluate_resnet.main([*flags, str(run / "trained_models" / "best.pth")]) == 2  # a .pth needs the settings
    assert "large_subvectors" in capsys.readouterr().err


def test_a_packed_file_of_another_architecture_is_evaluated_too(
    small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = quantized(lively(architectures.ARCHITECTURES["resnet34"].build(3)), HOW).eval()
    save_packed(model, tmp_path / "r34.safetensors", ModelInfo("resnet34", 3))
    flags = [
        *EVALUATE,
        "--dataloader.imagenet_path",
        str(small_images),
        "--model.state_dict_compressed",
        str(tmp_path / "r34.safetensors"),
    ]
    assert evaluate_resnet.main(flags) == 0
    assert "model: resnet34, " in capsys.readouterr().out
    assert evaluate_resnet.main([*flags, "--model.arch", "resnet34"]) == 0
    capsys.readouterr()
    assert evaluate_resnet.main([*flags, "--model.arch", "resnet18"]) == 2
    assert "holds a resnet34" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        (["large_subvectors", "True"], 0),  # what the file says
        (["large_subvectors", "False"], 2),
        (["k", "128"], 2),
        (["layer_specs.layer1.0.conv1.k", "32"], 2),
        (["ignored_modules", "[]"], 2),
    ],
)
def test_a_command_that_contradicts_the_packed_file_is_refused(
    flags: list[str], status: int, run: Path, small_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *EVALUATE,
        "--dataloader.imagenet_path",
        str(small_images),
        "--model.state_dict_compressed",
        str(run / "trained_models" / "best.safetensors"),
    ]
    key = "--model.compression_parameters"
    if flags[0] != "large_subvectors":
        arguments += [f"{key}.large_subvectors", "True"]
    assert evaluate_resnet.main([*arguments, f"{key}.{flags[0]}", flags[1]]) == status
    error = capsys.readouterr().err
    assert ("contradict" in error) == (status == 2)
    assert "note: " not in error


def test_only_packed_files_are_written_if_asked_and_dense_ones_stay_plain(small_images: Path, tmp_path: Path) -> None:
    flags = ["--dataloader.imagenet_path", str(small_images), "--save_format", "safetensors", "--epochs", "0"]
    assert train_resnet.main([*SMALL, *flags, "--output_path", str(tmp_path / "quantized")]) == 0
    assert sorted(p.name for p in (tmp_path / "quantized" / "trained_models").iterdir()) == [
        "0.safetensors",
        "best.safetensors",
    ]
    dense = [*TRAINING, *flags, "--model.use_compression", "False"]
    assert train_resnet.main([*dense, "--output_path", str(tmp_path / "dense")]) == 0
    state = load_file(tmp_path / "dense" / "trained_models" / "best.safetensors")
    resnet18(num_classes=3).load_state_dict(state)


@pytest.mark.parametrize(
    "contents",
    [
        "",
        "{",
        "[]",
        '{"groups": 3}',
        '{"groups": [{"permutation": [0]}]}',
        '{"groups": [{"permutation": "x", "parents": 1}]}',
    ],
)
def test_a_table_that_does_not_name_the_permutations_means_not_known(contents: str, tmp_path: Path) -> None:
    (tmp_path / "compression.json").write_text(contents)
    assert read_permutations(tmp_path / "compression.json") is None
