"""Work that stands still ends when it is asked to, and shows its errors to whoever waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch.utils import _python_dispatch

from src.compression.quantize.calibrate.paused import PausedWork, interleaved_modes, torch_state


def begun(work: Callable[[Callable[[int], None]], None]) -> PausedWork[int]:
    one = PausedWork(work)
    assert one.begin()
    return one


def test_it_goes_on_only_while_somebody_waits() -> None:
    done: list[str] = []

    def work(name: str) -> Callable[[Callable[[int], None]], None]:
        def steps(stand: Callable[[int], None]) -> None:
            for number in range(3):
                done.append(f"{name}{number}")
                stand(number)

        return steps

    one, other = begun(work("a")), begun(work("b"))
    assert done == []
    assert [one.go_on(), other.go_on(), one.go_on(), one.go_on()] == [0, 0, 1, 2]
    assert done == ["a0", "b0", "a1", "a2"]
    assert one.go_on() is None
    assert one.has_ended
    assert one.go_on() is None
    other.close()
    assert done == ["a0", "b0", "a1", "a2"]
    assert other.has_ended


def test_an_error_reaches_the_one_who_waits_and_the_thread_is_gone() -> None:
    before = threading.active_count()

    def work(stand: Callable[[int], None]) -> None:
        stand(1)
        raise KeyboardInterrupt("stop")

    one = begun(work)
    assert one.go_on() == 1
    with pytest.raises(KeyboardInterrupt, match="stop"):
        one.go_on()
    one.close()
    assert threading.active_count() == before


def test_what_it_lets_do_is_done_by_the_one_who_waits() -> None:
    caught: list[str] = []

    def fail() -> None:
        raise LookupError("a task's own")

    def work(stand: Callable[[int], None]) -> None:
        try:
            one.let_do(fail)
        except LookupError as error:
            caught.append(str(error))
        stand(int(one.let_do(lambda: threading.current_thread() is threading.main_thread())))
        one.let_do(stop)

    def stop() -> None:
        raise KeyboardInterrupt

    one = begun(work)
    assert one.go_on() == 1
    assert caught == ["a task's own"]
    with pytest.raises(KeyboardInterrupt):  # as where a signal comes while it is done
        one.go_on()
    assert not one.has_ended
    one.close()
    assert one.has_ended


def test_closing_cleans_up_behind_the_work_even_where_it_catches_errors() -> None:
    before, left = threading.active_count(), []

    def work(stand: Callable[[int], None]) -> None:
        try:
            with suppress(Exception):
                stand(0)
            with suppress(Exception):
                stand(1)
        finally:
            left.append("left")

    one = begun(work)
    one.go_on()
    one.close()
    assert left == ["left"]
    never = begun(work)
    never.close()
    PausedWork(work).close()  # nor did this one begin
    assert left == ["left"]
    assert threading.active_count() == before


def test_a_thread_computes_as_the_one_that_it_belongs_to() -> None:
    found: list[tuple[bool, bool, torch.dtype, bool]] = []

    def look() -> None:
        with torch_state_entered():
            found.append(
                (
                    torch.is_grad_enabled(),
                    torch.is_autocast_enabled("cpu"),
                    torch.get_autocast_dtype("cpu"),
                    torch.is_inference_mode_enabled(),
                )
            )

    def in_a_thread() -> None:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        torch_state_entered = torch_state(torch.device("cpu"))
        in_a_thread()
    torch_state_entered = torch_state(torch.device("cpu"))
    in_a_thread()
    with torch.inference_mode():
        torch_state_entered = torch_state(torch.device("cpu"))
        in_a_thread()
    assert found[0] == (False, True, torch.float16, False)
    assert found[1][:2] == (True, False)
    assert found[2][3]


def test_modes_may_be_left_in_another_order_than_they_were_entered() -> None:
    def mode(stand: Callable[[int], None]) -> None:
        with _python_dispatch.TorchDispatchMode():
            stand(0)

    noted = {name: value for name, value in vars(_python_dispatch).items() if isinstance(value, bool)}
    with interleaved_modes():
        one, other = begun(mode), begun(mode)
        assert (one.go_on(), other.go_on()) == (0, 0)
        one.close()
        other.close()
    assert {name: value for name, value in vars(_python_dispatch).items() if isinstance(value, bool)} == noted
