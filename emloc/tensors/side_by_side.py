"""Run independent pieces of work on a GPU side by side, the largest beside the smallest.

Work on matrices that waits for single figures, such as whether an iteration has converged, leaves
most of a GPU idle: its small steps use few of the GPU's processors, and between two steps the GPU
waits for the host. A second thread with a stream of its own fills these gaps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from threading import Lock
from typing import TypeVar

import torch

from emloc.runtime.memory import free_device_bytes

Key = TypeVar("Key")
Result = TypeVar("Result")

_ALLOWED = ContextVar("side by side", default=True)


@contextmanager
def one_after_another() -> Iterator[None]:
    """Context in which this thread does all work itself, such as to record its operations."""
    token = _ALLOWED.set(False)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def run_side_by_side(
    work: Mapping[Key, Callable[[], Result]],
    sizes: Mapping[Key, int],
    device: torch.device,
    needed_bytes: int,
) -> dict[Key, Result]:
    """Call each function and return the results by key, in the order of `work`.

    On a GPU two functions run at a time, see `in_two_threads`. On a CPU, or if the GPU has too
    little memory, they run one after the other.

    Args:
        work: key -> function, which takes its time on `device`.
        sizes: key -> size of the work; only its order counts.
        device: device of the work.
        needed_bytes: free memory of the GPU from which on two functions may run at a time.

    Raises:
        Exception: the first error of a function; functions that have not begun are not called.
    """
    is_gpu = device.type == "cuda" and _ALLOWED.get()
    if not is_gpu or len(work) < 2 or free_device_bytes(device) < needed_bytes:
        return {key: function() for key, function in work.items()}
    caller, side = torch.cuda.current_stream(device), _side_stream(device)
    # What the caller has launched comes first, and what it launches later waits for both threads.
    # So neither stream uses memory that the other one has not finished with.
    side.wait_stream(caller)
    try:
        return in_two_threads(
            work, sorted(work, key=lambda key: sizes[key]), lambda: torch.cuda.stream(side)
        )
    finally:
        caller.wait_stream(side)


def in_two_threads(
    work: Mapping[Key, Callable[[], Result]],
    order: Sequence[Key],
    beside: Callable[[], AbstractContextManager[object]],
) -> dict[Key, Result]:
    """Call each function and return the results by key, in the order of `work`.

    Args:
        work: key -> function.
        order: the keys. This thread calls the last functions and a second thread the first ones,
            until they meet.
        beside: makes the context of the second thread's calls.

    Raises:
        Exception: the first error of a function; functions that have not begun are not called.
    """
    remaining = deque(order)
    results: dict[Key, Result] = {}
    lock = Lock()

    def run(take: Callable[[], Key]) -> None:
        """Call the functions whose keys `take` removes from `remaining`, until there is none."""
        try:
            while True:
                with lock:
                    if not remaining:
                        return
                    key = take()
                results[key] = work[key]()
        except BaseException:
            with lock:
                remaining.clear()
            raise

    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run_beside() -> None:
        """Call functions in the modes of the first thread, since modes belong to a thread."""
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients), beside():
            run(remaining.popleft)

    with ThreadPoolExecutor(1, "side by side") as thread:
        second = thread.submit(run_beside)
        run(remaining.pop)
    second.result()
    return {key: results[key] for key in work}


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of the second thread: one for a device, as each keeps memory of its own."""
    # The first operation of torch.linalg loads a library, which fails in two threads at a time.
    torch.linalg.inv(torch.ones(1, 1, device=device))
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
