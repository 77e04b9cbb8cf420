"""Images per second and core: this project's loader beside torchvision's reference pipeline.

Claim: in training, with the random crop of the default and with the random resized crop, at least 1.5 times as many
images per CPU second as torchvision's transforms with `ImageFolder` and torch's `DataLoader`.

    python -m benchmarks.loader [--photos FOLDER] [--count 256] [--sides 375 500]

Both read the same files in one process and run in turn (A B A B ...); a ratio is the median of the ratios of the pairs,
of CPU seconds. FOLDER holds one folder per class. Its photos are read as they are, and enlarged to short sides of
`--sides` pixels (JPEG, quality 90, in a temporary folder); beside them scikit-learn's two photos, which are sharp at
their size. Ours gives bytes, which the device normalises: a second ratio counts that too, on the same core.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from src.settings import load
from src.tasks.images import ImageFolderIndex
from src.tasks.loading import EpochOrder, ImageDataset, batches, make_loader
from src.tasks.transforms import ImageSpec, Normalise

from .report import machine, print_machine, print_table, write_json

LIMIT = 1.5
QUALITY = 90
BUNDLED = "scikit-learn's two photos"


@dataclass(frozen=True)
class Way:
    """A way to show images: torchvision's, and ours.

    Attributes:
        theirs: transforms of torchvision, before ToTensor and Normalize.
        ours: settings that differ from the default; None: as in validation.
        claimed: whether the ratio is claimed.
    """

    theirs: Callable[[int, int], list[Any]]
    ours: dict[str, Any] | None
    claimed: bool = True


WAYS = {
    "training, random crop": Way(
        lambda resize, size: [
            transforms.Resize(resize), transforms.RandomCrop(size), transforms.RandomHorizontalFlip(),
        ],
        {},
    ),
    "training, random resized crop": Way(
        lambda _, size: [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()],
        {"crop": "random_resized"},
    ),
    "training, random crop, exact": Way(
        lambda resize, size: [
            transforms.Resize(resize), transforms.RandomCrop(size), transforms.RandomHorizontalFlip(),
        ],
        {"decoding": "exact"},
        claimed=False,
    ),
    "validation": Way(
        lambda resize, size: [transforms.Resize(resize), transforms.CenterCrop(size)], None, claimed=False
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Photos:
    """Images in folders of classes.

    Attributes:
        root: the folder.
        count: how many of its images, evenly spaced; they repeat where there are fewer.
    """

    root: Path
    count: int

    def folder(self) -> ImageFolder:
        """As torchvision finds them."""
        found = ImageFolder(str(self.root))
        n = len(found.samples)
        found.samples = [found.samples[number * n // self.count] for number in range(self.count)]
        return found

    def kilobytes(self) -> float:
        """Mean size of a file."""
        return statistics.mean(Path(path).stat().st_size for path, _ in self.folder().samples) / 1000


def reference(photos: Photos, way: Way, spec: ImageSpec, batch_size: int) -> Iterator[Any]:
    """The batches of torchvision's pipeline."""
    folder = photos.folder()
    folder.transform = transforms.Compose(
        [
            *way.theirs(spec.resize, spec.image_size),
            transforms.ToTensor(),
            transforms.Normalize(list(spec.mean), list(spec.std)),
        ]
    )
    yield from DataLoader(folder, batch_size, shuffle=way.ours is not None)


def ours(photos: Photos, way: Way, spec: ImageSpec, batch_size: int, epoch: int) -> Iterator[Any]:
    """The batches of the loader that training and validation use."""
    folder = photos.folder()
    paths, labels = (list(column) for column in zip(*folder.samples, strict=True))
    index = ImageFolderIndex(photos.root, tuple(folder.classes), paths, labels)
    transform = spec.for_validation() if way.ours is None else spec.for_training()
    order = EpochOrder(len(paths), way.ours is not None, 0, 0, 1)
    order.set_epoch(epoch)
    yield from batches(make_loader(ImageDataset(index, transform, 0), order, batch_size, 0, False))


def measure(photos: Photos, way: Way, repeats: int) -> dict[str, float]:
    """Images per CPU second of both, and what ours makes of the reference's; with normalising too."""
    data = load("../config/train_resnet18.yaml", []).dataloader
    spec = ImageSpec(resize=data.resize, image_size=data.image_size, mean=data.mean, std=data.std, **(way.ours or {}))
    normalise = Normalise(spec.mean, spec.std)
    times = []
    for repeat in range(repeats + 1):
        start = time.process_time()
        for _ in reference(photos, way, spec, data.batch_size):
            pass
        theirs, loaded, normalised = time.process_time() - start, 0.0, 0.0
        start = time.process_time()
        for batch in ours(photos, way, spec, data.batch_size, repeat):
            arrived = time.process_time()
            normalise(batch.images, torch.contiguous_format)
            loaded += arrived - start
            start = time.process_time()
            normalised += start - arrived
        times.append((theirs, loaded, loaded + normalised))
    kept = times[1:]  # the first round also reads from the disk
    first, second, third = (photos.count / statistics.median(column) for column in zip(*kept, strict=True))
    return {
        "reference": first,
        "ours": second,
        "ratio": statistics.median(a / b for a, b, _ in kept),
        "ours, normalised": third,
        "ratio, normalised": statistics.median(a / c for a, _, c in kept),
    }


def enlarged(photos: Photos, side: int, place: Path) -> Photos:
    """The photos with a short side of so many pixels, in a new folder."""
    for number, (path, label) in enumerate(photos.folder().samples):
        (place / f"{label:04d}").mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            scale = side / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            large = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        large.save(place / f"{label:04d}" / f"{number}.jpg", quality=QUALITY)
    return Photos(place, photos.count)


def bundled() -> Path:
    """The folder above that of scikit-learn's photos, as a folder of one class."""
    from sklearn import datasets

    return Path(datasets.__file__).parent / "images"


def all_photos(options: argparse.Namespace, temporary: Path) -> Iterator[tuple[str, Photos]]:
    """The sets of photos to read, by name."""
    (temporary / "bundled").mkdir()
    (temporary / "bundled" / "photos").symlink_to(bundled(), target_is_directory=True)
    if options.photos is not None:
        given = Photos(options.photos, options.count)
        yield "as they are", given
        for side in options.sides:
            yield f"short side {side}", enlarged(given, side, temporary / str(side))
    yield BUNDLED, Photos(temporary / "bundled", options.count)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every set of photos in every way, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="folder of class folders; without it only scikit-learn's photos")
    parser.add_argument("--count", type=int, default=256, help="photos in a round")
    parser.add_argument("--sides", type=int, nargs="*", default=[375, 500], help="short sides to enlarge to, pixels")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of rounds")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/loader.json"), help="results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = machine()
    print_machine(about)
    rows, results = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, photos in all_photos(options, Path(temporary)):
            size = photos.kilobytes()
            for how, way in WAYS.items():
                found = measure(photos, way, options.repeats)
                results[f"{name}, {how}"] = {**found, "kilobytes": size}
                claim = f">= {LIMIT:g}: {'yes' if found['ratio'] >= LIMIT else 'NO'}" if way.claimed else ""
                rates = [f"{found['reference']:.0f}", f"{found['ours']:.0f}", f"{found['ratio']:.2f}"]
                rows.append([name, f"{size:.0f}", how, *rates, f"{found['ratio, normalised']:.2f}", claim])
    header = ["photos", "kB", "shown for", "reference", "ours", "ratio", "with normalising", "claim"]
    print_table("Images per CPU second", header, rows)
    settings = {"count": options.count, "pairs": options.repeats, "quality": QUALITY}
    write_json(options.json, {"machine": about, "settings": settings, "limit": LIMIT, "results": results})


if __name__ == "__main__":
    main()
