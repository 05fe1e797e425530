"""Progress of a sweep: which jobs were started and ended, and how long the others will take.

Each process writes one file for each of its jobs, so that no process waits for another one and a
shared file system is enough.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from omegaconf import DictConfig

from emloc.config.run_folder import DONE
from emloc.runtime.atomic import write_json
from emloc.runtime.progress import duration


@dataclass(frozen=True)
class JobKind:
    """Settings of a job that decide how long it takes."""

    method: str
    emulator: str
    adapter: str  # of zero_shot it is none, and nothing is trained
    model: str
    task: str
    size: str  # of the emulator: ratio and bits
    extra: str  # anchor and polish, with which the original is run besides
    samples: int  # that the training reads

    @classmethod
    def of(cls, config: DictConfig) -> JobKind:
        """The kind of the job with this configuration."""
        compression, train = config.compression, config.train
        return cls(
            method=config.method,
            emulator=config.emulator._target_,
            adapter=config.adapter._target_,
            model=config.model.name,
            task=config.task.name,
            extra=f"{config.anchor._target_} {config.polish._target_}",
            size=f"{compression.ratio} of {compression.of} at {compression.bits} bits",
            samples=train.steps * train.batch * train.accumulate,
        )


# From the closest likeness to the most distant one: jobs for which a key is equal take about as
# long as each other.
LIKENESSES: Sequence[Callable[[JobKind], Hashable]] = (
    lambda kind: kind,
    lambda kind: (kind.method, kind.extra, kind.model, kind.task),
    lambda kind: (kind.method, kind.extra, kind.model),
    lambda kind: (kind.method, kind.extra),
    lambda kind: (kind.emulator, kind.adapter, kind.extra, kind.model, kind.size),
)


@dataclass(frozen=True)
class JobProgress:
    """One job in the hands of one process; times in seconds since 1970."""

    number: int  # of the job in its launch, from 0
    name: str  # of the run folder
    kind: JobKind
    start: float
    was_done: bool  # by an earlier launch, so that this one skips it
    end: float | None = None
    state: str = ""  # as in status.json; empty until the job ends

    def seconds(self, now: float) -> float:
        """Seconds that the job took, or has taken so far."""
        return (now if self.end is None else self.end) - self.start


@dataclass(frozen=True)
class SweepProgress:
    """The jobs of one launch, a file each in `folder`."""

    folder: Path

    def start(self, number: int, name: str, kind: JobKind, was_done: bool) -> None:
        """Record that job `number` of the launch has started."""
        self._write(JobProgress(number, name, kind, time.time(), was_done))

    def end(self, number: int, name: str, kind: JobKind, state: str) -> None:
        """Record that the job has ended. A job that was killed may never have started."""
        path = self._path(number, name)
        now = time.time()
        job = _read(path) if path.exists() else JobProgress(number, name, kind, now, False)
        self._write(replace(job, end=now, state=state))

    def jobs(self) -> list[JobProgress]:
        """All jobs that have started, without those of killed processes that started again."""
        every = sorted((_read(path) for path in self.folder.glob("*.json")), key=lambda j: j.start)
        newest = {job.name: job for job in every}
        return [job for job in every if job.end or newest[job.name] is job]

    def _path(self, number: int, name: str) -> Path:
        return self.folder / f"{name}-{number}.json"

    def _write(self, job: JobProgress) -> None:
        write_json(self._path(job.number, job.name), asdict(job))


def _read(path: Path) -> JobProgress:
    values = json.loads(path.read_text())
    return JobProgress(**values | {"kind": JobKind(**values["kind"])})


@dataclass(frozen=True)
class Estimate:
    """Time that the rest of a sweep will take."""

    seconds: float
    untimed_methods: int  # methods of which no job is finished yet


def sweep_line(
    jobs: Sequence[JobProgress],
    total: int | None,
    now: float,
    waiting: Sequence[JobKind | None] = (),
) -> str:
    """The line `3 of 12 jobs done, 1 failed, about 14 min left`.

    Args:
        jobs: all that have started.
        total: jobs of the sweep; None where its sweeper does not say so.
        now: seconds since 1970.
        waiting: kinds of the jobs to come, see `estimate`.
    """
    ended = [job for job in jobs if job.end is not None]
    failed = sum(job.state != DONE for job in ended)
    words = [f"{len(ended) - failed} of {total} jobs done" if total else f"{len(ended)} ended"]
    if failed:
        words.append(f"{failed} failed")
    rest = estimate(jobs, waiting, now) if total else None
    if rest is not None:
        count = rest.untimed_methods
        words.append(f"{'roughly' if count else 'about'} {duration(rest.seconds)} left")
        if count:
            words.append(f"{count} method{'s' if count > 1 else ''} not yet timed")
    return ", ".join(words)


def estimate(
    jobs: Sequence[JobProgress], waiting: Sequence[JobKind | None], now: float
) -> Estimate | None:
    """Predict each job that runs or waits by the mean of the finished jobs most like it.

    A job that no finished job is like takes the mean over kinds of finished jobs. As many jobs run
    side by side as did so far, and the longest one sets a lower limit.

    Args:
        jobs: all that have started.
        waiting: kinds of the jobs that have not; those that will be skipped are not among them.
            None is a job of which only its existence is known.
        now: seconds since 1970.

    Returns:
        None where nothing can be said: no job is finished, or all jobs that run have taken longer
        than predicted and none waits.
    """
    worked = [job for job in jobs if not job.was_done]
    finished = [job for job in worked if job.state == DONE]
    running = [job for job in worked if job.end is None]
    if not finished:
        return None
    rest = [max(_predict(job.kind, finished, now) - job.seconds(now), 0.0) for job in running]
    rest += [_predict(kind, finished, now) for kind in waiting]
    if not sum(rest):
        return None
    kinds = [*(job.kind for job in running), *(kind for kind in waiting if kind is not None)]
    untimed = {kind.method for kind in kinds if not _alike(kind, finished)}
    side_by_side = min(_side_by_side(worked, now), len(rest))
    return Estimate(max(sum(rest) / side_by_side, max(rest)), len(untimed))


def _predict(kind: JobKind | None, finished: Sequence[JobProgress], now: float) -> float:
    """Seconds of a job of this kind."""
    alike = _alike(kind, finished) if kind is not None else []
    if alike:
        return mean(job.seconds(now) for job in alike)
    kinds = {job.kind for job in finished}
    return mean(mean(job.seconds(now) for job in finished if job.kind == one) for one in kinds)


def _alike(kind: JobKind, finished: Sequence[JobProgress]) -> list[JobProgress]:
    """The finished jobs with the closest likeness to the kind; empty where there is none."""
    for likeness in LIKENESSES:
        if alike := [job for job in finished if likeness(job.kind) == likeness(kind)]:
            return alike
    return []


def _side_by_side(jobs: Sequence[JobProgress], now: float) -> int:
    """The largest number of jobs that ran at one time."""
    return max(
        sum(other.start <= job.start < other.start + other.seconds(now) for other in jobs)
        for job in jobs
    )
