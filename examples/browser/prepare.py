"""Writes what the page needs of a compressed network: its ONNX file, and a JSON file of how it wants to see pictures.

    python -m examples.browser.prepare [--config FILE] [--name NAME] [--classes FILE] [--dotted.key value ...]

The settings are those of an evaluation of the network (config/digits/evaluate_resnet18.yaml); the file is
`model.state_dict_compressed`. NAME.onnx and NAME.json (NAME: model) go into the folder networks beside the page, which
reads another than model.json with ?network=NAME. The names of the classes are the lines of --classes FILE, else those
of the digits, of ImageNet where there are a thousand, or numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from src import convert
from src.common.errors import SettingsError
from src.common.paths import find, write_text
from src.run import command
from src.settings import Settings, load

NETWORKS = Path(__file__).resolve().parent / "networks"
DIGITS = "../config/digits/evaluate_resnet18.yaml"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=DIGITS, help="settings of an evaluation of the network")
    parser.add_argument("--name", default="model", help="of the files that are written")
    parser.add_argument("--classes", metavar="FILE", help="the names of the classes, one on each line")
    parser.add_argument("--folder", default=str(NETWORKS), help="where to write (default: %(default)s)")
    known, overrides = parser.parse_known_args(argv)
    target = Path(known.folder) / f"{known.name}.onnx"
    found: dict[str, object] = {}
    arguments: list[str] = []

    def check() -> int:
        """Everything that can be wrong with the settings is told before anything is written."""
        settings = load(known.config, overrides)
        found.update(about(settings, known.classes), source=settings.dataloader.source)
        network = find(settings.model.state_dict_compressed, "model.state_dict_compressed")
        arguments.extend([str(network), str(target), "--arch", settings.model.arch, "--overwrite"])
        arguments.extend(["--image_size", str(settings.dataloader.image_size)])
        return 0

    def describe() -> int:
        samples = digits(target.with_suffix("")) if found.pop("source") == "digits" else []
        text = json.dumps({"model": target.name, **found, "samples": samples}, indent=1, ensure_ascii=False)
        write_text(target.with_suffix(".json"), text + "\n")
        return 0

    return command.guarded(check) or convert.main(arguments) or command.guarded(describe)


def about(settings: Settings, classes: str | None) -> dict[str, object]:
    """How the network wants to see pictures, and what it tells apart.

    Raises:
        SettingsError: there are not as many names as classes, or no file of them.
    """
    data = settings.dataloader
    names = class_names(data.num_classes or 1000, data.source) if classes is None else lines_of(classes)
    if data.num_classes is not None and len(names) != data.num_classes:
        raise SettingsError(f"--classes: {classes} has {len(names)} names, and the network {data.num_classes} classes")
    return {
        "arch": settings.model.arch,
        "resize": data.resize,
        "image_size": data.image_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "classes": names,
    }


def lines_of(file: str) -> list[str]:
    """The lines of a text. Raises SettingsError: there is no such file."""
    return find(file, "--classes").read_text(encoding="utf-8").splitlines()


def class_names(number: int, source: str) -> list[str]:
    """Names for that many classes, where nobody gives any."""
    if number == 1000 and source != "digits":
        from torchvision.models import ResNet18_Weights

        return list(ResNet18_Weights.DEFAULT.meta["categories"])
    return [str(place) for place in range(number)]


def digits(stem: Path) -> list[str]:
    """Write one digit of each kind, which no training has seen, as <stem>-<digit>.png; returns their names."""
    from src.tasks.demo_data.digits import write_digits

    names = []
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder) / "digits")
        for place in sorted((Path(folder) / "digits" / "val").iterdir()):
            target = stem.with_name(f"{stem.name}-{place.name}.png")
            target.write_bytes(min(place.iterdir()).read_bytes())
            names.append(target.name)
    return names


if __name__ == "__main__":
    sys.exit(main())
