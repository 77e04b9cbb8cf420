"""Hostile input, thousands of cases: whatever is done to a model file, a settings file, a command line or a group, the
answer is one clear error or the right result: no traceback, no hang, no memory, no executed code, no wrong model."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import pickle
import random
import resource
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import src.inspect as inspect_command
from src import architectures, convert, evaluate_resnet
from src.architectures.architecture import Architecture
from src.common.errors import CheckpointError, GroupError, SettingsError, UserError
from src.common.registry import Entry
from src.compression.permute.groups import Group, check_function, resolve
from src.model_files.open_model_file import open_model_file
from src.model_files.packed import AppliedPermutation, ModelInfo, is_packed, load_packed, save_packed
from src.model_files.pth import compressed_state, read_tensors, save_compressed, save_dense_safetensors
from src.run import command
from src.settings import load
from tests.conftest import ROOT
from tests.support.helpers import lively, outputs, quantized, shuffle, spec

LONGEST = 10
"""Seconds that any single case may take."""
MOST_MEMORY = 2 << 30


def tiny(n: int = 20) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, n),
    )


TINY = Architecture(
    name="tiny",
    task="classification",
    build=tiny,
    weights_url="",
    n_classes=20,
    head="6",
    groups=lambda _model: [Group(("0", "1"), ("3",)), Group(("3",), ("6",))],
)
X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def within_bounds() -> Iterator[None]:
    """The tiny architecture is known, and the whole test stays under the memory limit."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    entry = Entry("tests.model_files.test_hostile:TINY", "a small network", {"task": "classification"})
    with architectures.ARCHITECTURES.added("tiny", entry):
        yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise AssertionError(f"a case took more than {LONGEST} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def complaint(action: Callable[[], Any], kind: type[UserError] = UserError) -> tuple[str | None, Any]:
    """The message of the error that `action` ends in, or what it returns; any other error is a failure."""
    with no_hang():
        try:
            return None, action()
        except kind as error:
            return str(error), None


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantized(lively(tiny()), spec(8)).eval()


@pytest.fixture(scope="module")
def whole(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The model as a packed file, an entropy-coded one and a `.pth`."""
    folder = tmp_path_factory.mktemp("whole")
    p = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    info = ModelInfo(
        arch="tiny",
        num_classes=20,
        settings={"compression_parameters": {"k": 8}},
        metric={"accuracy": 50.0},
        permutations=(AppliedPermutation(parents=("0", "1"), children=("3",), permutation=p, reshapes={}),),
        producer="pqf",
    )
    # uneven codes, so that entropy coding is chosen
    skewed = lively(tiny())
    skewed = quantized(skewed, spec(8)).eval()
    rare = torch.rand(skewed[3].codes_matrix.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    skewed[3].set_codes(skewed[3].codebook.detach(), skewed[3].codes_matrix.masked_fill(rare, 0))
    save_packed(model, folder / "packed.safetensors", info)
    save_packed(skewed, folder / "entropy.safetensors", info, entropy_coding=True)
    save_compressed(model, folder / "model.pth")
    assert "3.codes_huffman" in load_packed(folder / "entropy.safetensors").tensors
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(path: Path) -> nn.Module | None:
    """The model that a file gives, or None where it is refused."""
    error, found = complaint(lambda: open_model_file(path, None if is_packed(path) else "tiny"))
    assert error is None or str(path) in error
    return None if found is None else found.model


def same(found: nn.Module, wanted: nn.Module) -> bool:
    ours, theirs = compressed_state(found), compressed_state(wanted)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())


# --- packed files ---


@pytest.mark.parametrize("name", ["packed.safetensors", "entropy.safetensors"])
def test_a_packed_file_with_any_byte_altered_is_refused(name: str, whole: dict[str, bytes], tmp_path: Path) -> None:
    contents, path, draw = whole[name], tmp_path / "model.safetensors", random.Random(0)
    for case in range(800):
        damaged = bytearray(contents)
        for _ in range(draw.choice([1, 1, 1, 2, 20])):
            damaged[case if case < 200 else draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        if bytes(damaged) == contents:
            continue
        path.write_bytes(damaged)
        assert read(path) is None, case


@pytest.mark.parametrize("name", ["packed.safetensors", "entropy.safetensors"])
def test_a_packed_file_with_bytes_put_in_taken_out_or_moved_is_refused(
    name: str, whole: dict[str, bytes], tmp_path: Path
) -> None:
    contents, path, draw = whole[name], tmp_path / "model.safetensors", random.Random(1)
    for case in range(500):
        at, n = draw.randrange(len(contents)), draw.choice([1, 2, 8, 100])
        damaged = [
            contents[:at] + contents[at + n :],
            contents[:at] + draw.randbytes(n) + contents[at:],
            contents[:at] + contents[at : at + n][::-1] + contents[at + n :],
            contents[:at] + bytes(n) + contents[at + n :],
            contents + draw.randbytes(n),
        ][case % 5]
        if damaged != contents:
            path.write_bytes(damaged)
            assert read(path) is None, case


def test_a_packed_network_truncated_at_every_kilobyte_is_refused(tmp_path: Path) -> None:
    real = quantized(
        lively(architectures.ARCHITECTURES["resnet18"].build(10)), spec(256, iterations=0, ignored=["conv1"])
    ).eval()
    path = tmp_path / "model.safetensors"
    save_packed(real, path, ModelInfo("resnet18", 10))
    size = path.stat().st_size
    assert size > 1 << 20
    assert read(path) is not None
    with open(path, "r+b") as file:
        for length in [size - 1, *range(size // 1024 * 1024, 0, -1024), *range(64, -1, -1)]:
            file.truncate(length)
            assert read(path) is None, length


NASTY: list[Any] = [
    None, True, "", "x", "x" * 3000, "\x00", -1, 0, 1, 3, 2**31, 2**40, 2**63, 2**64, 10**30, 1.5, 1e308, float("nan"),
    [], [0], [1], [-1], [2**62] * 8,
    [2**30, 2**30], [1] * 300, {}, {"a": 1}, {"": None}, [[]], "F64", "U8", "I64", "BOOL", "Linear", "Conv2d",
    "resnet50", "maskrcnn",
]  # fmt: skip


def places(tree: Any, at: tuple = ()) -> Iterator[tuple]:
    """The path of everything in a JSON tree."""
    yield at
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield from places(value, (*at, key))


def altered(tree: Any, at: tuple, value: Any) -> Any:
    if not at:
        return value
    copied = dict(tree) if isinstance(tree, dict) else list(tree)
    copied[at[0]] = altered(tree[at[0]], at[1:], value)
    return copied


def without(tree: Any, at: tuple) -> Any:
    copied = dict(tree) if isinstance(tree, dict) else list(tree)
    if len(at) == 1:
        del copied[at[0]]
    else:
        copied[at[0]] = without(tree[at[0]], at[1:])
    return copied


def header_of(contents: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", contents[:8])[0]
    return json.loads(contents[8 : 8 + length]), contents[8 + length :]


def fields_of(header: dict[str, Any]) -> dict[str, str]:
    """The metadata of a file, which stand in one key."""
    return json.loads(header["__metadata__"]["pqf"])


def with_fields(header: dict[str, Any], changed: dict[str, str]) -> dict[str, Any]:
    try:
        fields = {**fields_of(header), **changed}
    except (ValueError, TypeError):  # not there any more
        return header
    return {**header, "__metadata__": {**header["__metadata__"], "pqf": json.dumps(fields)}}


def forged(header: Any, data: bytes) -> bytes:
    """A file with this header and a right checksum."""
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict) and "pqf" in header["__metadata__"]:
        header = with_fields(header, {"checksum": "0" * 64})
    text = json.dumps(header).encode()
    contents = struct.pack("<Q", len(text)) + text + data
    return contents.replace(b"0" * 64, hashlib.sha256(contents).hexdigest().encode(), 1)


def test_forged_headers_with_right_checksums_are_refused_or_change_nothing(
    model: nn.Module, whole: dict[str, bytes], tmp_path: Path
) -> None:
    header, data = header_of(whole["packed.safetensors"])
    path, accepted, cases = tmp_path / "model.safetensors", 0, 0
    entries = [at for at in places(header) if "__metadata__" not in at]
    cuts = [without(header, at) for at in places(header) if at]
    for forgery in [*(altered(header, at, value) for at in entries for value in NASTY), *cuts]:
        path.write_bytes(forged(forgery, data))
        found = read(path)
        cases += 1
        accepted += found is not None
        assert found is None or same(found, model), forgery
    assert cases > 2000
    assert accepted < cases / 20


def test_forged_metadata_with_right_checksums_are_refused_or_change_nothing(
    model: nn.Module, whole: dict[str, bytes], tmp_path: Path
) -> None:
    header, data = header_of(whole["packed.safetensors"])
    path, cases, draw = tmp_path / "model.safetensors", 0, random.Random(2)
    for field in ("model", "layers", "permutations", "tied", "format", "format_version", "producer"):
        text = fields_of(header)[field]
        tree = json.loads(text) if field in ("model", "layers", "permutations", "tied") else text
        forgeries = [json.dumps(altered(tree, at, value)) for at in places(tree) for value in NASTY]
        forgeries += ["", "{", "[" * 50_000, "1" * 5000, '{"a":1,"a":2}', "NaN", text[:-1], "\ud800"]
        for forgery in forgeries if len(forgeries) < 200 else draw.sample(forgeries, 200):
            path.write_bytes(forged(with_fields(header, {field: forgery}), data))
            found = read(path)
            cases += 1
            assert found is None or same(found, model), forgery
    assert cases > 600


def test_headers_that_are_bombs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    nested, many = (
        b"[" * 2_000_000,
        json.dumps({f"t{i}": {"dtype": "F32", "shape": [], "data_offsets": [0, 0]} for i in range(20_000)}).encode(),
    )
    twice = b'{"__metadata__":{"format":"pqf"},"__metadata__":{"format":"pqf"}}'
    for text in (
        nested,
        many,
        twice,
        b"",
        b"{}",
        b"null",
        b'{"__metadata__":{"format":"pqf"}}',
        b"\xff" * 100,
        b'{"a":' + b"9" * 1_000_000 + b"}",
    ):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        assert read(path) is None
    for length in (0, 1, 8, 2**31, 2**40, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
        assert read(path) is None


def with_tensor(contents: bytes, name: str, change: Callable[[Tensor], None]) -> bytes:
    """A packed file with one tensor's values changed and a right checksum."""
    header, data = header_of(contents)
    data = bytearray(data)
    begin, end = header[name]["data_offsets"]
    dtype = {"F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}[header[name]["dtype"]]
    change(torch.frombuffer(data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin))
    return forged(header, bytes(data))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_whatever_the_checksum_says(
    value: float, whole: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    names = [
        name
        for name, entry in header_of(whole["packed.safetensors"])[0].items()
        if entry.get("dtype") in ("F16", "F32")
    ]
    assert len(names) >= 5
    for name in names:
        path.write_bytes(with_tensor(whole["packed.safetensors"], name, lambda tensor: tensor[-1:].fill_(value)))
        with pytest.raises(CheckpointError, match="not finite"):
            open_model_file(path)


def test_forged_entropy_coded_codes_are_refused_or_stay_below_k(whole: dict[str, bytes], tmp_path: Path) -> None:
    path, draw = tmp_path / "model.safetensors", random.Random(3)
    for _ in range(300):

        def flip(tensor: Tensor) -> None:
            tensor[draw.randrange(tensor.numel())] ^= 1 << draw.randrange(8)

        path.write_bytes(with_tensor(whole["entropy.safetensors"], "3.codes_huffman", flip))
        found = read(path)
        assert found is None or int(found[3].codes_matrix.max()) < 8


# --- .pth files ---


def test_a_pth_file_with_any_byte_altered_is_refused_or_gives_the_same_model(
    model: nn.Module, whole: dict[str, bytes], tmp_path: Path
) -> None:
    contents, path, draw, kept = whole["model.pth"], tmp_path / "model.pth", random.Random(4), 0
    for case in range(1000):
        damaged = bytearray(contents)
        for _ in range(draw.choice([1, 1, 3])):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        found = read(path)
        kept += found is not None
        assert found is None or same(found, model), case
    assert kept < 800  # what is altered most often is the padding of the archive


def test_a_pth_file_truncated_anywhere_is_refused(whole: dict[str, bytes], tmp_path: Path) -> None:
    contents, path = whole["model.pth"], tmp_path / "model.pth"
    for length in [*range(0, len(contents), 37), *range(len(contents) - 30, len(contents))]:
        path.write_bytes(contents[:length])
        assert read(path) is None, length


def test_a_dense_safetensors_file_of_ours_with_a_bit_altered_is_refused_or_gives_the_same_network(
    tmp_path: Path,
) -> None:
    dense, path, draw, kept = lively(tiny()), tmp_path / "model.safetensors", random.Random(10), 0
    save_dense_safetensors(dense, path)
    contents = path.read_bytes()
    for case in range(400):
        damaged = bytearray(contents)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        found = read(path)
        kept += found is not None  # what marks the file as ours was hit
        assert found is None or same(found, dense), case
    assert kept < 10


def state_of(whole: dict[str, bytes]) -> dict[str, Tensor]:
    return torch.load(io.BytesIO(whole["model.pth"]), weights_only=True)


BAD_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "a number repeated": lambda t: torch.zeros(1, dtype=t.dtype).expand(1 << 20, 1 << 20),
    "a number repeated in one row": lambda t: torch.zeros(1, dtype=t.dtype).expand(*t.shape[:-1], 1 << 40),
    "sparse": lambda t: t.to_sparse(),
    "on no device": lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "truth values": lambda t: t.to(torch.bool),
    "nothing": lambda t: t[:0],
    "a scalar": lambda t: torch.tensor(1, dtype=t.dtype),
    "nested": lambda t: {"a": t},
    "text": lambda _t: "text",
    "nan": lambda t: torch.full(t.shape, float("nan")),
    "beyond 64-bit codes": lambda t: torch.full(t.shape, 2**32, dtype=torch.int64),
    "negative": lambda t: torch.full(t.shape, -1, dtype=torch.int8),
    "unsigned 64-bit": lambda t: torch.ones(t.shape, dtype=torch.uint64),
    "transposed": lambda t: t.t().contiguous() if t.dim() == 2 and t.shape[0] != t.shape[1] else t[..., :-1],
}


@pytest.mark.parametrize("bad", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_a_pth_file_with_one_bad_tensor_is_refused(
    bad: Callable[[Tensor], Any], whole: dict[str, bytes], tmp_path: Path
) -> None:
    state, path = state_of(whole), tmp_path / "model.pth"
    for name, tensor in state.items():
        torch.save({**state, name: bad(tensor)}, path)
        assert read(path) is None, name


def bomb_of_bytes(path: Path) -> None:
    """A pickle that asks for 40 GB of zeros with a function that torch allows."""
    path.write_bytes(pickle.dumps(Call(bytearray, 40 << 30), protocol=2).replace(b"__builtin__", b"builtins"))


def bomb_inside_an_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "archive/data.pkl", pickle.dumps(Call(bytearray, 40 << 30), protocol=2).replace(b"__builtin__", b"builtins")
        )
        archive.writestr("archive/version", "3\n")


def bomb_of_zeros(path: Path) -> None:
    """256 MB of zeros in an archive of a quarter of a megabyte."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/version", "3\n")
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            block = bytes(1 << 24)
            for _ in range(16):
                entry.write(block)


class Call:
    """What is called when it is unpickled."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.what = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.what


@pytest.mark.parametrize("bomb", [bomb_of_bytes, bomb_inside_an_archive, bomb_of_zeros])
def test_bombs_are_refused(bomb: Callable[[Path], None], tmp_path: Path) -> None:
    bomb(tmp_path / "model.pth")
    assert read(tmp_path / "model.pth") is None


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pt"])
@pytest.mark.parametrize("wrap", ["bare", "legacy", "zip", "second pickle"])
def test_no_payload_is_executed(protocol: int, suffix: str, wrap: str, whole: dict[str, bytes], tmp_path: Path) -> None:
    touched, path = tmp_path / "touched", tmp_path / f"model{suffix}"
    payload = pickle.dumps(Call(Path.touch, touched), protocol=protocol)
    if wrap == "bare":
        path.write_bytes(payload)
    elif wrap == "legacy":
        start = (
            pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
            + pickle.dumps(1001, protocol=2)
            + pickle.dumps({"little_endian": True}, protocol=2)
        )
        path.write_bytes(start + payload)
    elif wrap == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", payload)
            archive.writestr("archive/version", "3\n")
    else:
        with zipfile.ZipFile(io.BytesIO(whole["model.pth"])) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                new.writestr(
                    entry.filename, old.read(entry) + (payload if entry.filename.endswith("data.pkl") else b"")
                )
    found = read(path)
    assert not touched.exists()
    assert found is None or wrap == "second pickle"  # what follows a pickle is never read
    assert pickle.loads(payload) is None  # the payload is real
    assert touched.exists()


# --- settings, command lines, groups ---

CONFIGS = sorted((ROOT / "config").rglob("*.yaml"))
SCRAPS = [
    ":", "- ", "{", "}", "[", "]", "&a ", "*a", "!!python/object/apply:os.system [id]", "!!int ", "<<: ", "|", "\t",
    "\x00", "\u2028", "'", '"', "---\n",
    "null", "~", ".nan", ".inf", "1e999", "-1", "9" * 400, "True", "0x10", "x" * 5000, "../../etc/passwd", "é",
    "\ud7ff", "%YAML 9.9\n", "? ", "#",
]  # fmt: skip


def mutated(text: str, draw: random.Random) -> str:
    """`text` with a few lines or characters removed, doubled, moved or replaced."""
    for _ in range(draw.randrange(1, 5)):
        text = MUTATIONS[draw.randrange(len(MUTATIONS))](text, text.split("\n"), draw) or "a"
    return text


def moved(text: str, lines: list[str], draw: random.Random) -> str:  # noqa: ARG001 (of a protocol)
    here = draw.randrange(len(lines))
    return "\n".join(lines[here:] + lines[:here])


def repeated(text: str, lines: list[str], draw: random.Random) -> str:  # noqa: ARG001 (of a protocol)
    here, times = draw.randrange(len(lines)), draw.choice([0, 2])
    return "\n".join([*lines[:here], *[lines[here]] * times, *lines[here + 1 :]])


def indented(text: str, lines: list[str], draw: random.Random) -> str:  # noqa: ARG001 (of a protocol)
    here = draw.randrange(len(lines))
    return "\n".join([*lines[:here], " " * draw.randrange(5) + lines[here], *lines[here + 1 :]])


def scrapped(text: str, lines: list[str], draw: random.Random) -> str:  # noqa: ARG001 (of a protocol)
    at = draw.randrange(len(text) + 1)
    return text[:at] + draw.choice(SCRAPS) + text[at + draw.choice([0, 0, 1, 8]) :]


def retyped(text: str, lines: list[str], draw: random.Random) -> str:  # noqa: ARG001 (of a protocol)
    at = draw.randrange(len(text) + 1)
    return text[:at] + chr(draw.choice([draw.randrange(128), draw.randrange(0xD800)])) + text[at + 1 :]


MUTATIONS = (moved, repeated, indented, scrapped, retyped)


def test_damaged_settings_files_load_or_are_refused(tmp_path: Path) -> None:
    draw, path, loaded = random.Random(5), tmp_path / "settings.yaml", 0
    texts = [config.read_text() for config in CONFIGS]
    for case in range(700):
        path.write_text(mutated(draw.choice(texts), draw), encoding="utf-8", errors="surrogatepass")
        error, _ = complaint(lambda: load(str(path)), SettingsError)
        loaded += error is None
        assert error is None or (str(path) in error and max(map(len, error.splitlines())) < 800), case
    assert 50 < loaded < 650


def test_yaml_bombs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )
    merges = "m0: &m0 {x: 1}\n" + "".join(
        f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}], y{n}: 1}}\n" for n in range(1, 40)
    )
    into_a_key = (
        laughs
        + "model: {compression_parameters: {ignored_modules: *a11, layer_specs: {fc: *a11}}, permutations: *a11}\n"
    )
    for text in (
        laughs,
        into_a_key,
        merges,
        "[" * 100_000,
        "{a: " * 5000,
        "- " * 50_000,
        "a: " + "9" * 1_000_000,
        "epochs: 1" + "0" * 5000,
        "&a " * 1000 + "x",
    ):
        path.write_text(text)
        with no_hang(), pytest.raises(SettingsError):
            load(str(path))


def test_damaged_command_lines_are_refused_with_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw, settled = random.Random(6), 0
    keys = [
        "epochs",
        "learning_rate",
        "model.arch",
        "model.compression_parameters.k",
        "model.permutations",
        "dataloader.mean",
        "seed",
        "overwrite",
        "config",
    ]
    keys += [
        "model.compression_parameters.layer_specs.layer1.0.conv1.k",
        "model",
        "lr_scheduler.milestones",
        "expected.accuracy",
        "model.permutation_specs.fc.reshape",
    ]
    values = [
        *SCRAPS,
        "1",
        "[1, 2]",
        "{a: 1}",
        "cosine",
        "1e-3",
        "False",
        "[{parents: [a]}, {children: [b]}]",
        str(CONFIGS[0]),
        str(tmp_path),
        "/dev/null",
    ]
    for case in range(700):
        arguments = []
        for _ in range(draw.randrange(1, 5)):
            key, value = draw.choice(keys), draw.choice(values)
            if draw.random() < 0.3:
                key = mutated(key, draw).replace("\n", "")
            arguments += draw.choice([[f"--{key}", value], [f"--{key}={value}"], [key, value], [f"--{key}"], [value]])
        if any(flag in ("-h", "--help") for flag in arguments):
            continue
        with no_hang():
            status = command.run(
                lambda _settings: 0,
                prog="p",
                purpose="q",
                default_config="../config/train_resnet18.yaml",
                argv=arguments,
            )
        error = capsys.readouterr().err
        assert status in (0, 2), arguments
        assert (error.count("error: ") >= 1) == (status == 2), case
        settled += status == 0
    assert settled > 3


@pytest.mark.parametrize("entry", [convert.main, inspect_command.main])
def test_damaged_command_lines_of_the_file_commands(
    entry: Callable[[list[str]], int], whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(7)
    (tmp_path / "good.safetensors").write_bytes(whole["packed.safetensors"])
    (tmp_path / "bad.pth").write_bytes(whole["model.pth"][:-50])
    flags = [
        "--dense",
        "--entropy",
        "--arch",
        "--overwrite",
        "--html",
        "--against",
        "--image_size",
        "--unknown",
        "--",
        "-x",
        "--arch=tiny",
        "--image_size=0",
    ]
    names = [
        "good.safetensors",
        "bad.pth",
        "missing.pth",
        "",
        "/",
        "/dev/null",
        "/proc/self/mem",
        "out.txt",
        "out.pth",
        "out.safetensors",
        "a\x00b",
        "x" * 5000,
    ]
    for _ in range(250):
        arguments = [
            str(tmp_path / n) if n and n[0] != "/" else n for n in draw.choices(names, k=draw.randrange(4))
        ] + draw.choices(flags, k=draw.randrange(3))
        draw.shuffle(arguments)
        with no_hang():
            try:
                status = entry(arguments)
            except SystemExit as left:
                status = left.code if isinstance(left.code, int) else 1
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert status in (0, 1, 2), arguments
        assert status == 0 or "error: " in error, arguments
        for path in tmp_path.glob("out.*"):
            path.unlink()


def check(model: nn.Module, groups: list[Group], reshapes: dict[str, list[int]]) -> None:
    resolve(model, groups, reshapes)
    check_function(model, groups, X, reshapes)


def test_random_groups_are_refused_or_change_nothing() -> None:
    """Groups that the check lets through leave the function as it is, whatever permutation is applied."""
    draw, names, let_through = random.Random(8), ["0", "1", "3", "6", "2", "5", "", "7", "0.weight", "layer1"], 0
    for case in range(500):
        good = [Group(("0", "1"), ("3",)), Group(("3",), ("6",))]
        groups = [
            Group(
                tuple(draw.choices(names, k=draw.randrange(1, 4))), tuple(draw.choices(names, k=draw.randrange(1, 3)))
            )
            if draw.random() < 0.4
            else draw.choice(good)
            for _ in range(draw.randrange(1, 4))
        ]
        reshapes = (
            {"6": draw.choice([[20, 16], [20, 16, 1, 1], [20, 4, 4], [0], [], [16, 20]])} if draw.random() < 0.2 else {}
        )
        model = lively(tiny())
        error, _ = complaint(functools.partial(check, model, groups, reshapes), GroupError)
        if error is not None:
            assert "permut" in error, case
            continue
        before = outputs(model, X)
        shuffle(model, groups, case, reshapes)
        assert (outputs(model, X) - before).abs().max() < 1e-4
        let_through += 1
    assert 30 < let_through < 400


def test_what_the_evaluation_command_says_of_a_hostile_file(
    whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, contents in (
        ("a.safetensors", whole["packed.safetensors"][:-1]),
        ("b.pth", pickle.dumps(Call(Path.touch, tmp_path / "touched"))),
    ):
        (tmp_path / name).write_bytes(contents)
        assert (
            evaluate_resnet.main(
                ["--model.state_dict_compressed", str(tmp_path / name), "--dataloader.imagenet_path", str(tmp_path)]
            )
            == 2
        )
        error = capsys.readouterr().err
        assert error.count("error: ") == 1
        assert "Traceback" not in error
    assert not (tmp_path / "touched").exists()


@pytest.mark.slow
def test_a_long_run_of_random_damage(model: nn.Module, whole: dict[str, bytes], tmp_path: Path) -> None:
    draw = np.random.default_rng(9)
    for name, contents in whole.items():
        path, original = tmp_path / name, np.frombuffer(contents, np.uint8)
        for _ in range(8000):
            damaged = original.copy()
            where = draw.integers(damaged.size, size=draw.choice([1, 2, 50]))
            damaged[where] = draw.integers(256, size=where.size)
            path.write_bytes(damaged.tobytes())
            found = read(path)
            if name.endswith(".pth"):
                assert found is None or same(found, model)
            else:
                assert found is None or damaged.tobytes() == contents


def test_reading_does_not_change_the_file(whole: dict[str, bytes], tmp_path: Path) -> None:
    for name, contents in whole.items():
        (tmp_path / name).write_bytes(contents)
        assert read(tmp_path / name) is not None
        assert (tmp_path / name).read_bytes() == contents
    assert read_tensors(tmp_path / "model.pth").keys() == load_packed(tmp_path / "packed.safetensors").state().keys()
