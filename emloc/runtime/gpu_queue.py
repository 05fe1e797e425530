"""Which job may start on which GPU when jobs share GPUs by memory. No files and no devices here.

Jobs start in the order in which they came. A job waits while an earlier one waits for a GPU that
both of them can use, so that small jobs never overtake a large one for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

# A job that needs more than this share of a GPU has it alone: nothing would fit beside it.
ALONE = 0.8


@dataclass(frozen=True)
class GpuMemory:
    """Name and memory of one GPU."""

    name: str
    total: int  # bytes
    # Bytes that no process uses. To ask for them takes memory of that GPU, so it is done last.
    free: Callable[[], int]


@dataclass(frozen=True)
class Share:
    """The part of a GPU that one job has reserved."""

    index: int  # of the GPU, among those that the job can use
    gpu: str  # name of the GPU
    reserved: int  # bytes
    foreign: int  # bytes of the GPU that programs without a share used when the job started
    jobs: int  # number of jobs on the GPU, with this one


@dataclass(frozen=True)
class Job:
    """A job that waits for a GPU, or that has a share of one."""

    ticket: int  # jobs that came later have larger ones
    gpus: tuple[str, ...]  # names of all GPUs that the job can use
    need: int | None  # bytes that it will take; None: unknown, so it has a GPU alone
    share: Share | None = None  # None: it waits


@dataclass(frozen=True)
class Wait:
    """Why a job cannot start yet."""

    reason: str


def share_for(
    job: Job, gpus: Sequence[GpuMemory], others: Sequence[Job], most: int, last: int = 0
) -> Share | Wait:
    """Return the share of a GPU that a job gets, or why it has to wait.

    The job gets the GPU with the most memory that is not reserved; of equal ones it is the last one
    used. If other programs leave too little on every GPU, and no job runs on any of them, the job
    gets one alone: there is nothing that it could wait for. Those programs may be idle workers of
    a sweep, which keep some memory.

    Args:
        job: the job that asks.
        gpus: the GPUs that it can use.
        others: all other jobs, those that wait and those that run.
        most: number of jobs that a GPU may have.
        last: index of the GPU that was used last.
    """
    claimed = {
        name
        for other in others
        if other.share is None and other.ticket < job.ticket
        for name in other.gpus
    }
    shares = {gpu.name: _shares_on(gpu.name, others) for gpu in gpus}
    indices = sorted(
        (index for index, gpu in enumerate(gpus) if gpu.name not in claimed),
        key=lambda index: (-_unreserved(gpus[index], shares), index != last, index),
    )
    if not indices:
        return Wait("jobs that came earlier wait for one, too")
    waits = []
    for index in indices:
        answer = _share_on(gpus[index], index, job.need, shares[gpus[index].name], most)
        if isinstance(answer, Share):
            return answer
        waits.append(answer)
    if any(shares.values()):
        return waits[0]
    return _share_on(gpus[indices[0]], indices[0], None, [], most)


def jobs_that_fit(gpu: GpuMemory, need: int, most: int) -> int:
    """Return how many jobs of equal need may share a GPU that no job uses yet."""
    jobs: list[Job] = []
    while True:
        job = Job(len(jobs), (gpu.name,), need)
        answer = share_for(job, [gpu], jobs, most)
        if isinstance(answer, Wait):
            return len(jobs)
        jobs.append(replace(job, share=answer))


def _share_on(
    gpu: GpuMemory, index: int, need: int | None, shares: Sequence[Share], most: int
) -> Share | Wait:
    """The share of one GPU that a job gets, or why it gets none there."""
    if len(shares) >= most:
        return Wait(f"{_jobs(len(shares))} on it, as many as this machine has cores for")
    is_alone = need is None or need > ALONE * gpu.total
    size = gpu.total if need is None or is_alone else need
    demand = "takes a whole one" if is_alone else f"takes {_gib(size)}"
    reserved = sum(share.reserved for share in shares)
    state = f"{_jobs(len(shares))} on it with {_gib(reserved)} of {_gib(gpu.total)} reserved"
    if reserved + size > gpu.total:
        return Wait(f"this job {demand}, and {state}")
    foreign = foreign_bytes(gpu.total - gpu.free(), shares)
    if foreign + reserved + size > gpu.total and not is_alone:
        return Wait(f"this job {demand}, other programs use {_gib(foreign)}, and {state}")
    return Share(index, gpu.name, size, foreign, len(shares) + 1)


def foreign_bytes(in_use: int, shares: Sequence[Share]) -> int:
    """Return the bytes of a GPU that programs without a share use.

    Jobs that have just started use less than they have reserved, so the driver's number does not
    say which part of it is theirs. Programs without a share use at least what is beyond all
    reservations, and at most all of it. Between these bounds it is what they used when the jobs
    started.

    Args:
        in_use: bytes that the driver says are in use.
        shares: of the jobs that run on the GPU.
    """
    if not shares:
        return in_use
    beyond = in_use - sum(share.reserved for share in shares)
    return min(in_use, max(beyond, *(share.foreign for share in shares)))


def _shares_on(name: str, jobs: Sequence[Job]) -> list[Share]:
    return [job.share for job in jobs if job.share is not None and job.share.gpu == name]


def _unreserved(gpu: GpuMemory, shares: dict[str, list[Share]]) -> int:
    return gpu.total - sum(share.reserved for share in shares[gpu.name])


def _jobs(count: int) -> str:
    return "1 job runs" if count == 1 else f"{count} jobs run"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
