"""Which output of a network's head stands for which category of the annotations.

Output 0 is the background. Where the head has room for it, as the published network's for COCO (ids up to 90, 91
outputs), an id is the number of its output. Ids of a database, or from 0, are no such numbers: then the outputs are the
categories in the order of their ids, from 1 on. A training run writes which it is beside its models.

RetinaNet and FCOS know no background; torchvision numbers their outputs like those of all others, so that output 0 is
there and stands for nothing. No object ever has it, and training teaches it to be silent: one rule holds for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from ...common.errors import DataError
from ..images import some
from .checks import is_whole
from .data import KEY, CocoSplit

FILE_NAME = "categories.json"
"""In the folder of a training run: a list of {output, id, name}."""


def category_ids(splits: Iterable[CocoSplit]) -> list[int]:
    """The ids of all categories that the splits list, sorted."""
    return sorted({number for split in splits for number in split.names})


def outputs_to_make(ids: Iterable[int], published: int) -> int:
    """Outputs of a new head for the categories `ids`, where the published network's has `published`."""
    listed = sorted(ids)
    return listed[-1] + 1 if _are_outputs(listed, published) else len(listed) + 1


def outputs_of(ids: Iterable[int], n_outputs: int) -> dict[int, int]:
    """Category id -> output, in a head of `n_outputs`: the id, or its place among the ids where only that fits."""
    listed = sorted(ids)
    if n_outputs == len(listed) + 1 and not _are_outputs(listed, n_outputs):
        return {number: output for output, number in enumerate(listed, start=1)}
    return {number: number for number in listed}


def _are_outputs(listed: list[int], n_outputs: int) -> bool:
    """Whether sorted ids can be the numbers of outputs, the background's 0 left out."""
    return listed[0] >= 1 and listed[-1] < n_outputs


def with_outputs(split: CocoSplit, outputs: Mapping[int, int], n_outputs: int, advice: str = "") -> CocoSplit:
    """The split with labels that are outputs of a head of `n_outputs`; `advice` ends the message of an error.

    Raises:
        DataError: an object's category has no output; the background is none.
    """
    used = {annotation["category_id"] for annotation in split.api.dataset["annotations"]}
    beyond = sorted(number for number in used if not 1 <= outputs.get(number, 0) < n_outputs)
    if beyond:
        listing = some(f"{number} ({split.names[number]})" for number in beyond)
        raise DataError(
            f"{KEY}: {split.source} has objects with category ids that the network's head does not have: {listing}. "
            f"The head has {n_outputs} classes: the background and {n_outputs - 1} categories in the order of their "
            f"ids, or ids 1 to {n_outputs - 1}; the annotations list {len(split.names):,} categories. Use the data the "
            f"model was trained for, or a model made for these.{advice}"
        )
    return replace(split, outputs=dict(outputs))


def outputs_text(splits: Iterable[CocoSplit], outputs: Mapping[int, int]) -> str:
    """The contents of `FILE_NAME`."""
    names = {number: name for split in splits for number, name in split.names.items()}
    rows = [{"output": output, "id": number, "name": names.get(number, "")} for number, output in outputs.items()]
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def read_outputs(model_file: Path) -> dict[int, int] | None:
    """Category id -> output as the run that wrote `model_file` left it; None: it is not in the folder of such a run.

    Raises:
        DataError: what was left there is damaged.
    """
    source = model_file.parent.parent / FILE_NAME
    if model_file.parent.name != "trained_models" or not source.is_file():
        return None
    try:
        rows = json.loads(source.read_bytes())
        outputs = {row["id"]: row["output"] for row in rows}
        if not all(map(is_whole, (*outputs, *outputs.values()))) or len(set(outputs.values())) != len(rows):
            raise ValueError("ids and outputs are different whole numbers")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{source} is damaged ({error}); it says which categories the outputs of {model_file} stand for. Put it "
            "back, or remove it if the categories of the annotations are those of the training"
        ) from error
    return outputs
