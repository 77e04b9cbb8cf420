"""The switch between recipes: defaults of keys that nobody set."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from src.settings import ModelSettings, Settings, explicit_keys, ineffective, load, to_yaml, value_of
from src.settings.recipes import RECIPES
from src.settings.schema import Settings as Schema
from tests.conftest import ROOT

TRAINING = sorted((ROOT / "config").glob("train_*.yaml"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("epochs: 3\n")
    return path


def test_all_recipes_decide_about_the_same_keys_and_best_is_the_schema() -> None:
    assert {tuple(sorted(keys)) for keys in RECIPES.values()} == {tuple(sorted(RECIPES["best"]))}
    assert set(Schema.model_fields["recipe"].annotation.__args__) == set(RECIPES)  # type: ignore[union-attr]
    for key, value in RECIPES["best"].items():
        *sections, name = key.split(".")
        section = Schema
        for part in sections:
            section = section.model_fields[part].annotation  # type: ignore[assignment]
        assert section.model_fields[name].default == value, key


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_its_keys_and_says_so_in_the_resolved_settings(recipe: str, file: Path, tmp_path: Path) -> None:
    for settings in (load(str(file), ["--recipe", recipe]), Settings(recipe=recipe)):
        assert {key: value_of(settings, key) for key in RECIPES[recipe]} == RECIPES[recipe]
        (tmp_path / "resolved.yaml").write_text(to_yaml(settings))
        again = load(str(tmp_path / "resolved.yaml"))
        assert again == settings
        assert set(RECIPES[recipe]) < set(explicit_keys(again))
    assert explicit_keys(load(str(file), ["--recipe", recipe])) == ["recipe", "epochs"]


def test_keys_of_the_file_and_of_the_command_line_win(file: Path) -> None:
    file.write_text("recipe: published\nmodel: {search: best}\n")
    settings = load(str(file))
    assert (settings.model.search, settings.calibration.use) == ("best", False)
    settings = load(str(file), ["--calibration.use", "True", "--model.search", "published"])
    assert (settings.model.search, settings.calibration.use) == ("published", True)
    file.write_text("calibration:\nmodel: null\n")
    assert load(str(file), ["--recipe=published"]) == Settings(recipe="published")


def test_settings_made_in_python_keep_their_own_sections_as_they_are() -> None:
    model = ModelSettings()
    settings = Settings(recipe="published", model=model)
    assert (settings.model.search, model.search) == ("published", "best")
    assert Settings(recipe="published", model=ModelSettings(search="best")).model.search == "best"
    with pytest.raises(ValidationError):
        settings.model.search = "best"  # type: ignore[misc]


def test_what_a_recipe_sets_is_not_said_to_have_no_effect(file: Path) -> None:
    for recipe in RECIPES:
        flags = ["--recipe", recipe, "--model.use_compression", "False"]
        assert ineffective(load(str(file), flags), "train", "classification") == []
    said = ineffective(load(str(file), [*flags, "--model.search", "best"]), "train", "classification")
    assert said == ["model.search has no effect: model.use_compression is False"]


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_the_shipped_files_follow_the_switch(path: Path) -> None:
    """Of detectors but for what is measured for classifiers only."""
    detector = path.stem in ("train_detector", "train_maskrcnn")
    own = {"distillation.weight": 0.0, "codebook_learning_rate": 1.0} if detector else {}
    for recipe in RECIPES:
        settings = load(str(path), ["--recipe", recipe])
        assert {key: value_of(settings, key) for key in RECIPES[recipe]} == {**RECIPES[recipe], **own}


@pytest.mark.parametrize(
    ("job", "flags", "said"),
    [
        ("train", ["--calibration.count", "5"], []),
        ("train", ["--calibration.num_workers", "1"], ["calibration.num_workers has no effect: it is not read"]),
        (
            "train",
            ["--recipe", "published", "--calibration.count", "5"],
            ["calibration.count has no effect: calibration.use is False"],
        ),
        (
            "compress",
            ["--calibration.use", "False", "--calibration.images", "photos"],
            ["calibration.images has no effect: calibration.use is False"],
        ),
        ("compress", ["--calibration.memory", "1GB"], ["calibration.memory has no effect: calibration.images is not"]),
        ("evaluate", ["--calibration.use", "True"], ["calibration.use has no effect: it is not read by this command"]),
        ("evaluate", ["--recipe", "published"], ["recipe has no effect: it is not read by this command"]),
    ],
)
def test_keys_of_calibration_without_effect_are_said(job: str, flags: list[str], said: list[str], file: Path) -> None:
    found = ineffective(load(str(file), flags), job, "classification")
    assert len(found) == len(said)
    for line, words in zip(found, said, strict=True):
        assert line.startswith(words)
