"""Groups of channels in files: a run's report and packed file name them in a few numbers, and the dense network can be
permuted alike from either."""

from __future__ import annotations

import base64
import copy
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import src.inspect as inspect_command
from src import architectures, convert, train_resnet
from src.architectures.architecture import Architecture
from src.common.errors import CheckpointError, GroupError
from src.common.registry import Entry
from src.compression.permute.channels import ChannelGroup, Places
from src.compression.permute.permute import permute
from src.compression.quantize.plan import make_plan
from src.model_files.compression_report import read_permutations, report_text
from src.model_files.inspection import examine
from src.model_files.packed import AppliedPermutation, ModelInfo, load_packed, save_packed
from src.model_files.pth import save_dense
from src.model_files.stored_places import LONGEST, apply_stored, deflated, inflated, read_rows, stored
from tests.model_files.test_hostile import NASTY, altered, complaint, fields_of, forged, header_of, with_fields
from tests.model_files.test_hostile import places as paths_of
from tests.support import small_runs
from tests.support.channel_networks import NETWORKS, DenseBlock, columns, correlated, rows
from tests.support.helpers import lively, outputs, quantized, relative, spec

HOW = spec(8, large=True)


def block(n: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return correlated(lively(DenseBlock(classes=n)))


DENSE = Architecture(
    name="dense_block",
    task="classification",
    build=block,
    weights_url="",
    n_classes=3,
    head="fc",
    groups=lambda model: model.groups(),
)


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    entry = Entry("tests.model_files.test_stored_places:DENSE", "a small network", {"task": "classification"})
    with architectures.ARCHITECTURES.added("dense_block", entry):
        yield


def applied(model: nn.Module, groups: list[ChannelGroup]) -> tuple[AppliedPermutation, ...]:
    """Search the groups and permute the model; what a file says of it."""
    results = permute(model, groups, make_plan(model, HOW).sizes, show_progress=False)
    return tuple(
        AppliedPermutation((), (), result.permutation, {}, stored(group), group.n_blocks)
        for group, result in zip(groups, results, strict=True)
        if result.permutation is not None
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_places_survive_being_stored_and_take_few_numbers(name: str) -> None:
    for group in NETWORKS[name]().groups():
        held = stored(group)
        assert all(places.listed is None for places in held)
        again = read_rows(json.loads(json.dumps([places.row() for places in held])), group.width)
        assert again == held
        found = {
            (p.tensor, p.shape, p.reads): p.positions.tolist()
            for s in again
            for t in s.tensors
            for p in [s.places(t, group.width)]
        }
        assert found == {(p.tensor, p.shape, p.reads): p.positions.tolist() for p in group.places}


@settings(max_examples=100, deadline=None)
@given(data=st.data(), n=st.integers(1, 12), r=st.integers(1, 4))
def test_any_positions_survive_being_stored(data: st.DataObject, n: int, r: int) -> None:
    positions = data.draw(st.permutations(range(n * r + 5)))[: n * r]
    if data.draw(st.booleans()):
        positions.sort()
    places = Places("a.b", (n * r + 5, 1), torch.tensor(positions).reshape(n, r), False)
    (held,) = read_rows([s.row() for s in stored(ChannelGroup("", (places,)))], n)
    assert held.places("a.b", n).positions.tolist() == places.positions.tolist()
    assert held.n_positions == n * r


@pytest.mark.parametrize("name", NETWORKS)
def test_a_dense_network_is_permuted_alike_from_what_a_file_or_a_report_says(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = correlated(lively(NETWORKS[name]()))
    x = torch.randn(2, 3, 8, 9)
    model, alike, groups = copy.deepcopy(dense), copy.deepcopy(dense), dense.groups()
    wanted = outputs(dense, x)
    plan = make_plan(model, HOW)
    results = permute(model, groups, plan.sizes, show_progress=False)
    (tmp_path / "compression.json").write_text(report_text([], groups, results, {}))
    from_report = read_permutations(tmp_path / "compression.json")
    assert from_report is not None
    permuted_state = copy.deepcopy(model.state_dict())
    save_packed(quantized(model, HOW), tmp_path / "model.safetensors", ModelInfo(permutations=from_report))
    read = load_packed(tmp_path / "model.safetensors").info.permutations
    assert read is not None
    assert [(r.places, r.n_blocks, r.permutation.tolist()) for r in read] == [
        (r.places, r.n_blocks, r.permutation.tolist()) for r in from_report
    ]
    for one in read:
        apply_stored(alike, one.places or (), one.permutation, one.n_blocks)
    assert all(torch.equal(value, permuted_state[key]) for key, value in alike.state_dict().items())
    assert relative(outputs(alike, x), wanted) < 1e-5


def test_a_run_whose_architecture_has_groups_of_channels(
    small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, saved, repacked and compared with the dense network: with its permutations each layer is nearer to it."""
    run = tmp_path / "run"
    flags = ["--model.arch", "dense_block", "--model.permutations", "null", "--epochs", "1"]
    flags += ["--save_format", "both", "--output_path", str(run), "--dataloader.imagenet_path", str(small_images)]
    assert train_resnet.main([*small_runs.training(8, 0, 50, 2), *flags]) == 0, capsys.readouterr().out
    packed, pth = run / "trained_models" / "best.safetensors", run / "trained_models" / "best.pth"
    report = json.loads((run / "compression.json").read_text())
    assert [group["readers"] for group in report["groups"]][-1] == ["fc"]
    info = load_packed(packed).info
    assert info.permutations is not None
    assert len(info.permutations) == 4
    assert all(len(one.places or ()) >= 2 for one in info.permutations)
    save_dense(block(), tmp_path / "dense.pth")
    assert convert.main([str(packed), str(tmp_path / "again.safetensors"), "--entropy"]) == 0
    noise = []
    for path in (packed, pth, tmp_path / "again.safetensors"):
        assert inspect_command.main([str(path), "--against", str(tmp_path / "dense.pth")]) == 0
        assert "4 permutations were applied to the dense network" in capsys.readouterr().out
        noise.append([row.sqnr for row in examine(path, tmp_path / "dense.pth").rows if row.sqnr is not None])
    assert noise[0] == noise[1] == noise[2]
    # the same codes, compared without the permutations
    unpermuted = tmp_path / "unpermuted.pth"
    unpermuted.write_bytes(pth.read_bytes())
    without = [row.sqnr for row in examine(unpermuted, tmp_path / "dense.pth").rows if row.sqnr is not None]
    assert sum(noise[0]) > sum(without) + 2


# --- what anyone may have written ---

GOOD = [places.row() for places in stored(DenseBlock().groups()[0])]


def test_places_that_are_not_as_they_are_written_are_refused() -> None:
    draw, cases = random.Random(0), 0
    assert read_rows(GOOD, 8) == stored(DenseBlock().groups()[0])
    forgeries = [altered(GOOD, at, value) for at in paths_of(GOOD) for value in NASTY]
    for forgery in draw.sample(forgeries, 3000):
        error, found = complaint_of_rows(forgery)
        cases += 1
        if error is None:  # another name, place or step that a larger tensor could have
            assert all(s.n_positions <= torch.Size(s.shape).numel() for s in found), forgery
    assert cases == 3000


def complaint_of_rows(found: object) -> tuple[str | None, tuple]:
    try:
        return None, read_rows(found, 8)
    except ValueError as error:
        return str(error), ()


SHAPE = [1, 8, 1, 1]
REFUSED_ROWS = {
    "more channels than the group has": [["m", "w"], SHAPE, 1, 0, [[7, 1]], []],
    "beyond the last position": [["m", "w"], SHAPE, 1, 1, [[8, 1]], []],
    "far beyond": [["m", "w"], SHAPE, 1, 0, [[8, 2**40]], []],
    "more positions than there are": [["m", "w"], [2**20, 2**20], 1, 0, [[8, 1]], [[2**30, 1], [2**30, 1]]],
    "steps back": [["m", "w"], SHAPE, 1, 7, [[8, -1]], []],
    "no step": [["m", "w"], SHAPE, 1, 0, [[8, 0]], []],
    "no tensor": [["m"], SHAPE, 1, 0, [[8, 1]], []],
    "a tensor twice": [["m", "w", "w"], SHAPE, 1, 0, [[8, 1]], []],
    "an endless shape": [["m", "w"], [2**30] * 8, 1, 0, [[8, 1]], []],
    "too deep": [["m", "w"], SHAPE, 1, 0, [[8, 1]], [[1, 1]] * 9],
    "not a whole number of channels listed": [["m", "w"], SHAPE, 1, [0, 1, 2]],
    "a position listed that is not there": [["m", "w"], SHAPE, 1, [0, 1, 2, 3, 4, 5, 6, 8]],
    "nothing listed": [["m", "w"], SHAPE, 1, []],
}


@pytest.mark.parametrize("case", REFUSED_ROWS)
def test_a_row_is_refused_with(case: str) -> None:
    with pytest.raises(ValueError):
        read_rows([REFUSED_ROWS[case]], 8)


def test_one_tensor_cannot_be_listed_again_and_again() -> None:
    row = [["m", "w"], SHAPE, 1, 0, [[8, 1]], []]
    assert len(read_rows([row], 8)) == 1
    with pytest.raises(ValueError, match="more positions"):
        read_rows([row, row], 8)


MISFITS = {
    "a missing tensor": [["stem", "wait"], [8, 1, 1, 1], 0, 0, [[8, 1]], []],
    "a module for a tensor": [["", "stem"], [8, 1, 1, 1], 0, 0, [[8, 1]], []],
    "a private attribute": [["stem.__class__", "weight"], [8, 1, 1, 1], 0, 0, [[8, 1]], []],
    "a larger tensor, of which nothing is counted out": [
        ["stem", "weight"],
        [2**23, 2**23],
        0,
        0,
        [[8, 1]],
        [[2**40 // 2**10, 8]],
    ],
    "a tensor of another rank": [["stem", "weight"], [8, 1], 0, 0, [[8, 1]], []],
    "two channels in one place": [["stem", "weight"], [8, 3, 1, 1], 0, 0, [[8, 1]], [[2, 1]]],
    "one place listed twice": [["stem", "weight"], [8, 1, 1, 1], 0, [0, 1, 2, 3, 4, 5, 6, 6]],
}


@pytest.mark.parametrize("case", MISFITS)
def test_places_that_the_dense_network_does_not_have_are_an_error_of_the_file(case: str, tmp_path: Path) -> None:
    model = block()
    before = copy.deepcopy(model.state_dict())
    held = read_rows([MISFITS[case]], 8)
    with pytest.raises(GroupError):
        apply_stored(model, held, torch.arange(8).flip(0), 1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    save_dense(model, tmp_path / "dense.pth")
    info = ModelInfo(
        arch="dense_block", num_classes=3, permutations=(AppliedPermutation((), (), torch.arange(8), {}, held),)
    )
    save_packed(quantized(model, HOW), tmp_path / "model.safetensors", info)
    with pytest.raises(CheckpointError, match="cannot be permuted like the quantized network"):
        examine(tmp_path / "model.safetensors", tmp_path / "dense.pth")


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path, model = tmp_path_factory.mktemp("packed") / "model.safetensors", block()
    permutations = applied(model, model.groups())
    save_packed(quantized(model, HOW), path, ModelInfo(arch="dense_block", num_classes=3, permutations=permutations))
    return path.read_bytes()


def test_forged_groups_in_a_packed_file_are_refused_or_read(contents: bytes, tmp_path: Path) -> None:
    header, data = header_of(contents)
    text = json.loads(fields_of(header)["permutations"])
    tree, path, refused = inflated(text), tmp_path / "model.safetensors", 0
    values = [altered(tree, at, value) for at in paths_of(tree) for value in NASTY]
    forgeries = [deflated(value) for value in random.Random(1).sample(values, 150)]
    bomb = base64.b64encode(zlib.compress(b"[" * (4 * LONGEST))).decode()
    forgeries += [bomb, deflated([[[]] * 100_000] * 10), "", "=", "x" * 1000, text[:-8], text + text, text[::-1]]
    forgeries.append(base64.b64encode(zlib.compress(b"[" * 100_000)).decode())
    for forgery in forgeries:
        path.write_bytes(forged(with_fields(header, {"permutations": json.dumps(forgery)}), data))
        error, _ = complaint(lambda: load_packed(path), CheckpointError)
        refused += error is not None
    assert refused > 0.9 * len(forgeries)


def test_a_file_with_places_has_a_version_that_earlier_programs_refuse(contents: bytes, tmp_path: Path) -> None:
    assert fields_of(header_of(contents)[0])["format_version"] == "4"
    model = block()
    plain = (AppliedPermutation(("stem",), ("fc",), torch.arange(8), {}),)
    save_packed(quantized(model, HOW), tmp_path / "plain.safetensors", ModelInfo(permutations=plain))
    fields = fields_of(header_of((tmp_path / "plain.safetensors").read_bytes())[0])
    assert fields["format_version"] == "3"
    assert isinstance(json.loads(fields["permutations"]), list)


def test_a_report_with_damaged_places_is_not_known(tmp_path: Path) -> None:
    model = block()
    groups = [ChannelGroup("one", (rows("stem.weight", range(8), 8), columns("fc.weight", range(8), 32, rank=2)))]
    results = permute(model, groups, {"fc": 4}, show_progress=False)
    report = json.loads(report_text([], groups, results, {}))
    path = tmp_path / "compression.json"
    path.write_text(json.dumps(report))
    assert read_permutations(path) is not None
    for key, value in (
        ("places", []),
        ("places", None),
        ("places", [[["m", "w"], [3], 0, 0, [[8, 1]], []]]),
        ("n_blocks", "x"),
    ):
        path.write_text(json.dumps({"groups": [{**report["groups"][0], key: value}]}))
        assert read_permutations(path) is None
