"""Which output of the head stands for which category: new heads, heads with an output for each id, and what runs
leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from src.common.errors import DataError
from src.tasks.coco.classes import (
    FILE_NAME,
    category_ids,
    outputs_of,
    outputs_text,
    outputs_to_make,
    read_outputs,
    with_outputs,
)
from src.tasks.coco.data import CocoSplit, read_coco
from src.tasks.coco.loading import target_of
from src.tasks.coco.results import Detections
from tests.support.coco import contents, entry, rectangle, small_coco, write

HIGH = 74_673_215
"""The first id of a database's table."""


def read(root: Path, ids: dict[int, str], used: list[int]) -> CocoSplit:
    """A training split of one image with an object of each category that is used."""
    objects = [rectangle(number + 1, 1, used[number], [2, 2, 10 + number, 10]) for number in range(len(used))]
    categories = [{"id": number, "name": name} for number, name in ids.items()]
    write(root, "train", contents([entry(1, 40, 30)], objects, categories))
    return read_coco(root, "train")


@pytest.mark.parametrize("ids", [(1, 2, 3), (0, 1, 2), (0, 7, 90), (4, 9, 91), (HIGH, HIGH + 5, -7)])
def test_a_new_head_has_an_output_for_each_category_and_results_have_the_files_ids(
    tmp_path: Path, ids: tuple[int, ...]
) -> None:
    split = read(tmp_path, dict(zip(ids, "abc", strict=True)), list(ids))
    assert outputs_to_make(category_ids([split]), 91) == 4
    outputs = outputs_of(category_ids([split]), 4)
    assert sorted(outputs.values()) == [1, 2, 3]
    assert [number for number, _ in sorted(outputs.items(), key=lambda item: item[1])] == sorted(ids)
    split = with_outputs(split, outputs, 4)
    labels = target_of(split, 0)["labels"]
    assert labels.tolist() == [outputs[number] for number in ids]
    assert split.label_names() == {outputs[number]: name for number, name in zip(ids, "abc", strict=True)}
    assert split.keeping(split.image_ids).label(ids[0]) == outputs[ids[0]]
    found = Detections(split.outputs)
    found.add(1, {"boxes": torch.ones(3, 4), "scores": torch.ones(3), "labels": labels})
    assert [row["category_id"] for row in found.rows()] == list(ids)


def test_in_a_head_with_room_for_them_ids_are_outputs(tmp_path: Path) -> None:
    split = read_coco(small_coco(tmp_path), "train")
    for n_outputs in (5, 91):
        assert outputs_of(split.names, n_outputs) == {1: 1, 2: 2, 4: 4}
        assert with_outputs(split, outputs_of(split.names, n_outputs), n_outputs).label_names() == split.names
    assert outputs_to_make(split.names, 91) == 5
    assert outputs_to_make(range(1, 91), 91) == 91
    assert outputs_of(split.names, 4) == {1: 1, 2: 2, 4: 3}  # a head that can only be for three categories


def test_categories_that_the_head_does_not_have_are_named(tmp_path: Path) -> None:
    split = read_coco(small_coco(tmp_path), "train")
    for n_outputs in (2, 3):
        with pytest.raises(DataError, match=r"4 \(bar\).*head has . classes.*background.*list 3 categories"):
            with_outputs(split, outputs_of(split.names, n_outputs), n_outputs)
    with pytest.raises(DataError, match=r"4 \(bar\)"):
        with_outputs(split, {1: 1, 2: 2}, 91)
    zero = read(tmp_path / "zero", {0: "zero", 1: "one"}, [0, 1])
    with pytest.raises(DataError, match=r"0 \(zero\)"):  # would be background
        with_outputs(zero, outputs_of(zero.names, 5), 5)


def test_a_run_leaves_beside_its_models_what_their_outputs_are(tmp_path: Path) -> None:
    split = read(tmp_path, {HIGH: "crate", 7: "drüm"}, [HIGH])
    outputs = outputs_of(category_ids([split]), 3)
    model = tmp_path / "run" / "trained_models" / "best.pth"
    model.parent.mkdir(parents=True)
    assert read_outputs(model) is None
    left = tmp_path / "run" / FILE_NAME
    left.write_text(outputs_text([split], outputs), encoding="utf-8")
    assert read_outputs(model) == {7: 1, HIGH: 2} == outputs
    assert "drüm" in left.read_text(encoding="utf-8")
    assert read_outputs(tmp_path / "run" / "elsewhere" / "best.pth") is None
    for text in (
        "{",
        "7",
        '[{"id": 1}]',
        '[{"id": 1, "output": 1}, {"id": 2, "output": 1}]',
        '[{"id": "a", "output": 1}]',
    ):
        left.write_text(text)
        with pytest.raises(DataError, match="is damaged"):
            read_outputs(model)
