"""What is chosen with photos within a run is measured once, and holds for all that follows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from src.common.errors import DataError
from src.compression.quantize.budget.wanted import Budget
from src.compression.quantize.plan import Plan, QuantizationSpec
from src.model_files.size import model_size
from src.run.chosen import FILE, chosen_by_photos
from src.run.compression_specs import Sized, sized_for
from src.run.open_run import open_run
from src.settings import load
from tests.support.own_network import Net

PHOTOS = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)).split(20)


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def sized() -> Sized:
    spec = QuantizationSpec(k=16, k_means_n_iters=2)
    plan, found = sized_for(network(), spec, Budget(ratio=8), 0, show_progress=False)
    assert found is not None
    assert plan.layers == found.plan().layers
    return found


def chosen(output: Path, photos: tuple[Tensor, ...], wanted: Sized, *flags: str) -> Plan:
    """Within a run that never ends, so that the next one resumes it."""
    settings = load(
        "config/compress.yaml", ["--model.arch", "tests.support.own_network:Net", "--output_path", str(output), *flags]
    )
    with open_run(settings) as run:
        run.check_inputs({})
        run.begin({}, lambda *_: None, "bits")
        return chosen_by_photos(run, wanted, network(), photos)[0]


def test_a_run_that_resumes_keeps_the_choice_and_one_that_cannot_read_it_measures_again(tmp_path: Path) -> None:
    wanted, output = sized(), tmp_path / "out"
    first = chosen(output, PHOTOS, wanted)
    assert "KL divergence" in first.notes[-1]
    assert "chosen for ratio 8" in first.notes[-1]
    assert model_size(network()).bits / 8 >= sum(layer.k * layer.d * 16 for layer in first.layers.values())
    other = tuple(5 * part.flip(3) + 1 for part in PHOTOS)
    assert chosen(output, other, wanted) == first
    (file,) = output.rglob(FILE)
    for damaged in ("", "{}", '{"layers": [], "notes": []}', '{"layers": [{"name": "head"}], "notes": []}'):
        file.write_text(damaged)
        assert chosen(output, PHOTOS, wanted) == first
    file.unlink()
    with pytest.raises(DataError, match=r"inputs of layer 'body\.0' are not finite"):
        chosen(output, (PHOTOS[0] / 0,), wanted)


def test_only_so_many_photos_say_what_a_size_is_spent_on(tmp_path: Path) -> None:
    """Photos between those that are shown change nothing: their outputs are not even finite."""
    wanted, photos = sized(), PHOTOS[0][:16].clone()
    shown = photos[::2].clone()
    first = chosen(tmp_path / "few", (shown,), wanted)
    photos[1::2] = float("nan")
    batches = tuple(photos.split(8))
    assert chosen(tmp_path / "of more", batches, wanted, "--compression.count", "8") == first
    with pytest.raises(DataError):
        chosen(tmp_path / "all", batches, wanted)
