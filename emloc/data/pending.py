"""Batches whose images threads still prepare, while the device computes the batch before."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

# More threads than this would wait for each other, since some steps of an image hold Python's lock.
_MOST_THREADS = 8


Change = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class PendingBatch(MutableMapping[str, Any]):
    """A batch with some tensors that are ready, and some that threads still compute.

    A look-up of a pending tensor waits for the threads, and so does a loop over all names. Each
    forward pass of a step begins when its own images are there, since the Trainer needs only the
    labels before.
    """

    def __init__(
        self,
        ready: Mapping[str, Any],
        finish: Callable[[], Mapping[str, Tensor]] | None = None,
        pending_names: Collection[str] = (),
        device: torch.device | None = None,
    ) -> None:
        """Make a batch.

        Args:
            ready: name -> tensor, or another value.
            finish: waits for the threads and returns the other tensors; None: there are none.
            pending_names: names that the other tensors may have. Any further name counts as missing
                until somebody waits for the threads.
            device: of the other tensors; None: where the threads compute them.
        """
        self._ready, self._finish = dict(ready), finish
        self._pending_names, self._device = pending_names, device

    def to(self, device: torch.device, non_blocking: bool = False) -> PendingBatch:
        """Return the batch on a device; the pending tensors move there when they are ready."""
        ready = {
            name: value.to(device, non_blocking=non_blocking)
            if isinstance(value, Tensor)
            else value
            for name, value in self._ready.items()
        }
        return PendingBatch(ready, self._finish, self._pending_names, device)

    def pin_memory(self) -> PendingBatch:
        """Return the batch with its ready tensors in pinned memory."""
        ready = {
            name: value.pin_memory() if isinstance(value, Tensor) else value
            for name, value in self._ready.items()
        }
        return PendingBatch(ready, self._finish, self._pending_names, self._device)

    def changed(self, change: Change) -> PendingBatch:
        """Return the batch with its tensors changed, now or when they are ready.

        `change` returns some tensors in another form. It may leave some out.
        """
        finish = self._finish
        later = None if finish is None else lambda: change(finish())
        return PendingBatch(change(self._ready), later, self._pending_names, self._device)

    def __or__(self, other: Mapping[str, Any]) -> PendingBatch:
        """Return the batch with more values, which are ready."""
        ready = {**self._ready, **other}
        return PendingBatch(ready, self._finish, self._pending_names, self._device)

    def __getitem__(self, name: str) -> Any:
        if name not in self._ready and name in self._pending_names:
            self._wait()
        return self._ready[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._ready[name] = value

    def __delitem__(self, name: str) -> None:
        self._wait()
        del self._ready[name]

    def __iter__(self) -> Iterator[str]:
        self._wait()
        return iter(self._ready)

    def __len__(self) -> int:
        self._wait()
        return len(self._ready)

    def _wait(self) -> None:
        """Wait for the pending tensors, and add them to those that are ready."""
        finish, self._finish = self._finish, None
        if finish is None:
            return
        for name, tensor in finish().items():
            if self._device is not None:
                tensor = tensor.to(self._device, non_blocking=True)
            self._ready.setdefault(name, tensor)


def changed_batch(batch: Any, change: Change) -> Any:
    """Return a batch with its tensors changed, without a wait for those that are pending."""
    return batch.changed(change) if isinstance(batch, PendingBatch) else change(batch)


def image_threads() -> ThreadPoolExecutor:
    """Return the threads that prepare images: one for each core but that of the main thread."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return _threads(os.getpid(), "images", min(max((cores or 1) - 1, 1), _MOST_THREADS))


def processor_thread() -> ThreadPoolExecutor:
    """Return a thread for work that several threads must not do at once."""
    return _threads(os.getpid(), "processor", 1)


@cache
def _threads(process: int, name: str, count: int) -> ThreadPoolExecutor:
    """Return the threads of a process; a forked process does not inherit those of its parent."""
    return ThreadPoolExecutor(count, thread_name_prefix=name)


def pin(tensor: Tensor) -> Tensor:
    """Return a tensor in pinned memory if this process uses a GPU, so that its copy does not wait.

    On a machine whose GPU this process does not use, the tensor stays as it is.
    """
    uses_gpu: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return tensor.pin_memory() if uses_gpu else tensor
