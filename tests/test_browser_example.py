"""The page of examples/browser in a real browser: what it makes of dropped pictures is what PyTorch makes of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from examples.browser import prepare
from src.model_files.open_model_file import open_model_file
from tests.conftest import ROOT
from tests.support.browser import Site, chromium
from tests.support.showing import validation_transform

PAGE = ROOT / "examples" / "browser"
DIGITS = ROOT / "compressed_models" / "digits_resnet18.pth"
EXACT = 1e-4
"""Of the largest logit: the browser sees the very same bytes."""
DECODED = 0.1
"""The same for JPEGs, which browsers may decode to bytes that differ by a few steps."""

CHECK = """<!DOCTYPE html>
<iframe id="frame" src="/index.html?network=NETWORK" width="400" height="700"></iframe>
<script type="module">
const frame = document.getElementById("frame");
const inside = () => frame.contentDocument;
const pause = () => new Promise((done) => setTimeout(done, 20));
const found = {};
async function state(...wanted) {
  while (!wanted.includes(inside()?.body?.dataset.state)) await pause();
  return inside().body.dataset.state;
}
function look(state) {
  const text = (id) => inside().getElementById(id).textContent;
  const answers = [...inside().querySelectorAll("#answers li")].map((item) => [...item.children].map((part) => part.textContent));
  return { state, answers, logits: JSON.parse(text("logits") || "null"), status: text("status"), about: text("about") };
}
found.start = look(await state("ready", "failed"));
for (const name of found.start.state === "ready" ? NAMES : []) {
  const blob = await (await fetch("/given/" + name)).blob();
  const { DataTransfer, DragEvent, Event, File } = frame.contentWindow;
  const data = new DataTransfer();
  data.items.add(new File([blob], name, { type: blob.type }));
  if (name.startsWith("chosen")) {
    inside().getElementById("file").files = data.files;
    inside().getElementById("file").dispatchEvent(new Event("change"));
  } else {
    inside().getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
  }
  found[name] = look(await state("answered", "failed"));
}
found.wide = inside().documentElement.scrollWidth > inside().documentElement.clientWidth;
await fetch("/answer", { method: "POST", body: JSON.stringify(found) });
</script>
"""


def runtime() -> Path:
    """The folder of onnxruntime-web; skips where it is not."""
    given = os.environ.get("PQF_ONNXRUNTIME_WEB")
    folder = Path(given) if given else PAGE / "node_modules" / "onnxruntime-web"
    if not (folder / "dist" / "ort.wasm.min.mjs").is_file():
        pytest.skip(
            f"onnxruntime-web is not in {folder}: npm install in examples/browser, or name its folder with "
            "PQF_ONNXRUNTIME_WEB"
        )
    return folder


def write_pictures(folder: Path, networks: Path) -> None:
    """Digits of just the size that the network sees, larger pictures without and with loss, and what is none."""
    for name, digit in (("three.png", "network-3.png"), ("chosen_eight.png", "network-8.png")):
        (folder / name).write_bytes((networks / digit).read_bytes())
    photos = pytest.importorskip("sklearn.datasets")
    with Image.open(Path(photos.__file__).parent / "images" / "china.jpg") as photo:
        photo.load()
    photo.resize((301, 187)).save(folder / "wide.png")
    photo.crop((100, 0, 140, 90)).save(folder / "small_and_tall.png")
    photo.save(folder / "photo.jpg", quality=90)
    (folder / "no_picture.png").write_text("no picture")


def opened(arguments: Sequence[str], tmp_path: Path, write: Callable[[Path, Path], None]) -> dict[str, Any]:
    """What the page says of pictures and a network that is prepared for it."""
    chromium()
    pytest.importorskip("onnx")
    folder, networks, given = runtime(), tmp_path / "networks", tmp_path / "given"
    assert prepare.main([*arguments, "--name", "network", "--folder", str(networks)]) == 0
    given.mkdir()
    write(given, networks)
    folders = {"/": PAGE, "/networks/": networks, "/given/": given, "/node_modules/onnxruntime-web/": folder}
    page = CHECK.replace("NAMES", json.dumps(sorted(path.name for path in given.iterdir())))
    site = Site(folders, {"/check.html": page.replace("NETWORK", "network")})
    found = site.opened("/check.html", tmp_path / "profile")
    assert found["start"]["state"] == "ready", found
    size = (networks / "network.onnx").stat().st_size
    assert site.sent["/networks/network.onnx"] == size < 2e6
    assert f"{size / 1e6:.2f} MB" in found["start"]["about"]
    assert not found["wide"], "the page is wider than a narrow window"
    return found


def check_answers(found: Mapping[str, Any], model: Path, tmp_path: Path) -> None:
    """The logits of all pictures are PyTorch's, and the page shows the five likeliest classes of them."""
    about = json.loads((tmp_path / "networks" / "network.json").read_text())
    network = open_model_file(model, about["arch"]).model.eval()
    transform = validation_transform(about["resize"], about["image_size"], about["mean"], about["std"])
    for path in sorted((tmp_path / "given").iterdir()):
        if path.name == "no_picture.png":
            continue
        with Image.open(path) as image, torch.no_grad():
            wanted = network(transform(image, torch.Generator())[None])[0]
        off = float((torch.tensor(found[path.name]["logits"]) - wanted).abs().max() / wanted.abs().max())
        assert off < (EXACT if path.suffix == ".png" else DECODED), (path.name, off)
        best, share = found[path.name]["answers"][0]
        assert best == about["classes"][int(wanted.argmax())]
        assert float(share.split()[0]) == pytest.approx(100 * float(wanted.softmax(0).max()), abs=1.0)
        assert len(found[path.name]["answers"]) == 5


def test_the_page_answers_what_pytorch_answers(tmp_path: Path) -> None:
    found = opened([], tmp_path, write_pictures)
    check_answers(found, DIGITS, tmp_path)
    assert found["three.png"]["answers"][0][0] == "3"
    assert found["chosen_eight.png"]["answers"][0][0] == "8"
    assert found["no_picture.png"]["state"] == "failed"
    assert "cannot be read as a picture" in found["no_picture.png"]["status"]


@pytest.mark.published
def test_the_same_page_with_a_network_for_photos(published: Path, tmp_path: Path) -> None:
    model = published / "published" / "resnet18.pth"
    photos = sorted((published / "imagenet_samples" / "val").glob("*/*.JPEG"))[:3]
    arguments = ["--config", "../config/evaluate_resnet.yaml", "--model.state_dict_compressed"]

    def write(given: Path, _networks: Path) -> None:
        for photo in photos:
            (given / photo.name).write_bytes(photo.read_bytes())
        with Image.open(photos[0]) as photo:
            photo.convert("RGB").save(given / "without_loss.png")

    found = opened([*arguments, str(model)], tmp_path, write)
    check_answers(found, model, tmp_path)
    right = [found[photo.name]["answers"][0][0].replace(" ", "_") in photo.name for photo in photos]
    assert sum(right) >= 2, {photo.name: found[photo.name]["answers"] for photo in photos}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--dataloader.num_clases", "10"], ["num_clases", "num_classes"]),
        (["--model.state_dict_compressed", "nowhere.pth"], ["model.state_dict_compressed", "nowhere.pth"]),
        (["--classes", "nowhere.txt"], ["--classes", "nowhere.txt"]),
        (["--classes", "LICENSE"], ["--classes", "names", "10 classes"]),
    ],
)
def test_what_cannot_be_prepared(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main([*arguments, "--folder", str(tmp_path / "networks")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert all(word in error for word in words), error
    assert not (tmp_path / "networks").exists()
