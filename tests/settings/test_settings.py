"""Laws of the settings: what loads, what is refused and in which words, and that text round-trips."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from src import evaluate_maskrcnn, evaluate_resnet, train_maskrcnn, train_resnet
from src.common.errors import SettingsError
from src.settings import (
    GroupSettings,
    Settings,
    explicit_keys,
    help_text,
    ineffective,
    load,
    require,
    to_yaml,
    value_of,
)
from src.settings.keys import leaves
from src.settings.reach import keys
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "config").rglob("*.yaml"))
LAYER_SPECS = "model.compression_parameters.layer_specs"

OLD_STYLE = """
dataloader:
  imagenet_path: <your_imagenet_path_here>
  num_workers: 20
  batch_size: 2
  train_shuffle: True
  validation_shuffle: False
epochs: 4
learning_rate: 5.e-5
momentum: 0.9
weight_decay: 0.0001
optimizer: "adam"
lr_scheduler:
  type: "cosine"
  min_lr: 1.e-6
  patience: 3
  factor: 0.1
  milestones: [3, 6]
  last_epoch: -1
skip_initial_validation: True
output_path: <your_output_path_here>
model:
  arch: "maskrcnn"
  compression_parameters:
    ignored_modules:
      - "backbone.body.conv1"
      - rpn.head.cls_logits
    fc_subvector_size: 4
    pw_subvector_size: 4
    large_subvectors: False
    k: 256
    k_means_n_iters: 1_000
    k_means_type: "src"
    layer_specs:
      backbone.body.layer1.0.conv1:
        k: 128
      roi_heads.box_head.fc6:
        subvector_size: 16
  use_permutations: True
  sls_iterations: 1_000
  permutations:
    - [
        {parents: [backbone.body.conv1, backbone.body.bn1]},
        {children: [backbone.body.layer1.0.conv1, backbone.body.layer1.0.downsample.0]},
      ]
    -
      - parents:
          - rpn.head.conv
      - children:
          - rpn.head.cls_logits
  permutation_specs:
    roi_heads.box_head.fc6:
      reshape: [1024, 256, 7, 7]
      optimization: [STOCHASTIC]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("dataloader: {imagenet_path: photos}\noutput_path: out\n")
    return path


def refusal(path: Path, *overrides: str, text: str | None = None) -> str:
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load(str(path), overrides)
    for jargon in ("pydantic", "validation error", "Input should", "type=", "input_value"):
        assert jargon not in str(caught.value)
    return str(caught.value)


def complaint(path: Path, *overrides: str) -> str:
    try:
        load(str(path), overrides)
    except SettingsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "config")))
def test_every_config_loads_starts_with_its_command_and_sets_nothing_in_vain(path: Path) -> None:
    settings = load(str(path))
    assert path.read_text().startswith("# python -m src.")
    assert ineffective(settings) == []
    assert settings.file == str(path)


def test_published_settings_of_the_training_files() -> None:
    small, big = (load(f"../config/train_resnet{depth}.yaml") for depth in (18, 50))
    assert small.model.compression_parameters.layer_specs["fc"].k == 2048
    assert big.model.compression_parameters.layer_specs["fc"].k == 1024
    assert (small.model.compression_parameters.k_means_n_iters, big.model.compression_parameters.k_means_n_iters) == (
        10,
        1000,
    )
    assert (small.dataloader.batch_size, big.dataloader.batch_size) == (128, 64)
    assert small.model.permutations is not None
    assert big.model.permutations is not None
    assert len(small.model.permutations) == 4 + 8  # streams, blocks
    assert len(big.model.permutations) == 1 + 4 + 2 * 16  # stem, streams, two in each block
    first = small.model.permutations[2]
    assert first.children == ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0")


def test_a_file_in_the_style_users_have_loads_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(OLD_STYLE)
    settings = load(str(path))
    assert settings.learning_rate == 5e-5
    assert settings.lr_scheduler.min_lr == 1e-6
    assert settings.model.compression_parameters.k_means_n_iters == 1000
    assert settings.model.compression_parameters.layer_specs["backbone.body.layer1.0.conv1"].k == 128
    assert settings.model.permutation_specs["roi_heads.box_head.fc6"].reshape == (1024, 256, 7, 7)
    assert settings.model.permutations == (
        GroupSettings(
            parents=("backbone.body.conv1", "backbone.body.bn1"),
            children=("backbone.body.layer1.0.conv1", "backbone.body.layer1.0.downsample.0"),
        ),
        GroupSettings(parents=("rpn.head.conv",), children=("rpn.head.cls_logits",)),
    )
    assert ineffective(settings) == ["lr_scheduler.milestones has no effect: lr_scheduler.type cosine does not use it"]


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--epochs", "3"], "epochs", 3),
        (["--epochs=3"], "epochs", 3),
        (["--epochs", "1e1"], "epochs", 10),
        (["--epochs", "'1_0'"], "epochs", 10),
        (["--seed", "010"], "seed", 10),
        (["--epochs", "3", "--epochs", "5"], "epochs", 5),
        (["--learning_rate", "1e-6"], "learning_rate", 1e-6),
        (["--learning_rate", "1.e-6"], "learning_rate", 1e-6),
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--lr_scheduler.last_epoch", "-1"], "lr_scheduler.last_epoch", -1),
        (["--lr_scheduler.milestones", "[1, 1_0]"], "lr_scheduler.milestones", (1, 10)),
        (["--output_path", "a=b: c".replace(": ", ":")], "output_path", "a=b:c"),
        (["--output_path=a=b"], "output_path", "a=b"),
        (["--output_path", "2020-01-01"], "output_path", "2020-01-01"),
        (["--device", "cuda:1"], "device", "cuda:1"),
        (["--model.use_permutations", "False"], "model.use_permutations", False),
        (["--model.permutations", "null"], "model.permutations", None),
        (["--dataloader", "{resize: 300}"], "dataloader.resize", 300),
        (["--dataloader", "{resize: 300}"], "dataloader.imagenet_path", "photos"),
        (["--dataloader", "null"], "dataloader.imagenet_path", "<your_imagenet_path_here>"),
        ([f"--{LAYER_SPECS}.fc.k", "64"], f"{LAYER_SPECS}.fc.k", 64),
        ([f"--{LAYER_SPECS}.0.k", "64"], f"{LAYER_SPECS}.0.k", 64),
        ([f"--{LAYER_SPECS}.fc", "{k: 64}"], f"{LAYER_SPECS}.fc.k", 64),
        ([f"--{LAYER_SPECS}", "{backbone.fc: {k: 64}}"], f"{LAYER_SPECS}.backbone.fc.k", 64),
        (["--model.permutation_specs.a.b.reshape=[4, 2]"], "model.permutation_specs.a.b.reshape", (4, 2)),
        (
            [f"--{LAYER_SPECS}.backbone.body.layer1.0.conv1.k", "128"],
            f"{LAYER_SPECS}.backbone.body.layer1.0.conv1.k",
            128,
        ),
    ],
)
def test_every_form_of_override(file: Path, arguments: list[str], key: str, value: object) -> None:
    assert value_of(load(str(file), arguments), key) == value


# fmt: off
PATHS = [
    "/data/run #7", "#7", "a: b", "ends:", "[2026] x", "{x}", "@x", "%x", "*x", "&x", "!x", "`x`", "'open", '"open', "it's",
    " x ", "- x", "? x", "|", "> x", "x, y", "5 # x", "*", "a\tb", "C:\\new", "2026-11-25", "\u732b", "[5", "null #1",
]
# fmt: on


@pytest.mark.parametrize("path", PATHS)
def test_text_is_what_the_shell_passed(file: Path, path: str) -> None:
    for key in ("output_path", "dataloader.imagenet_path", "model.state_dict_compressed", "visualize"):
        assert value_of(load(str(file), [f"--{key}", path]), key) == path
        assert value_of(load(str(file), [f"--{key}={path}"]), key) == path


@pytest.mark.parametrize(("given", "value"), [("'5'", "5"), ('"a # b"', "a # b"), ("'null'", "null"), ("null", None)])
def test_quotes_protect_text_and_null_is_null(file: Path, given: str, value: str | None) -> None:
    assert value_of(load(str(file), ["--visualize", given]), "visualize") == value


def test_overrides_of_one_layer_add_up(file: Path) -> None:
    file.write_text("model: {compression_parameters: {layer_specs: {a.b: {k: 64}, 1.10: {k: 4}, 0: null}}}")
    settings = load(str(file), [f"--{LAYER_SPECS}.a.b.k_means_n_iters=7", f"--{LAYER_SPECS}", "{c: {k: 2}}"])
    specs = settings.model.compression_parameters.layer_specs
    assert set(specs) == {"a.b", "1.10", "0", "c"}  # keys stay text
    assert (specs["a.b"].k, specs["a.b"].k_means_n_iters) == (64, 7)


BAD_VALUES = [
    ("epochs", "many", "a whole number, at least 0"),
    ("epochs", "-1", "a whole number, at least 0"),
    ("epochs", "1.5", "a whole number"),
    ("epochs", "True", "a whole number"),
    ("epochs", "null", "a whole number"),
    ("seed", "1e400", "a whole number"),
    ("learning_rate", ".nan", "a number, above 0"),
    ("learning_rate", ".inf", "a number, above 0"),
    ("learning_rate", "nan", "a number, above 0"),
    ("learning_rate", "False", "a number, above 0"),
    ("learning_rate", "0", "a number, above 0"),
    ("momentum", "1", "at least 0, below 1"),
    ("optimizer", "adma", "one of sgd, adam"),
    ("output_path", "5", "text; put quotes around a number"),
    ("device", "gpu", "one of auto, cpu, cuda, cuda:N"),
    ("model.use_permutations", "1", "True or False"),
    ("model.permutations", "5", "a list with items: a group"),
    ("dataloader.mean", "[1, 2]", "a list of 3 with items: a number"),
    ("dataloader.std", "[1, 2, 0]", "a list of 3 with items: a number, above 0"),
    ("dataloader.image_size", "300", "at most dataloader.resize (256)"),
    ("lr_scheduler.milestones", "[4, 2]", "rising epochs"),
    ("lr_scheduler.type", "cosin", "one of cosine, plateau, multistep, none"),
    ("model.compression_parameters.k", "100", "a power of two; the nearest are 64 and 128"),
    ("model.compression_parameters.k", "1", "a power of two from 2"),
    (f"{LAYER_SPECS}.a.b.k", "9", "a power of two; the nearest are 8 and 16"),
    ("model.permutation_specs.fc6.optimization", "[HASTY]", "one of GREEDY, STOCHASTIC, RANDOM"),
    ("expected.accuracy", "101", "a number, at least 0, at most 100, or null"),
    ("dataloader", "7", "keys and their values"),
]


@pytest.mark.parametrize(("key", "value", "expected"), BAD_VALUES)
def test_a_bad_value_is_refused_alike_from_file_and_command_line(
    file: Path, key: str, value: str, expected: str
) -> None:
    given_here = refusal(file, f"--{key}", value)
    assert given_here.startswith("command line: " + key)
    assert expected in given_here
    parts = key.replace(LAYER_SPECS + ".a.b", LAYER_SPECS + ".a/b").split(".")
    text = (
        "".join(f"{'  ' * depth}{part.replace('/', '.')}:\n" for depth, part in enumerate(parts)).rstrip()
        + f" {value}\n"
    )
    in_file = refusal(file, text=text)
    assert in_file.startswith(f"{file}: {key}")
    assert expected in in_file


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("k", "did you mean model.compression_parameters.k?"),
        ("dataloader.batchsize", "did you mean dataloader.batch_size?"),
        ("dataloder.batch_size", "did you mean dataloader.batch_size?"),
        ("epoch", "did you mean epochs?"),
        ("model.compresion_parameters", "did you mean model.compression_parameters?"),
        ("imagenet_path", "did you mean dataloader.imagenet_path?"),
        ("dataloader.zzz", "known keys here: imagenet_path, coco_path"),
        ("model.sls_iteration", "did you mean model.sls_iterations?"),
    ],
)
def test_an_unknown_key_names_the_nearest(file: Path, key: str, suggestion: str) -> None:
    given_here = refusal(file, f"--{key}=5")
    assert given_here.startswith(f"command line: {key} = 5: unknown key; {suggestion}")
    outer, _, inner = key.partition(".")
    in_file = refusal(file, text=f"{outer}:\n  {inner}: 5\n" if inner else f"{outer}: 5\n")
    assert in_file.startswith(f"{file}: {outer}")
    assert "unknown key" in in_file


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"--{LAYER_SPECS}.a.b.kk", "4"], f"did you mean {LAYER_SPECS}.a.b.k?"),
        ([f"--{LAYER_SPECS}.k", "4"], "the layer's name is missing"),
        (["--epochs.more", "4"], "epochs holds a value, no keys"),
        (["--model.permutations.0.parents", "[a]"], "model.permutations holds a value"),
        (["--epochs"], "--epochs has no value; write --epochs VALUE"),
        (["--epochs", "--seed=1"], "--epochs has no value"),
        (["--epochs="], "--epochs has an empty value"),
        (["epochs", "4"], "'epochs' belongs to no key"),
        (["--epochs", "[1"], "command line, value of --epochs, line 1, column 3: not valid YAML"),
        (["--epochs", "1", "2"], "'2' belongs to no key"),
        (
            ["--dataloader", "{batch_sizes: 4}"],
            "dataloader.batch_sizes = 4: unknown key; did you mean dataloader.batch_size?",
        ),
        (["--", "1"], "'--' belongs to no key"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(file: Path, arguments: list[str], words: str) -> None:
    assert words in refusal(file, *arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1,\nb: 2", "line 2, column 5: not valid YAML"),
        (
            "epochs: 1\nseed: 2\nepochs: 3\n",
            "line 3, column 1: not valid YAML: the key 'epochs' stands here a second time (first in line",
        ),
        ("model:\n  arch: a\n  arch: b\n", "line 3, column 3"),
        ("seed: &a [*a]", "*a stands inside what it refers to"),
        ("[a]: 1", "a key must be a single word"),
        ("- epochs", "expected `key: value` lines, got ['epochs']"),
        ("epochs: !!python/object/apply:os.getcwd []", "line 1, column 9: not valid YAML"),
        ("epochs: !!int many", "a value does not fit its YAML type"),
        ("[" * 5000, "nested too deeply"),
        ("epochs: \x07", "not valid YAML"),
    ],
)
def test_a_file_that_is_not_usable_yaml_is_refused_with_the_place(file: Path, text: str, words: str) -> None:
    message = refusal(file, text=text)
    assert message.startswith(str(file))
    assert words in message


def test_a_file_that_cannot_be_read_is_refused(file: Path, tmp_path: Path) -> None:
    missing = refusal(tmp_path / "none.yaml")
    assert str(tmp_path / "none.yaml") in missing
    assert "cannot be read" in refusal(tmp_path)
    file.write_bytes(b"seed: \xff")
    assert "UTF-8" in refusal(file)


@pytest.mark.parametrize(
    "group", ["{parents: [a], children: [b]}", "[{parents: [a]}, {children: [b]}]", "[{children: [b]}, {parents: [a]}]"]
)
def test_both_forms_of_a_group_load(file: Path, group: str) -> None:
    assert load(str(file), ["--model.permutations", f"[{group}]"]).model.permutations == (
        GroupSettings(parents=("a",), children=("b",)),
    )


@pytest.mark.parametrize(
    ("group", "key"),
    [
        ("[{parents: [a]}]", "model.permutations[1] "),
        ("[{parents: [a]}, {child: [b]}]", "model.permutations[1] "),
        ("[{parents: [a]}, [b]]", "model.permutations[1] "),
        ("[{parents: []}, {children: [b]}]", "model.permutations[1].parents "),
        ("[{parents: [a]}, {children: [b, 3]}]", "model.permutations[1].children[1] "),
        ("7", "model.permutations[1] "),
    ],
)
def test_a_broken_group_is_named_by_its_index(file: Path, group: str, key: str) -> None:
    message = refusal(file, text=f"model:\n  permutations:\n  - [{{parents: [a]}}, {{children: [b]}}]\n  - {group}\n")
    assert f"{file}: {key}" in message
    assert "expected" in message


def test_problems_come_one_per_line_and_at_most_ten(file: Path) -> None:
    message = refusal(file, "--nonsense", "1", "--epochs", "x", text="seed: -1\nmomentum: 4\n")
    assert len(message.splitlines()) == 4
    many = refusal(file, *(f"--nonsense{index}=1" for index in range(13)), text="")
    assert many.splitlines()[-1] == "... and 3 more"
    assert len(many.splitlines()) == 11


def test_a_default_that_no_longer_fits_is_called_a_default(file: Path) -> None:
    assert "job.yaml (default value): dataloader.image_size = 224: expected at most dataloader.resize (64)" in refusal(
        file, "--dataloader.resize", "64"
    )


@pytest.mark.parametrize("text", ["", "# nothing\n", "model:\ndataloader:\n", "\ufeffmodel: null\n"])
def test_empty_files_and_sections_mean_defaults(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    assert load(str(file)) == Settings()


def test_settings_are_frozen_and_know_what_was_set(file: Path) -> None:
    settings = load(str(file), ["--epochs", "9"])
    with pytest.raises(ValidationError):
        settings.epochs = 3  # type: ignore[misc]
    assert explicit_keys(settings) == ["epochs", "output_path", "dataloader.imagenet_path"]


def test_a_placeholder_is_refused_where_a_path_is_needed(file: Path) -> None:
    settings = load(str(file), ["--model.weights", "<your_dense_checkpoint_here>"])
    assert require(settings, "dataloader.imagenet_path") == "photos"
    for key in ("model.weights", "dataloader.coco_path", "model.state_dict_compressed"):
        with pytest.raises(SettingsError) as caught:
            require(settings, key)
        assert str(caught.value).startswith(key)
        assert str(file) in str(caught.value)
        assert f"--{key} VALUE" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "silenced", "key"),
    [
        (["--momentum=0.5"], "--optimizer=sgd", "momentum"),
        (["--lr_scheduler.patience=9"], "--lr_scheduler.type=plateau", "lr_scheduler.patience"),
        (["--lr_scheduler.factor=0.5"], "--lr_scheduler.type=multistep", "lr_scheduler.factor"),
        (["--lr_scheduler.milestones=[2]"], "--lr_scheduler.type=multistep", "lr_scheduler.milestones"),
        (
            ["--lr_scheduler.type=none", "--lr_scheduler.min_lr=1e-5"],
            "--lr_scheduler.type=cosine",
            "lr_scheduler.min_lr",
        ),
        (["--dataloader.coco_path=x"], "--model.arch=maskrcnn", "dataloader.coco_path"),
        (
            ["--model.use_permutations=False", "--model.search_seconds=5"],
            "--model.use_permutations=True",
            "model.search_seconds",
        ),
        (["--expected.tolerance=1"], "--expected.accuracy=50", "expected.tolerance"),
    ],
)
def test_a_key_without_effect_is_warned_of_once(file: Path, arguments: list[str], silenced: str, key: str) -> None:
    file.write_text("momentum: 0.9\nlr_scheduler: {patience: 3}\n")  # at their defaults: not worth a word
    warnings = ineffective(load(str(file), arguments))
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{key} has no effect: ")
    assert ineffective(load(str(file), [*arguments, silenced])) == []


def test_the_help_shows_every_key_within_a_readable_width() -> None:
    text = help_text("python -m src.train_resnet", "../config/train_resnet50.yaml", "Compress and fine-tune a ResNet.")
    for key in leaves():
        section, _, name = key.rpartition(".")
        header = f"--{section + '.' if section else ''}KEY"
        assert f"\n  {name} " in text[text.index(f"\n{header}\n") :]
    assert max(map(len, text.splitlines())) <= 125
    assert "sgd|adam [adam]" in text


def test_settings_and_commands_start_without_torch() -> None:
    code = "import sys, src.run.command, src.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
NAMES = st.lists(st.text(), min_size=1, max_size=3)
CENTROIDS = st.integers(1, 30).map(lambda bits: 2**bits)
TREES = st.fixed_dictionaries(
    {},
    optional={
        "epochs": st.integers(0, 2**62),
        "learning_rate": POSITIVE,
        "output_path": st.text(),
        "lr_scheduler": st.fixed_dictionaries(
            {"min_lr": POSITIVE, "milestones": st.sets(st.integers(0, 99)).map(sorted)}
        ),
        "expected": st.fixed_dictionaries({"accuracy": st.none() | st.floats(0, 100)}),
        "model": st.fixed_dictionaries(
            {
                "permutations": st.none()
                | st.lists(st.fixed_dictionaries({"parents": NAMES, "children": NAMES}), max_size=2),
                "compression_parameters": st.fixed_dictionaries(
                    {
                        "ignored_modules": st.lists(st.text(), max_size=3),
                        "layer_specs": st.dictionaries(
                            st.text(), st.fixed_dictionaries({"k": CENTROIDS | st.none()}), max_size=3
                        ),
                    }
                ),
            }
        ),
    },
)
SAME_FOLDER = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]  # every example writes its own file anew
QUICK = hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=SAME_FOLDER)


@QUICK
@given(TREES)
def test_settings_written_as_text_load_back_equal(tmp_path: Path, tree: dict[str, object]) -> None:
    settings = Settings.model_validate(tree)
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(settings), encoding="utf-8", newline="")
    assert load(str(path)) == settings


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_written_as_text_load_back_equal(path: Path, tmp_path: Path) -> None:
    settings = load(str(path))
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(settings))
    assert load(str(again)) == settings
    assert to_yaml(load(str(again))) == to_yaml(settings)


YAMLISH = st.text(alphabet=st.sampled_from("ab01:-[]{},&*!?|>'\"%@`#=._ \n\t<\\~"), max_size=40)


@QUICK
@given(YAMLISH | st.text(max_size=40) | YAMLISH.map("model: ".__add__) | YAMLISH.map("epochs: ".__add__))
def test_no_text_in_a_file_raises_anything_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "random.yaml"
    path.write_text(text, encoding="utf-8")
    message = complaint(path)
    assert message == "" or message.startswith(str(path))


FLAGS = st.sampled_from([*leaves(), "model", "dataloader", LAYER_SPECS]).map("--".__add__)
ARGUMENTS = st.lists(FLAGS | YAMLISH | st.text(max_size=9), max_size=4)


@QUICK
@given(ARGUMENTS)
def test_no_command_line_raises_anything_else(tmp_path: Path, arguments: list[str]) -> None:
    path = tmp_path / "fine.yaml"
    path.write_text("epochs: 3")
    message = complaint(path, *arguments)
    assert message == "" or "command line" in message or "default value" in message


def test_keys_of_detection_are_checked_and_warned_of_where_they_mean_nothing(file: Path) -> None:
    settings = load(
        str(file), ["--dataloader.min_size=64", "--dataloader.max_size=96", "--expected.box_ap=36.3", "--visualize=out"]
    )
    assert (settings.dataloader.min_size, settings.dataloader.max_size, settings.visualize) == (64, 96, "out")
    assert len(ineffective(settings)) == 4  # the network of this file is a ResNet
    assert ineffective(
        load(str(file), ["--model.arch=maskrcnn", "--expected.mask_ap=3", "--expected.tolerance=1"])
    ) == ["dataloader.imagenet_path has no effect: maskrcnn is trained on COCO"]
    assert "at least dataloader.min_size (64)" in refusal(file, "--dataloader.min_size=64", "--dataloader.max_size=63")


def test_the_published_settings_of_mask_rcnn() -> None:
    settings = load("../config/train_maskrcnn.yaml")
    assert (settings.epochs, settings.learning_rate, settings.optimizer, settings.dataloader.batch_size) == (
        4,
        5e-5,
        "adam",
        2,
    )
    assert (settings.lr_scheduler.type, settings.lr_scheduler.min_lr) == ("cosine", 1e-6)
    assert (settings.model.sls_iterations, settings.model.compression_parameters.k_means_n_iters) == (1000, 1000)
    assert (
        settings.model.compression_parameters == load("../config/evaluate_maskrcnn.yaml").model.compression_parameters
    )
    assert (settings.dataloader.min_size, settings.dataloader.max_size, settings.dataloader.group_by_aspect_ratio) == (
        None,
        None,
        True,
    )


HELP_HOLDS = {
    ("train", "classification"): ("epochs", "dataloader.imagenet_path", "model.search", "optimizer"),
    ("train", "detection"): ("epochs", "dataloader.coco_path", "dataloader.min_size", "model.proposals", "evaluation.backend"),
    ("evaluate", "classification"): ("expected.accuracy", "model.state_dict_compressed", "model.compression_parameters.k"),
    ("evaluate", "detection"): ("expected.box_ap", "visualize", "evaluation.detections", "output_path"),
}  # fmt: skip
HELP_LACKS = {
    ("train", "classification"): ("expected.accuracy", "visualize", "dataloader.min_size", "model.state_dict_compressed"),
    ("train", "detection"): ("expected.box_ap", "dataloader.imagenet_path", "dataloader.mean", "evaluation.detections"),
    ("evaluate", "classification"): ("epochs", "optimizer", "dataloader.coco_path", "model.sls_iterations", "output_path", "resume"),
    ("evaluate", "detection"): ("epochs", "lr_scheduler.type", "dataloader.image_size", "model.search", "amp"),
}  # fmt: skip


COMMANDS = {
    ("train", "classification"): train_resnet,
    ("train", "detection"): train_maskrcnn,
    ("evaluate", "classification"): evaluate_resnet,
    ("evaluate", "detection"): evaluate_maskrcnn,
}


def keys_in(text: str) -> set[str]:
    """The dotted keys that a help lists."""
    found, section = set(), ""
    for line in text.splitlines():
        if line.startswith("--") and line.endswith("KEY"):
            section = line.removeprefix("--").removesuffix("KEY")
        elif line.startswith("  ") and line[2:3].isalpha() and "[" in line:
            found.add(section + line.split()[0])
    return found


@pytest.mark.parametrize(("job", "task"), COMMANDS)
def test_the_help_of_a_command_lists_what_it_reads(job: str, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS[job, task].main(["--help"]) == 0
    text = capsys.readouterr().out
    found = keys_in(text[text.index("\n--KEY") :])
    assert found == {key.dotted for key in keys() if key.is_read_by(job, task)}
    assert set(HELP_HOLDS[job, task]) <= found
    assert not set(HELP_LACKS[job, task]) & found
    names = {
        "classification": "resnet18|resnet34|resnet50|resnet101|resnet50ssl [resnet50]",
        "detection": "maskrcnn [to be set]",  # the default is no detector
    }
    assert names[task] in text
    assert ("digit_crops" in text) == (task == "classification")
    for _, flags in (line.split(" --", 1) for line in text.splitlines() if line.startswith("  python -m")):
        key = flags.replace("=", " ").split()[0].replace("layer1.0.conv1", "<layer>")
        assert key == "config" or key in found  # the examples hold for this command


def test_every_key_is_read_by_some_command_and_a_section_passes_its_marks_on() -> None:
    marks = {key.dotted: key for key in keys()}
    assert set(marks) == set(leaves())
    assert all(key.jobs and key.tasks for key in marks.values())
    assert marks["lr_scheduler.factor"].jobs == ("train",)  # marked is lr_scheduler
    assert (marks["evaluation.backend"].jobs, marks["evaluation.backend"].tasks) == (
        ("train", "evaluate"),
        ("detection",),
    )
    assert marks["evaluation.per_category"].jobs == ("evaluate",)
    assert marks["dataloader.crop_padding"].is_read_by("train", "classification")
    assert not marks["dataloader.crop_padding"].is_read_by("train", "detection")
    assert not marks["output_path"].is_read_by("evaluate", "classification")
    assert marks["output_path"].is_read_by("evaluate", "detection")


def test_how_images_are_read_has_no_effect_without_images() -> None:
    said = ineffective(load("../config/compress.yaml", ["--calibration.count", "5"]), "compress")
    assert said == ["calibration.count has no effect: calibration.images is not set"]
    flags = ["--calibration.count", "5", "--calibration.images", "photos", "--calibration.image_size", "32"]
    assert ineffective(load("../config/compress.yaml", flags), "compress") == []


def test_what_a_job_does_not_read_is_said_where_the_command_line_gives_it() -> None:
    settings = load("../config/evaluate_resnet.yaml", ["--epochs", "3", "--optimizer", "sgd"])
    said = ineffective(settings, "evaluate")
    assert "epochs has no effect: it is not read by this command" in said
    assert "optimizer has no effect: it is not read by this command" in said
    assert not any(line.startswith("epochs") for line in ineffective(load("../config/train_resnet18.yaml"), "evaluate"))
    assert not any("not read" in line for line in ineffective(settings, "train"))


def test_what_a_size_chooses_is_said_to_have_no_effect() -> None:
    key = "model.compression_parameters"
    own = ["--compression.ratio", "20", f"--{key}.k", "512", f"--{key}.large_subvectors", "True"]
    said = ineffective(load("../config/compress.yaml", own), "compress")
    assert said == [f"{key}.{name} has no effect: compression.ratio chooses it" for name in ("k", "large_subvectors")]
    dense = ["--compression.size", "1MB", "--model.use_compression", "False"]
    said = ineffective(load("../config/train_resnet18.yaml", dense), "train", "classification")
    assert "compression.size has no effect: model.use_compression is False" in said
    few = ["--compression.count", "32"]
    neither = "compression.count has no effect: neither compression.size nor compression.ratio is given"
    assert ineffective(load("../config/compress.yaml", few), "compress") == [neither]
    for own in (["--compression.ratio", "20"], ["--compression.plan", "True"]):
        assert ineffective(load("../config/compress.yaml", [*few, *own]), "compress") == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.2MB", 1_258_291), ("900KB", 921_600), ("900 kib", 921_600), ("2GB", 2**31), ("1_200_000", 1_200_000),
        ("1200000 B", 1_200_000), ("1e6", 1_000_000), ("12 bytes", 12), ("0.5KB", 512),
    ],
)  # fmt: skip
def test_sizes_have_units_of_1024(text: str, size: int) -> None:
    settings = load("../config/compress.yaml", ["--compression.size", text])
    assert settings.compression.size == size
    assert Settings.model_validate(yaml.safe_load(to_yaml(settings))) == settings


@pytest.mark.parametrize(
    ("arguments", "job", "task", "key"),
    [
        (["--output_path", "x"], "evaluate", "classification", "output_path"),
        (["--epochs", "9"], "evaluate", "classification", "epochs"),  # at its default, but given in vain all the same
        ([f"--{LAYER_SPECS}.a.b.k_means_type", "src"], "evaluate", "detection", f"{LAYER_SPECS}.a.b.k_means_type"),
        (["--expected.accuracy", "50"], "train", "classification", "expected.accuracy"),
        (["--momentum", "0.5"], "evaluate", "classification", "momentum"),
    ],
)
def test_a_key_given_in_vain_is_mentioned_once(file: Path, arguments: list[str], job: str, task: str, key: str) -> None:
    arch = {"classification": "resnet18", "detection": "maskrcnn"}[task]
    file.write_text(f"model: {{arch: {arch}}}\n")
    assert ineffective(load(str(file), arguments), job, task) == [
        f"{key} has no effect: it is not read by this command"
    ]


def test_a_file_written_for_training_may_be_given_to_an_evaluation() -> None:
    for name, task in (("train_resnet18", "classification"), ("train_maskrcnn", "detection")):
        assert ineffective(load(f"../config/{name}.yaml"), "evaluate", task) == []


def test_a_key_of_hundreds_of_characters_is_cut_in_the_message(file: Path) -> None:
    file.write_text(f"{'out' + 900 * '9'}: 1\n")
    with pytest.raises(SettingsError) as error:
        load(str(file))
    assert len(str(error.value)) - len(str(file)) < 800
    assert "out9999" in str(error.value)
    assert "known keys here: " in str(error.value)
