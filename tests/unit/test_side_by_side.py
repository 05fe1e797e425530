"""Two threads share independent work; errors stop both, and modes and order are the caller's."""

from contextlib import nullcontext
from threading import Barrier, current_thread

import pytest
import torch

from emloc.tensors.side_by_side import in_two_threads, run_side_by_side

CPU = torch.device("cpu")


def test_two_threads_do_all_work_and_the_order_of_results_is_that_of_the_work():
    meet = Barrier(2, timeout=30)  # only two threads at a time get beyond it
    work = {name: lambda name=name: (meet.wait(), name)[1] for name in "dcba"}
    results = in_two_threads(work, "abcd", nullcontext)
    assert list(results.items()) == [(name, name) for name in "dcba"]


def test_the_first_thread_begins_with_the_last_of_the_order():
    meet = Barrier(2, timeout=30)
    work = {name: lambda: (meet.wait(), current_thread())[1] for name in ("small", "large")}
    results = in_two_threads(work, ["small", "large"], nullcontext)
    assert results["large"] is current_thread()
    assert results["small"] is not current_thread()


@pytest.mark.parametrize("failing", ["small", "large"])
def test_an_error_of_either_thread_is_raised(failing):
    meet = Barrier(2, timeout=30)

    def fail_or_pass(name):
        meet.wait()
        if name == failing:
            raise ValueError(name)

    work = {name: lambda name=name: fail_or_pass(name) for name in ("small", "large")}
    with pytest.raises(ValueError, match=failing):
        in_two_threads(work, ["small", "large"], nullcontext)


def test_behind_an_error_no_further_function_is_called():
    meet, called = Barrier(2, timeout=30), []

    def fail():
        meet.wait()
        raise ValueError

    work = {"small": fail, "medium": lambda: called.append("medium"), "large": fail}
    with pytest.raises(ValueError, match=r"^$"):
        in_two_threads(work, ["small", "medium", "large"], nullcontext)
    assert called == []


def test_the_second_thread_has_the_modes_of_the_first_and_the_context_that_it_is_given():
    meet, entered = Barrier(2, timeout=30), []

    def modes():
        meet.wait()
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def beside():
        entered.append(current_thread())
        return nullcontext()

    with torch.no_grad():
        results = in_two_threads({"a": modes, "b": modes}, "ab", beside)
    assert results == {"a": (False, False), "b": (False, False)}
    assert [thread is current_thread() for thread in entered] == [False]


def test_on_a_cpu_this_thread_does_all_work_in_its_order():
    called = []
    work = {name: lambda name=name: called.append((name, current_thread())) for name in "ba"}
    run_side_by_side(work, {"a": 1, "b": 2}, CPU, needed_bytes=0)
    assert called == [("b", current_thread()), ("a", current_thread())]
