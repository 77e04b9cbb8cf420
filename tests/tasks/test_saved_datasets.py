"""Data sets of the package `datasets`: the same images as in folders; what is refused, with the package and without."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from src.common.errors import DataError, SettingsError
from src.tasks.classification import Classification, ImageSpec
from src.tasks.decoding import load_rgb
from src.tasks.images import check_images, read_folder
from src.tasks.loading import LoaderSpec
from src.tasks.places import describe
from src.tasks.sources import check_package, is_saved
from src.tasks.splits import list_splits, unlabelled
from tests.support.stored import as_saved, file_bytes, need_datasets
from tests.tasks.test_classification import FakeEngine

KEY = "dataloader.imagenet_path"


@pytest.fixture(scope="module")
def stored(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_saved(tiny_images, tmp_path_factory.mktemp("saved") / "set")


def save(folder: Path, features: dict, **columns) -> Path:
    """A data set of both splits with these columns."""
    need_datasets()
    import datasets

    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    typed = {name: kinds[kind] if kind in kinds else datasets.Value(kind) for name, kind in features.items()}
    one = datasets.Dataset.from_dict(columns, features=datasets.Features(typed))
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(folder))
    return folder


def png(tiny_images: Path) -> dict:
    return {"bytes": (tiny_images / "val" / "class0000" / "0.png").read_bytes(), "path": None}


def refused(where: Path | str, *words: str, splits: tuple[str, ...] = ("val",), **given) -> None:
    with pytest.raises((DataError, SettingsError)) as caught:
        list_splits(where, splits, show_progress=False, **given)
    for word in words:
        assert word in str(caught.value)


def test_a_saved_data_set_holds_what_folders_hold(tiny_images: Path, stored: Path) -> None:
    assert is_saved(stored)
    assert not is_saved(tiny_images)
    for split, found in zip(("train", "val"), list_splits(stored, ("train", "val")), strict=True):
        wanted = read_folder(tiny_images, split, False)
        assert (found.labels, found.classes) == (wanted.labels, wanted.classes)
        for i in reversed(range(len(wanted))):
            assert file_bytes(found.paths[i]) == Path(wanted.paths[i]).read_bytes()
            assert load_rgb(found.paths[i]).tobytes() == load_rgb(wanted.paths[i]).tobytes()
        assert check_images(found, "quick", False) == check_images(found, "full", False) == []
    root, places = unlabelled(stored, "calibration.images")  # those of train
    assert root == stored / "train"
    assert len(places) == 12
    assert unlabelled(stored / "validation", "calibration.images")[1] == list_splits(stored, ["val"])[0].paths


def test_splits_saved_one_by_one_and_in_several_files(tiny_images: Path, tmp_path: Path) -> None:
    need_datasets()
    import datasets

    whole = datasets.load_from_disk(str(as_saved(tiny_images, tmp_path / "whole")))
    whole["train"].shuffle(seed=0).select(range(9)).save_to_disk(str(tmp_path / "set" / "train"), num_shards=4)
    whole["validation"].save_to_disk(str(tmp_path / "set" / "val"))
    train, validation = list_splits(tmp_path / "set", ("train", "val"))
    rows = datasets.load_from_disk(str(tmp_path / "set" / "train")).cast_column("image", datasets.Image(decode=False))
    assert train.labels == rows["label"]
    assert [file_bytes(path) for path in train.paths] == [row["bytes"] for row in rows["image"]]
    assert len({path.partition("#")[0] for path in train.paths}) == 4
    assert len(validation) == 6
    (tmp_path / "set" / "val").rename(tmp_path / "set" / "validation")
    assert list_splits(tmp_path / "set", ["val"])[0].labels == validation.labels


def test_processes_that_load_read_the_same(tiny_images: Path, stored: Path) -> None:
    """Each with tables of its own."""
    splits = list_splits(stored, ("train", "val"))
    file_bytes(splits[0].paths[0])  # what this process opened is not what the others use
    wanted = None
    for index, workers in (
        (splits, 0),
        (splits, 2),
        ([read_folder(tiny_images, s, False) for s in ("train", "val")], 0),
    ):
        loading = LoaderSpec(batch_size=5, num_workers=workers, show_progress=False)
        found = torch.cat(
            [b.images for b in Classification(FakeEngine(), *index, ImageSpec(11, 9), loading).training_batches(1)]
        )
        wanted = found if wanted is None else wanted
        assert torch.equal(found, wanted)


def test_images_that_lie_beside_the_table(tiny_images: Path, tmp_path: Path) -> None:
    """As `load_dataset` leaves the images of a local folder: the table names their files."""
    where = save(tmp_path / "set", {"image": "image", "label": "label"}, image=[png(tiny_images)], label=[0])
    import pyarrow

    file = where / "test" / "data-00000-of-00001.arrow"
    schema = pyarrow.ipc.open_stream(file.read_bytes()).schema
    path = tiny_images / "val" / "class0001" / "0.png"
    rows = [{"bytes": None, "path": str(path)}, {"bytes": None, "path": "/nowhere/1.png"}]
    table = pyarrow.Table.from_pydict({"image": rows, "label": [0, 1]}, schema=schema)
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table)
    (found,) = list_splits(where, ["val"])
    assert file_bytes(found.paths[0]) == path.read_bytes()
    assert check_images(found, "quick", False) == [("/nowhere/1.png", "No such file or directory")]


def test_whole_numbers_are_labels_where_they_are_named(tiny_images: Path, tmp_path: Path) -> None:
    rows = {
        "photo": [png(tiny_images)] * 3,
        "kind": [0, 2, 1],
        "name": ["a", "b", "c"],
        "small": [png(tiny_images)] * 3,
    }
    where = save(tmp_path / "set", {"photo": "image", "kind": "int32", "name": "string", "small": "image"}, **rows)
    refused(where, KEY, "several columns of the type Image", "photo (Image), kind (Value)", "--dataloader.image_column")
    refused(where, "no column of the type ClassLabel", "--dataloader.label_column", image_column="photo")
    refused(where, "no column 'foto'", "photo (Image)", image_column="foto")
    refused(where, "'kind' of", "not of the type Image", image_column="kind")
    refused(where, "column 'name' of", "class_encode_column", image_column="photo", label_column="name")
    (found,) = list_splits(where, ["val"], image_column="photo", label_column="kind")
    assert (found.labels, found.classes) == ([0, 2, 1], ("0", "1", "2"))
    with pytest.raises(DataError, match=r"calibration.images: .* several columns .* remove_columns leaves one"):
        unlabelled(where, "calibration.images")


def test_data_sets_without_images_labels_or_splits(tiny_images: Path, tmp_path: Path) -> None:
    where = save(tmp_path / "text", {"text": "string", "label": "label"}, text=["a"], label=[0])
    refused(where, "no column of the type Image; there are: text (Value), label (ClassLabel)", "cast_column")
    where = save(tmp_path / "empty", {"image": "image", "label": "label"}, image=[], label=[])
    refused(where, "cannot be read")  # by the package itself
    hidden = {"image": [png(tiny_images)] * 2, "label": [1, -1]}
    where = save(tmp_path / "hidden", {"image": "image", "label": "label"}, **hidden)
    refused(where, "1 of 2 images in", "have no label", "#row 1", "meant for tests")
    refused(where / "train", "has no split for val", "there are: train", "train_test_split")
    (where / "test" / "data-00000-of-00001.arrow").write_bytes(b"no table")
    refused(where, f"{where} cannot be read", "Save it again")


def test_an_unreadable_image_is_named_by_its_row(tiny_images: Path, tmp_path: Path) -> None:
    rows = {"image": [png(tiny_images), {"bytes": b"no image", "path": None}, None], "label": [0, 1, 1]}
    (found,) = list_splits(save(tmp_path / "set", {"image": "image", "label": "label"}, **rows), ["val"])
    bad = check_images(found, "quick", False)
    assert [(describe(path)[-6:], why) for path, why in bad] == [
        ("#row 1", "not an image that Pillow can read"),
        ("#row 2", "the file is empty"),
    ]


def test_what_the_package_finds_by_a_name_is_read_where_it_keeps_it(
    tiny_images: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder below the current one stands for a data set of the hub: of tables that are converted, and of files."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, split in (("train", "train"), ("test", "validation")):
        table = tmp_path / "owner" / "tables" / "data" / f"{name}-00000-of-00001.parquet"
        table.parent.mkdir(parents=True, exist_ok=True)
        datasets.load_from_disk(str(stored))[split].to_parquet(str(table))
        shutil.copytree(tiny_images / name.replace("test", "val"), tmp_path / "owner" / "files" / name)
    wanted = [read_folder(tiny_images, split, False) for split in ("train", "val")]
    for where in ("hf:owner/tables", "hf:owner/tables/default", "hf:owner/files"):
        found = list_splits(where, ("train", "val"))
        assert [index.classes for index in found] == [index.classes for index in wanted]
        pictures = [sorted(zip(index.labels, map(file_bytes, index.paths), strict=True)) for index in (*found, *wanted)]
        assert pictures[:2] == pictures[2:]
        assert all(index.root.is_dir() for index in found)
        if "tables" in where:  # which has the same name on every machine
            assert not any(".." in line for index in found for line in index.listed())
    with pytest.raises(DataError, match=r"hf:owner/tables/other cannot be fetched: .*default"):
        list_splits("hf:owner/tables/other", ("train",))


def test_a_name_on_the_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    need_datasets()
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused("hf:nobody/nothing-of-this-name", KEY, "hf:nobody/nothing-of-this-name cannot be fetched", "save_to_disk")


def test_names_on_the_hub_and_the_package_are_checked_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_images: Path
) -> None:
    for wrong in ("hf:", "hf:a/b/c/d", "hf:a b", "hf:/a"):
        with pytest.raises(SettingsError, match=f"{KEY}: .* is no name of a data set; expected hf:OWNER/NAME"):
            check_package(wrong, KEY)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    (tmp_path / "dataset_dict.json").write_text("{}")
    for where in ("hf:owner/name", "hf:name", "hf:owner/name/plain", tmp_path):
        with pytest.raises(
            SettingsError, match=f"{KEY}: .* which is not installed: pip install 'pqf\\[huggingface\\]'"
        ):
            check_package(where, KEY)
        refused(where, KEY, "not installed: pip install 'pqf[huggingface]'")
    check_package(tiny_images, KEY)
    monkeypatch.delitem(sys.modules, "datasets")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # a folder of that name is no package
    (tmp_path / "datasets").mkdir()
    with pytest.raises(SettingsError, match="not installed"):
        check_package("hf:owner/name", KEY)
