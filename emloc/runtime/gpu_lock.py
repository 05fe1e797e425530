"""Locks that give each job of a machine a GPU of its own, or a share of one.

A device has one slot, or as many as jobs may share it (`budget.jobs_per_gpu`). A job holds the lock
of one slot. The system releases the lock when the process ends, however it ends.
`emloc.runtime.gpu_ledger` shares devices by their memory instead (`budget.jobs_per_gpu=auto`).
"""

from __future__ import annotations

import gc
import logging
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from emloc.runtime.distributed import world_size
from emloc.runtime.kept_memory import KEPT_MEMORY

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5


@contextmanager
def own_slot(slots: int, folder: Path) -> Iterator[None]:
    """Hold a free slot of a GPU, and make that GPU the current one; wait until a slot is free.

    Without CUDA this does nothing. Nor does it for processes that were started together, which
    have a GPU each by their rank.

    Args:
        slots: of each device.
        folder: holds the locks of all devices; it is the same for all jobs of a machine.
    """
    names = visible_gpus()
    if not names:
        yield
        return
    with hold_slot(names, slots, folder, last_gpu()) as index, current_gpu(index):
        yield


def visible_gpus() -> list[str]:
    """Return the UUIDs of the GPUs that a job may choose from, by their index.

    There is none without CUDA, and none for processes that were started together. UUIDs name the
    devices, since their numbers depend on CUDA_VISIBLE_DEVICES.
    """
    import torch

    if world_size() > 1 or not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]


def last_gpu() -> int:
    """Return the index of the GPU that this process used before.

    A worker still holds memory there, so it prefers that device.
    """
    import torch

    return torch.cuda.current_device()


@contextmanager
def current_gpu(index: int) -> Iterator[None]:
    """Make a GPU the current one, and free its memory in the end."""
    import torch

    torch.cuda.set_device(index)
    try:
        yield
    except Exception as error:  # why: its traceback would keep tensors alive until the report
        _drop_variables(error)
        raise
    finally:
        gc.collect()
        torch.cuda.empty_cache()  # the process may live on while another one uses the GPU


@contextmanager
def hold_slot(names: Sequence[str], slots: int, folder: Path, last: int = 0) -> Iterator[int]:
    """Hold a slot of one of the devices and yield its index; wait until a slot is free.

    Args:
        names: of the devices.
        slots: of each device.
        folder: of the locks.
        last: index of the device that this process used before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    slot = _acquire(names, slots, folder, last)
    if slot is None:
        log.info("waiting for a GPU: all %d are taken by other jobs", len(names))
        KEPT_MEMORY.give_back()
    while slot is None:
        time.sleep(POLL_SECONDS)
        slot = _acquire(names, slots, folder, last)
    index, lock = slot
    try:
        yield index
    finally:
        lock.release()


def _drop_variables(error: BaseException | None) -> None:
    """Clear the variables in the tracebacks of the error and of its causes."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def best_device(free: Sequence[int], last: int) -> int | None:
    """Index of the device with the most free slots; None if none is free.

    Of devices with as many free slots it is the last one used, or else the first one.

    Args:
        free: number of free slots of each device.
        last: index of the device that was used last.
    """
    if not any(free):
        return None
    return max(range(len(free)), key=lambda index: (free[index], index == last, -index))


def _acquire(
    names: Sequence[str], slots: int, folder: Path, last: int
) -> tuple[int, FileLock] | None:
    with FileLock(folder / "choice.lock"):  # two jobs at once would hide free slots from each other
        free = [
            [lock for lock in _locks(name, slots, folder) if _is_acquired(lock)] for name in names
        ]
        index = best_device([len(locks) for locks in free], last)
        mine = None if index is None else free[index][0]
        for locks in free:
            for lock in locks:
                if lock is not mine:
                    lock.release()
    return None if index is None or mine is None else (index, mine)


def _locks(name: str, slots: int, folder: Path) -> list[FileLock]:
    return [FileLock(folder / f"{name}-{slot}.lock") for slot in range(slots)]


def _is_acquired(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True
