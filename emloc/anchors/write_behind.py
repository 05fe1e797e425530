"""Write files in a thread, one after the other, while the pass goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from emloc.calibration.pinned_pieces import PinnedPieces

# Most bytes of tensors that wait in host memory until they are written.
MOST_WAITING = 2**29


@dataclass(frozen=True)
class HostCopy:
    """A copy of a tensor in host memory, which the device may still be writing."""

    tensor: Tensor
    copied: torch.cuda.Event | None  # None: it is complete

    def complete(self) -> Tensor:
        """Return the copy when it is complete."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensor


class WriteBehind:
    """A thread that does the work it gets in order; as a context it ends with all work done.

    The error of a piece of work is raised by the next call, and no later work is done.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "write behind")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._bytes = 0
        self._has_failed = False
        self._pieces: PinnedPieces | None = None

    def copy(self, tensor: Tensor) -> HostCopy:
        """Begin to copy a tensor to host memory, once there is room for it.

        Raises:
            Exception: that of a piece of work.
        """
        self._make_room(tensor.nbytes)
        if tensor.device.type != "cuda":
            return HostCopy(tensor.detach().clone(), None)
        self._pieces = self._pieces or PinnedPieces()
        memory = self._pieces.take(tensor.nbytes)
        copy = memory.view(tensor.dtype).view(tensor.shape)
        copy.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(tensor.device))
        return HostCopy(copy, copied)

    def submit(self, work: Callable[[], None], nbytes: int = 0) -> None:
        """Do some work behind all that was submitted before; `nbytes` are in memory until then."""
        self._make_room(nbytes)
        self._waiting.append((self._thread.submit(self._do, work), nbytes))
        self._bytes += nbytes

    def wait(self) -> None:
        """Return when all work is done.

        Raises:
            Exception: that of a piece of work.
        """
        while self._waiting:
            self._end_first()

    def _do(self, work: Callable[[], None]) -> None:
        """Do some work in the thread, unless earlier work has failed."""
        if self._has_failed:
            return
        try:
            work()
        except BaseException:  # why: whatever failed, later work may build on it
            self._has_failed = True
            raise

    def _make_room(self, nbytes: int) -> None:
        """Wait until some further bytes fit beside those that wait, or nothing waits any more."""
        while self._waiting and (self._bytes + nbytes > MOST_WAITING or self._waiting[0][0].done()):
            self._end_first()

    def _end_first(self) -> None:
        """Wait for the first piece of work; after an error, forget the others."""
        done, nbytes = self._waiting.popleft()
        self._bytes -= nbytes
        try:
            done.result()
        except BaseException:  # why: whatever failed, the thread takes no further work
            self._thread.shutdown()
            self._waiting.clear()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Wait for all work; an error of the body is raised before one of the work."""
        try:
            self.wait()
        except Exception:  # why: the body's own error, which came first, is not replaced
            if kind is None:
                raise
        finally:
            self._thread.shutdown()
            if self._pieces is not None:
                self._pieces.close()
