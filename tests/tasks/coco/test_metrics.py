"""Average precision equals pycocotools' own; results survive writing; damaged result files are named."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from src.common.errors import DataError, SettingsError
from src.tasks.coco import faster as faster_coco
from src.tasks.coco.masks import encode_masks
from src.tasks.coco.metrics import STATS, Detections, coco_figures, read_results, write_results


def make_api(contents: dict) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = contents
        api.createIndex()
    return api


def scene(annotations: list[dict], side: int = 100) -> COCO:
    """One image of `side` pixels with rectangles; each annotation gives bbox and what differs from an ordinary object
    of category 1."""
    for number, annotation in enumerate(annotations, start=1):
        x, y, w, h = annotation["bbox"]
        polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        for key, value in {
            "id": number,
            "image_id": 7,
            "category_id": 1,
            "iscrowd": 0,
            "area": w * h,
            "segmentation": polygon,
        }.items():
            annotation.setdefault(key, value)
    categories = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
    images = [{"id": number, "file_name": f"{number}.png", "height": side, "width": side} for number in (7, 9)]
    return make_api({"images": images, "annotations": annotations, "categories": categories})


def box(image_id: int, category_id: int, bbox: list[float], score: float) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


@pytest.fixture(scope="module")
def tiny(many_coco: Path) -> COCO:
    return make_api(json.loads((many_coco / "annotations" / "instances_val2017.json").read_text()))


def truth_as_output(api: COCO, image_id: int) -> dict[str, torch.Tensor]:
    """The annotations of an image in the form of a network's output; crowds are left out."""
    annotations = [annotation for annotation in api.imgToAnns.get(image_id, []) if not annotation["iscrowd"]]
    height, width = api.imgs[image_id]["height"], api.imgs[image_id]["width"]
    masks = [torch.from_numpy(api.annToMask(annotation)) for annotation in annotations]
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return {
        "boxes": boxes,
        "labels": torch.tensor([annotation["category_id"] for annotation in annotations], dtype=torch.int64),
        "scores": torch.ones(len(annotations)),
        "masks": torch.stack(masks).float()[:, None] if masks else torch.zeros(0, 1, height, width),
    }


@pytest.fixture(scope="module")
def rows(tiny) -> list[dict]:
    """Detections in half of the images of `tiny`."""
    return noisy(tiny, list(tiny.imgs)[::2])


def noisy(api: COCO, image_ids: list[int], seed: int = 0) -> list[dict]:
    """Detections that are more or less right: shifted and resized boxes, shifted masks, wrong labels, doubles,
    inventions, misses."""
    draw = np.random.default_rng(seed)
    found = Detections()
    categories = api.getCatIds()
    for image_id in image_ids:
        output = truth_as_output(api, image_id)
        again = [n for n in range(len(output["scores"])) for _ in range(draw.integers(0, 4))]
        for name in output:
            output[name] = output[name][again].clone()
        for n in range(len(again)):
            left, top, right, bottom = output["boxes"][n].tolist()
            spread = 0.12 * np.array([right - left, bottom - top] * 2)
            output["boxes"][n] += torch.from_numpy(draw.normal(0, 1, 4) * spread)
            shift = [round(float(v)) for v in draw.normal(0, 0.05, 2) * [bottom - top, right - left]]
            output["masks"][n] = output["masks"][n].roll(shift, (-2, -1))
            if draw.random() < 0.15:
                output["labels"][n] = int(draw.choice(categories))
        output["boxes"][:, 2:] = torch.maximum(output["boxes"][:, 2:], output["boxes"][:, :2])
        output["scores"] = torch.from_numpy(np.round(draw.random(len(again)), 2))  # with ties
        found.add(image_id, output)
    return found.rows()


def own_figures(api: COCO, rows: list[dict], kind: str) -> list[float]:
    """pycocotools' way, from its documentation: loadRes, evaluate, accumulate, summarize."""
    kept = ("image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = make_api(copy.deepcopy(api.dataset))
        evaluation = COCOeval(
            truth, truth.loadRes([{key: row[key] for key in kept} for row in copy.deepcopy(rows)]), kind
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


BACKENDS = [
    "pycocotools",
    pytest.param(
        "faster", marks=pytest.mark.skipif(not faster_coco.installed(), reason="faster-coco-eval is not installed")
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_figures_are_those_of_pycocotools(tiny, rows, kind, backend):
    wanted = own_figures(tiny, rows, kind)
    assert 0.05 < wanted[0] < 0.9  # neither everything nor nothing is right
    found = coco_figures(tiny, rows, kind, list(tiny.imgs), backend=backend)
    assert tuple(found.stats) == STATS
    for name, figure in zip(STATS, wanted, strict=True):
        assert found.stats[name] == pytest.approx(math.nan if figure < 0 else 100 * figure, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_ground_truth_scores_100(tiny, kind, backend):
    found = Detections()
    for image_id in tiny.imgs:
        found.add(image_id, truth_as_output(tiny, image_id))
    figures = coco_figures(tiny, found.rows(), kind, list(tiny.imgs), backend=backend, per_category=True)
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"):
        assert figures.stats[name] == pytest.approx(100, abs=1e-6), name
    present = {annotation["category_id"] for annotation in tiny.anns.values() if not annotation["iscrowd"]}
    for number, category in tiny.cats.items():
        wanted = 100 if number in present else math.nan
        assert figures.per_category[category["name"]] == pytest.approx(wanted, abs=1e-6, nan_ok=True)


def test_an_evaluation_neither_prints_nor_changes_the_annotations(tiny, rows, capsys):
    before = copy.deepcopy(tiny.dataset)
    kept = copy.deepcopy(rows)
    for kind in ("bbox", "segm"):
        coco_figures(tiny, rows, kind, list(tiny.imgs))
    assert tiny.dataset == before
    assert rows == kept
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_detections_at_all(backend):
    api = scene([{"bbox": [10, 10, 20, 20]}])
    for kind in ("bbox", "segm"):
        figures = coco_figures(api, [], kind, [7, 9], backend=backend, per_category=True)
        assert figures.stats["AP"] == 0
        assert figures.stats["AR100"] == 0
        assert math.isnan(figures.stats["APl"])  # there is no large object
        assert figures.per_category["one"] == 0
        assert math.isnan(figures.per_category["two"])


def test_nothing_to_find():
    figures = coco_figures(scene([]), [box(7, 1, [1, 1, 5, 5], 0.5)], "bbox", [7, 9])
    assert all(math.isnan(figure) for figure in figures.stats.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_detections_in_a_crowd_are_not_false(kind, backend):
    """Two detections of higher score in a crowd region do not count; were it an ordinary object they would cost
    precision."""
    crowd = {"bbox": [50, 0, 50, 100], "iscrowd": 1, "segmentation": {"size": [100, 100], "counts": [5000, 5000]}}
    rows = [box(7, 1, [10, 10, 20, 20], 0.5), box(7, 1, [55, 10, 10, 10], 0.9), box(7, 1, [70, 40, 20, 20], 0.8)]
    for row in rows:
        mask = np.zeros((100, 100), dtype=bool)
        x, y, w, h = row["bbox"]
        mask[y : y + h, x : x + w] = True
        row["segmentation"] = {"size": [100, 100], "counts": encode_masks(torch.from_numpy(mask)[None])[0]}
    with_crowd = scene([{"bbox": [10, 10, 20, 20]}, dict(crowd)])
    assert coco_figures(with_crowd, rows, kind, [7], backend=backend).stats["AP"] == pytest.approx(100, abs=1e-6)
    without = scene([{"bbox": [10, 10, 20, 20]}])
    assert coco_figures(without, rows, kind, [7], backend=backend).stats["AP"] == pytest.approx(100 / 3, abs=1e-6)
    ordinary = scene([{"bbox": [10, 10, 20, 20]}, {"bbox": [50, 0, 50, 100]}])
    assert coco_figures(ordinary, rows, kind, [7], backend=backend).stats["AP"] < 40


def test_detections_without_masks_have_no_mask_precision():
    api = scene([{"bbox": [10, 10, 20, 20]}])
    rows = [box(7, 1, [10, 10, 20, 20], 0.5)]
    assert all(math.isnan(figure) for figure in coco_figures(api, rows, "segm", [7]).stats.values())
    assert coco_figures(api, rows, "bbox", [7]).stats["AP"] == pytest.approx(100, abs=1e-6)


def test_only_the_images_that_were_looked_at_count():
    api = scene([{"bbox": [10, 10, 20, 20]}, {"bbox": [10, 10, 20, 20], "image_id": 9}])
    rows = [box(7, 1, [10, 10, 20, 20], 0.5), box(9, 1, [70, 70, 20, 20], 0.9)]
    assert coco_figures(api, rows, "bbox", [7]).stats["AP"] == pytest.approx(100, abs=1e-6)
    assert coco_figures(api, rows, "bbox", [7, 9]).stats["AP"] < 60


def test_categories_of_one_name_are_told_apart():
    api = scene([{"bbox": [10, 10, 20, 20]}])
    api.cats[2]["name"] = "one"
    figures = coco_figures(api, [box(7, 1, [10, 10, 20, 20], 0.5)], "bbox", [7], per_category=True)
    assert set(figures.per_category) == {"one (1)", "one (2)"}
    assert figures.per_category["one (1)"] == pytest.approx(100, abs=1e-6)


def test_lines_name_every_figure():
    api = scene([{"bbox": [10, 10, 20, 20]}])
    figures = coco_figures(api, [box(7, 1, [10, 10, 20, 20], 0.5)], "bbox", [7], per_category=True)
    assert figures.lines() == [
        "box AP 100.0 (AP50 100.0, AP75 100.0; small 100.0, medium -, large -)",
        "box AR 100.0 (with 1 detection per image 100.0, with 10 100.0; small 100.0, medium -, large -)",
        "  box AP one 100.0",
        "  box AP two -",
    ]


def test_unknown_and_missing_backends(monkeypatch):
    api = scene([{"bbox": [10, 10, 20, 20]}])
    with pytest.raises(SettingsError, match="'fast' is not known; there are pycocotools, faster"):
        coco_figures(api, [], "bbox", [7], backend="fast")
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(SettingsError, match="pip install faster-coco-eval"):
        coco_figures(api, [], "bbox", [7], backend="faster")


@st.composite
def mask_stacks(draw):
    n, height, width = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    bits = draw(st.lists(st.booleans(), min_size=n * height * width, max_size=n * height * width))
    masks = torch.tensor(bits).reshape(n, height, width)
    if draw(st.booleans()):  # mostly empty, as real ones are
        masks &= torch.rand(n, height, width, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.1
    return masks


@given(mask_stacks())
@settings(max_examples=200, deadline=None)
def test_encoded_masks_are_those_of_pycocotools_and_come_back(masks):
    for mask, counts in zip(masks.numpy(), encode_masks(masks), strict=True):
        code = {"size": list(mask.shape), "counts": counts}
        assert counts == mask_codec.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        assert (mask_codec.decode(code) == mask).all()
        assert mask_codec.area(code) == mask.sum()
        if mask.any():
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            wanted = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            assert mask_codec.toBbox(code).tolist() == wanted


@given(st.lists(st.tuples(*[st.floats(0, 500, width=32)] * 4), min_size=0, max_size=5))
@settings(max_examples=50, deadline=None)
def test_boxes_become_corner_and_size(corners):
    boxes = torch.tensor([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corners]).reshape(-1, 4)
    found = Detections()
    found.add(3, {"boxes": boxes, "labels": torch.arange(len(boxes)), "scores": torch.rand(len(boxes))})
    rows = found.rows()
    assert [row["category_id"] for row in rows] == list(range(len(boxes)))
    for row, (left, top, right, bottom) in zip(rows, boxes.double().tolist(), strict=True):
        assert row["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=1e-9)
        assert "segmentation" not in row


def test_probability_one_half_is_the_threshold():
    found = Detections()
    masks = torch.tensor([[0.5, 0.51], [0.4, 1.0]])[None, None]
    found.add(
        1,
        {
            "boxes": torch.tensor([[0.0, 0, 2, 2]]),
            "labels": torch.tensor([1]),
            "scores": torch.tensor([0.9]),
            "masks": masks,
        },
    )
    assert mask_codec.decode(found.rows()[0]["segmentation"]).tolist() == [[0, 1], [0, 1]]


def test_rows_of_several_processes_are_those_of_one(tiny, rows):
    parts = [Detections(), Detections()]
    for number, image_id in enumerate(tiny.imgs):
        parts[number % 2].merge(row for row in rows if row["image_id"] == image_id)
    parts[0].merge(parts[1].rows())
    assert parts[0].rows() == rows


def test_results_come_back_from_their_file_and_pycocotools_reads_them(tiny, rows, tmp_path):
    write_results(tmp_path / "deep" / "detections.json", rows)
    assert read_results(tmp_path / "deep" / "detections.json", tiny) == rows
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = make_api(copy.deepcopy(tiny.dataset)).loadRes(str(tmp_path / "deep" / "detections.json"))
    assert len(loaded.anns) == len(rows)
    write_results(tmp_path / "none.json", [])
    assert read_results(tmp_path / "none.json", tiny) == []


def test_a_mask_in_run_lengths_is_accepted():
    api = scene([{"bbox": [10, 10, 20, 20]}])
    row = {"image_id": 7, "category_id": 1, "score": 1, "segmentation": {"size": [100, 100], "counts": [5000, 5000]}}
    found = read_back(api, [row])
    assert mask_codec.decode(found[0]["segmentation"]).sum() == 5000
    assert found[0]["bbox"] == [50, 0, 50, 100]


def read_back(api: COCO, contents: object) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
        return read_results(path, api)


GOOD = {
    "image_id": 7,
    "category_id": 1,
    "score": 0.5,
    "bbox": [1, 1, 5, 5],
    "segmentation": {"size": [100, 100], "counts": [9000, 1000]},
}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "is not a JSON file"),
        ({"annotations": []}, "does not hold a list of detections"),
        ([1], "detection 0: not a map"),
        ([GOOD, {**GOOD, "image_id": 8}], "image_id 8. These are results for other images"),
        ([{**GOOD, "image_id": "7"}], "results for other images"),
        ([{**GOOD, "category_id": 3}], "category_id 3 is not among"),
        ([{key: value for key, value in GOOD.items() if key != "score"}], "detection 0: score missing"),
        ([{"image_id": 7, "category_id": 1, "score": 0.5}], "bbox or segmentation missing"),
        ([{**GOOD, "score": "high"}], "score 'high' is not a number"),
        ('[{"image_id": 7, "category_id": 1, "score": NaN, "bbox": [1, 1, 5, 5]}]', "score nan is not a number"),
        ([{**GOOD, "bbox": [1, 2, 3]}], "is not \\[x, y, width, height\\]"),
        ([{**GOOD, "bbox": [1, 2, -3, 4]}], "is not \\[x, y, width, height\\]"),
        ([{**GOOD, "segmentation": {"size": [50, 200], "counts": [9000, 1000]}}], "the mask's size is \\[50, 200\\], the image's \\[100, 100\\]"),
        ([{**GOOD, "segmentation": {"size": [100, 100], "counts": [9000, 999]}}], "make 9,999 pixels, but its image has 10,000"),
        ([{**GOOD, "segmentation": {"size": [100, 100], "counts": "PPPP9"}}], "pixels|run-length"),
        ([{**GOOD, "segmentation": {"size": [100, 100], "counts": "é"}}], "not a compressed run-length encoding"),
        ([{**GOOD, "segmentation": {"size": [100, 100], "counts": 3}}], "neither text nor a list"),
        ([{**GOOD, "segmentation": [[1, 1, 2, 2, 3, 3]]}], "expected a run-length encoded mask"),
        ([GOOD, {key: value for key, value in GOOD.items() if key != "segmentation"}], "1 of its 2 detections have a segmentation"),
    ],
)  # fmt: skip
def test_bad_result_files(contents, message):
    with pytest.raises(DataError, match=message):
        read_back(scene([{"bbox": [10, 10, 20, 20]}]), contents)


def test_a_missing_result_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_results(tmp_path / "none.json", scene([]))
