"""Ledger of the jobs that share the GPUs of a machine by memory (`budget.jobs_per_gpu=auto`).

Each job has a file with its reservation, and a lock beside that file. The system releases the lock
when the process ends, however it ends. A file whose lock is free belongs to no job any more and is
deleted by the next job that reads the ledger.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock, Timeout

from emloc.runtime.gpu_lock import POLL_SECONDS, current_gpu, last_gpu, visible_gpus
from emloc.runtime.gpu_queue import GpuMemory, Job, Share, share_for
from emloc.runtime.kept_memory import KEPT_MEMORY

log = logging.getLogger(__name__)

# Where the control program of NVIDIA's Multi-Process Service (MPS) listens, unless it is set.
MPS_FOLDER = "/tmp/nvidia-mps"


@contextmanager
def own_share(need: Callable[[], int | None], folder: Path) -> Iterator[Share | None]:
    """Reserve memory of a GPU, and make that GPU the current one; wait until there is enough.

    Without CUDA this does nothing and yields None. Nor does it for processes that were started
    together, which have a GPU each by their rank. Jobs with a fixed number of jobs for each GPU
    (`emloc.runtime.gpu_lock`) are no part of the ledger: they count as other programs.

    Args:
        need: returns the bytes that the job will take; None: unknown, so it has a GPU alone.
        folder: holds the ledger; it is the same for all jobs of a machine.
    """
    names = visible_gpus()
    if not names:
        yield None
        return
    gpus = [gpu_memory(name, index) for index, name in enumerate(names)]
    with hold_share(gpus, need(), most_jobs(len(gpus)), folder, last_gpu()) as share:
        if share.jobs > 1 and not is_mps_running():
            log.info(
                "%d jobs share this GPU and take turns on it; NVIDIA's Multi-Process Service lets "
                "them run at the same time: run `nvidia-cuda-mps-control -d` before the jobs",
                share.jobs,
            )
        with current_gpu(share.index):
            yield share


@contextmanager
def hold_share(
    gpus: Sequence[GpuMemory], need: int | None, most: int, folder: Path, last: int = 0
) -> Iterator[Share]:
    """Hold a share of one of the GPUs and yield it; wait until a GPU has enough memory.

    Args:
        gpus: the GPUs that this job can use.
        need: bytes that it will take; None: unknown, so it has a GPU alone.
        most: number of jobs that a GPU may have.
        folder: of the ledger.
        last: index of the GPU that this process used before.
    """
    ledger = folder / "jobs"
    ledger.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder):
        job = Job(_next_ticket(ledger), tuple(gpu.name for gpu in gpus), need)
        lock = FileLock(_lock_file(ledger, job.ticket))
        lock.acquire()
        _write(ledger, job)
    try:
        yield _wait_for_share(job, gpus, most, folder, last)
    finally:
        with _exclusive(folder):
            _job_file(ledger, job.ticket).unlink(missing_ok=True)
            lock.release()
            _lock_file(ledger, job.ticket).unlink(missing_ok=True)


def _wait_for_share(
    job: Job, gpus: Sequence[GpuMemory], most: int, folder: Path, last: int
) -> Share:
    """The share that the job gets, as soon as it gets one; the ledger has it, too."""
    ledger, has_waited = folder / "jobs", False
    while True:
        with _exclusive(folder):
            answer = share_for(job, gpus, _jobs_beside(ledger, job.ticket), most, last)
            if isinstance(answer, Share):
                _write(ledger, replace(job, share=answer))
                return answer
        if not has_waited:
            log.info("waiting for a GPU: %s", answer.reason)
            KEPT_MEMORY.give_back()
        has_waited = True
        time.sleep(POLL_SECONDS)


def most_jobs(gpus: int) -> int:
    """Return how many jobs a GPU may have: each job keeps about one core of the machine busy."""
    return max(1, len(os.sched_getaffinity(0)) // gpus)


def is_mps_running() -> bool:
    """Return whether the control program of MPS listens, which CUDA itself looks up in this way."""
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", MPS_FOLDER)
    return (Path(folder) / "control").exists()


def gpu_memory(name: str, index: int) -> GpuMemory:
    """Return name and memory of a GPU."""
    import torch

    total = torch.cuda.get_device_properties(index).total_memory
    return GpuMemory(name, total, lambda: torch.cuda.mem_get_info(index)[0])


def _exclusive(folder: Path) -> FileLock:
    """The lock of the whole ledger."""
    return FileLock(folder / "choice.lock")


def _next_ticket(ledger: Path) -> int:
    return 1 + max((int(path.stem) for path in ledger.glob("*.lock")), default=0)


def _jobs_beside(ledger: Path, ticket: int) -> list[Job]:
    """All other jobs whose processes live; the files of the others are deleted."""
    tickets = sorted(int(path.stem) for path in ledger.glob("*.lock"))
    return [
        _read(ledger, other)
        for other in tickets
        if other != ticket and not _is_cleared(ledger, other)
    ]


def _is_cleared(ledger: Path, ticket: int) -> bool:
    """Delete the files of a job whose process has ended; return whether it has."""
    lock = FileLock(_lock_file(ledger, ticket))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    _job_file(ledger, ticket).unlink(missing_ok=True)
    lock.release()
    _lock_file(ledger, ticket).unlink(missing_ok=True)
    return True


def _write(ledger: Path, job: Job) -> None:
    _job_file(ledger, job.ticket).write_text(json.dumps(asdict(job)))


def _read(ledger: Path, ticket: int) -> Job:
    values = json.loads(_job_file(ledger, ticket).read_text())
    share = Share(**values["share"]) if values["share"] else None
    return Job(values["ticket"], tuple(values["gpus"]), values["need"], share)


def _job_file(ledger: Path, ticket: int) -> Path:
    return ledger / f"{ticket}.json"


def _lock_file(ledger: Path, ticket: int) -> Path:
    return ledger / f"{ticket}.lock"
