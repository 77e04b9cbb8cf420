"""The digits folder: the same every time, all or nothing."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from src.common.errors import DataError, SettingsError
from src.tasks.demo_data import digits
from src.tasks.images import check_same_classes, read_folder, require_readable
from src.tasks.sources import SOURCES, prepare

pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def fingerprint(root: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(root.rglob("*.png")):
        whole.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return whole.hexdigest()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digits") / "deep" / "digits"
    prepare("digits", root)
    return root


def test_is_an_image_folder_split_by_class(written):
    train, validation = read_folder(written, "train", False), read_folder(written, "val", False)
    check_same_classes(train, validation)
    assert train.classes == tuple("0123456789")
    assert len(train) + len(validation) == 1797
    for label in range(10):
        share = validation.labels.count(label) / (train.labels.count(label) + validation.labels.count(label))
        assert 0.18 < share <= 0.2
    require_readable(train, "full", show=False)
    require_readable(validation, "full", show=False)
    numbers = [Path(path).stem for path in train.paths + validation.paths]
    assert len(set(numbers)) == 1797


def test_is_deterministic(written, tmp_path):
    digits.write_digits(tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(written)
    assert [entry.name for entry in tmp_path.iterdir()] == ["again"]


def test_a_complete_folder_is_left_alone(written, monkeypatch):
    monkeypatch.setattr(digits, "load_digit_images", lambda: pytest.fail("written again"))
    prepare("digits", written)


def test_an_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(digits, "_write", fail)
    with pytest.raises(DataError, match="No space left"):
        digits.write_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "mine").write_text("x")
    for root in (tmp_path, tmp_path / "mine"):
        with pytest.raises(DataError, match="is not the digits folder"):
            digits.write_digits(root)
    assert (tmp_path / "mine").read_text() == "x"


def test_an_empty_folder_is_filled(written, tmp_path):
    prepare("digits", tmp_path)
    assert fingerprint(tmp_path) == fingerprint(written)


def test_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SettingsError, match="pip install scikit-learn"):
        digits.write_digits(tmp_path / "digits")


def test_sources(tmp_path):
    prepare("folder", tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(
        SettingsError, match=r"dataloader\.source: 'mnist' is not known; there are folder, digits, digit_crops"
    ):
        prepare("mnist", tmp_path)
    assert set(SOURCES) == {"folder", "digits", "digit_crops"}
