"""Peak memory of a piece of work: of the device where there is one, else of the process."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from pathlib import Path

import psutil
import torch

GIB = 2**30
_POLL_SECONDS = 0.02


def stay_within(device: torch.device, gib: float | None) -> None:
    """Make the device refuse what is beyond `gib`, as a smaller one would; None: it has all."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = 1.0 if gib is None else min(1.0, gib * GIB / total)
        torch.cuda.set_per_process_memory_fraction(share, device)


class HostMemoryPeak:
    """Context in which `bytes` follows the highest anonymous memory of the process, polled.

    Pages of mapped checkpoint files would count in the resident size although the system can drop
    them at any time.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._poller = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> HostMemoryPeak:
        gc.collect()
        _give_back()
        self._poller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._poller.join()
        # Short work may be over before the first look.
        self.bytes = max(self.bytes, process_bytes())

    def _poll(self) -> None:
        while not self._stop.is_set():
            self.bytes = max(self.bytes, process_bytes())
            self._stop.wait(_POLL_SECONDS)


class MemoryPeak:
    """Context in which `gib` follows the highest memory in use.

    On CUDA it is what the caching allocator reserved at most, on a CPU `HostPeak`.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._host = HostMemoryPeak()

    @property
    def gib(self) -> float:
        """The peak, in 2^30 bytes."""
        return round(self.bytes / GIB, 3)

    def __enter__(self) -> MemoryPeak:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._host.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_reserved()
        else:
            self._host.__exit__()
            self.bytes = self._host.bytes


def _give_back() -> None:
    """Return what earlier work has freed to the system, or it would count as this work's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)


def process_bytes() -> int:
    """Anonymous resident memory of this process; all resident memory where the system has no word
    for the difference.
    """
    status = Path("/proc/self/status")
    found = (
        re.search(r"^RssAnon:\s+(\d+) kB", status.read_text(), re.M) if status.exists() else None
    )
    return int(found[1]) * 1024 if found else int(psutil.Process().memory_info().rss)
