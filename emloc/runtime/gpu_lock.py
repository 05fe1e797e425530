"""One GPU for each job of a machine: whoever works on one holds a lock of it.

A lock ends with the process that holds it, however that ends. What is held is a slot: a device has
one, or as many as jobs may share it (`budget.jobs_per_gpu`).
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

log = logging.getLogger(__name__)

# Seconds between two looks for a free slot.
LOOK = 0.5


@contextmanager
def own_slot(slots: int, folder: Path) -> Iterator[None]:
    """Work on a GPU with a slot that no other job holds, made the current one; wait for it.

    Without CUDA there is nothing to hold, and processes started together have theirs by rank.
    `folder` has the locks of all devices, and is the same for all jobs of a machine.
    """
    import torch

    if world_size() > 1 or not torch.cuda.is_available():
        yield
        return
    # By what a device is called everywhere: its number depends on CUDA_VISIBLE_DEVICES.
    names = [
        str(torch.cuda.get_device_properties(index).uuid)
        for index in range(torch.cuda.device_count())
    ]
    # A worker that had one before has memory of it still, which another would have as well.
    with held(names, slots, folder, torch.cuda.current_device()) as index:
        torch.cuda.set_device(index)
        try:
            yield
        except Exception as error:  # why: what failed would keep its tensors until it is reported
            _forget(error)
            raise
        finally:
            gc.collect()
            torch.cuda.empty_cache()  # the process may live on, and the next job is another's


@contextmanager
def held(names: Sequence[str], slots: int, folder: Path, last: int = 0) -> Iterator[int]:
    """Hold a slot of one of the devices, and give its index; wait until there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = _take(names, slots, folder, last)
    if taken is None:
        log.info("waiting for a GPU: all %d are taken by other jobs", len(names))
    while taken is None:
        time.sleep(LOOK)
        taken = _take(names, slots, folder, last)
    index, lock = taken
    try:
        yield index
    finally:
        lock.release()


def _forget(error: BaseException | None) -> None:
    """Drop the variables of the functions that it and what caused it came through."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def chosen(free: Sequence[int], last: int) -> int | None:
    """The device with the most free slots, of equals the one used last; None if none is free.

    `free`: how many slots each device has left.
    """
    if not any(free):
        return None
    return max(range(len(free)), key=lambda index: (free[index], index == last, -index))


def _take(names: Sequence[str], slots: int, folder: Path, last: int) -> tuple[int, FileLock] | None:
    with FileLock(folder / "choice.lock"):  # or two could look at once, and miss what is free
        free = [[lock for lock in _slots(name, slots, folder) if _got(lock)] for name in names]
        index = chosen([len(locks) for locks in free], last)
        mine = None if index is None else free[index][0]
        for locks in free:
            for lock in locks:
                if lock is not mine:
                    lock.release()
    return None if index is None or mine is None else (index, mine)


def _slots(name: str, slots: int, folder: Path) -> list[FileLock]:
    return [FileLock(folder / f"{name}-{slot}.lock") for slot in range(slots)]


def _got(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True
