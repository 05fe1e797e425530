"""Measure and limit memory: of the CUDA device if there is one, else of the process."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from pathlib import Path

import psutil
import torch

from emloc.runtime.kept_memory import KEPT_MEMORY

GIB = 2**30
_POLL_SECONDS = 0.02


def limit_device_memory(device: torch.device, gib: float | None) -> None:
    """Limit this process to `gib` GiB of a CUDA device, as on a smaller GPU; None lifts the limit.

    An allocation above the limit raises torch.OutOfMemoryError.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if gib is None else min(1.0, gib * GIB / total)
        torch.cuda.set_per_process_memory_fraction(share, device)


def usable_device_bytes(device: torch.device) -> int:
    """Return the bytes of a CUDA device that this process may take; 0 for a CPU.

    `limit_device_memory` may leave the process less than the device has.
    """
    if device.type != "cuda":
        return 0
    share: float = torch.cuda.get_per_process_memory_fraction(device)
    return int(share * torch.cuda.mem_get_info(device)[1])


def free_device_bytes(device: torch.device) -> int:
    """Return the bytes of a CUDA device that are free for this process; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return min(free, usable_device_bytes(device) - torch.cuda.memory_reserved(device))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or a cause of it, says that device memory ran out."""
    while not isinstance(error, torch.cuda.OutOfMemoryError):
        if error.__cause__ is None:
            return False
        error = error.__cause__
    return True


class HostMemoryPeak:
    """Context manager that polls the process's anonymous memory and keeps the maximum in `bytes`.

    Anonymous memory leaves out the pages of mapped checkpoint files, which the system can drop at
    any time. The resident size would include them.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._poller = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> HostMemoryPeak:
        gc.collect()
        _trim_heap()
        self._poller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._poller.join()
        # Short work may end before the first poll.
        self.bytes = max(self.bytes, process_bytes())

    def _poll(self) -> None:
        """Update the maximum until the block ends; runs in a thread of its own."""
        while not self._stop.is_set():
            self.bytes = max(self.bytes, process_bytes())
            self._stop.wait(_POLL_SECONDS)


class MemoryPeak:
    """Context manager that measures the peak memory of its block, read as `gib` afterwards.

    On CUDA the peak is the most that the caching allocator has reserved, without what the process
    keeps for a later job, unless the block uses that. Without CUDA it is the peak of
    `HostMemoryPeak`.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._kept_bytes, self._changes = 0, 0
        self._host = HostMemoryPeak()

    @property
    def gib(self) -> float:
        """Peak memory in GiB (2^30 bytes)."""
        return round(self.bytes / GIB, 3)

    def __enter__(self) -> MemoryPeak:
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._changes = KEPT_MEMORY.changes
            self._kept_bytes = torch.cuda.memory_reserved() if KEPT_MEMORY.is_kept else 0
        else:
            self._host.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_reserved()
            if KEPT_MEMORY.changes == self._changes:
                self.bytes -= self._kept_bytes
        else:
            self._host.__exit__()
            self.bytes = self._host.bytes


def _trim_heap() -> None:
    """Return freed memory to the system, so that earlier work does not count in this peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has this function
    if trim is not None:
        trim(0)


def process_bytes() -> int:
    """Return the anonymous resident memory of this process in bytes.

    Systems other than Linux do not report anonymous memory; there it is all resident memory.
    """
    status = Path("/proc/self/status")
    match = (
        re.search(r"^RssAnon:\s+(\d+) kB", status.read_text(), re.M) if status.exists() else None
    )
    return int(match[1]) * 1024 if match else int(psutil.Process().memory_info().rss)
