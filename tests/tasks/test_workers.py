"""Batches on their way from loader processes, and every way in which that fails: one error, never a wait without end."""

from __future__ import annotations

import multiprocessing
import resource
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from src.common.errors import RunError
from src.tasks.loading import Batch, EpochOrder, batches, collate, make_loader
from src.tasks.workers import Shipped, pack
from tests.conftest import ROOT

PATIENCE = 60
"""Seconds after which a loader counts as hanging."""


@dataclass
class Numbers:
    """A dataset of `size` tensors of `side` x `side`; item `spoilt` is what `spoil` makes of it."""

    size: int = 6
    side: int = 4
    spoilt: int = -1
    spoil: Any = None
    seed: int = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: tuple[int, int]) -> Any:
        _, number = key
        if number == self.spoilt:
            self.spoil()
        return torch.full((3, self.side, self.side), float(number)), number


def loaded(dataset: Numbers, collate_items: Any = collate, batch_size: int = 2) -> list[Any]:
    """All batches that one loader process brings."""
    order = EpochOrder(len(dataset), False, 0, 0, 1)
    return list(batches(make_loader(dataset, order, batch_size, 1, False, collate_items)))


@dataclass(frozen=True)
class Mixed:
    """Tensors of many kinds in every place a batch may have them."""

    pair: tuple[Tensor, Tensor]
    named: dict[str, Tensor]
    listed: list[tuple[dict[str, Tensor], str]]
    number: int


def test_what_is_packed_comes_out_as_it_was() -> None:
    draw = torch.Generator().manual_seed(0)
    batch = Mixed(
        pair=(torch.randn(3, 5, generator=draw), torch.tensor(7)),
        named={"none": torch.empty(0, 4), "flags": torch.tensor([True, False, True]), "half": torch.ones(3).half()},
        listed=[({"turned": torch.randn(4, 3, generator=draw).t()}, "text"), ({}, "")],
        number=5,
    )
    shipped = pack(batch)
    assert shipped.block.is_shared()
    found = shipped.unpacked()
    assert found.number == 5
    assert [text for _, text in found.listed] == ["text", ""]
    for one, other in (
        *zip(batch.pair, found.pair, strict=True),
        *((batch.named[name], found.named[name]) for name in batch.named),
        (batch.listed[0][0]["turned"], found.listed[0][0]["turned"]),
    ):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_batch_takes_one_file_however_many_tensors_it_has() -> None:
    shipped = pack([torch.randn(3) for _ in range(500)])
    assert isinstance(shipped, Shipped)
    assert len(shipped.unpacked()) == 500
    assert len({tensor.untyped_storage().data_ptr() for tensor in shipped.unpacked()}) == 1


def test_what_cannot_be_sent_is_an_error_of_the_main_process() -> None:
    started = time.monotonic()
    with pytest.raises(RunError, match=r"(?s)cannot hand over a batch: .*pickle.*--dataloader\.num_workers"):
        loaded(Numbers(), lambda items: (collate(items), lambda: None))
    assert time.monotonic() - started < PATIENCE


def test_a_failed_loader_leaves_no_process_whose_death_is_told_later() -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(RunError, match="cannot hand over a batch") as held:
        loaded(Numbers(), lambda items: (collate(items), lambda: None))
    assert set(multiprocessing.active_children()) <= before
    assert held.tb is not None  # what holds the loader alive


def test_an_error_in_a_thread_of_a_loader_process_ends_the_wait() -> None:
    def spoil() -> None:
        threading.Thread(target=lambda: 1 / 0).start()
        time.sleep(10 * PATIENCE)

    started = time.monotonic()
    # its end is seen first, or that its connection is gone
    with pytest.raises(RunError, match=r"(?s)a process that loads images died.*--dataloader\.num_workers"):
        loaded(Numbers(spoilt=3, spoil=spoil))
    assert time.monotonic() - started < PATIENCE


def test_a_defect_of_the_dataset_keeps_its_traceback() -> None:
    def spoil() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*shapes do not fit"):
        loaded(Numbers(spoilt=3, spoil=spoil))


def test_want_of_memory_in_a_loader_process_says_what_to_do() -> None:
    def spoil() -> None:
        raise MemoryError

    with pytest.raises(RunError, match=r"not enough memory.*--dataloader\.num_workers"):
        loaded(Numbers(spoilt=3, spoil=spoil))


SCRIPT = """
import resource
from src.common.errors import RunError
from tests.tasks.test_workers import Numbers, loaded, many_tensors
kind, limit = resource.{kind}, {limit}
resource.setrlimit(kind, (limit, limit))
try:
    print(len(loaded(Numbers(size=64, side={side}), {collate}, batch_size=16)), "batches")
except RunError as error:
    print("error:", error)
"""


def many_tensors(items: list[tuple[Tensor, int]]) -> list[dict[str, Tensor]]:
    """As a batch of images of different sizes is: several tensors for each of them."""
    return [{str(part): image + part for part in range(5)} for image, _ in items]


def under_limit(kind: str, limit: int, side: int, collate_items: str = "many_tensors") -> str:
    """What a loader says in a process of its own that may have only so much of something."""
    script = SCRIPT.format(kind=kind, limit=limit, side=side, collate=collate_items)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="limits are those of Linux")
def test_many_tensors_need_few_files() -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 64
    assert under_limit("RLIMIT_NOFILE", 64, 4) == "4 batches\n"


@pytest.mark.skipif(sys.platform != "linux", reason="limits are those of Linux")
@pytest.mark.parametrize("limit", [12, 18, 24])
def test_too_few_files_are_an_error_or_enough(limit: int) -> None:
    said = under_limit("RLIMIT_NOFILE", limit, 4)
    assert said == "4 batches\n" or "ulimit -n" in said


@pytest.mark.skipif(sys.platform != "linux", reason="limits are those of Linux")
def test_too_little_shared_memory_is_an_error() -> None:
    said = under_limit("RLIMIT_FSIZE", 1 << 20, 224)  # a block of shared memory is a file
    assert "the shared memory (/dev/shm) is full" in said
    assert "--shm-size" in said


def test_a_batch_of_the_main_process_is_not_packed() -> None:
    order = EpochOrder(6, False, 0, 0, 1)
    found = list(batches(make_loader(Numbers(), order, 2, 0, False)))
    assert all(isinstance(batch, Batch) and not batch.images.is_shared() for batch in found)
