"""Worker processes of a benchmark, which train side by side on one GPU."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import nan
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from emloc.runtime.gpu_ledger import own_share

END_SECONDS = 10  # that a worker may take to end by itself


@dataclass(frozen=True)
class JobFigures:
    """Figures of one training, or the largest of several that ran at the same time."""

    peak: int = 0  # of reserved device memory in bytes
    step: float = nan  # seconds; nan if too few steps were made


# Trains so many steps.
Train = Callable[[int], JobFigures]


@dataclass
class Workers:
    """Processes that train at the same time on the first visible GPU, each with a share of it."""

    train: Train
    folder: Path  # of the ledger of their shares
    environment: Mapping[str, str]  # further variables of their environment
    _processes: list[tuple[Any, Connection]] = field(default_factory=list)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process, connection in self._processes:
            connection.close()  # an idle worker ends by itself
            process.join(END_SECONDS)
            process.terminate()
            process.join()

    def start(self, count: int) -> None:
        """Start further workers."""
        is_on_gpu = torch.cuda.is_available()
        # Libraries may start CUDA when they are imported, and CUDA does not survive a fork.
        context: Any = multiprocessing.get_context("spawn" if is_on_gpu else "forkserver")
        if not is_on_gpu:
            context.set_forkserver_preload(["emloc.cost.bench.jobs"])
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        with changed_environment({**self.environment, "CUDA_VISIBLE_DEVICES": gpu}):
            for _ in range(count):
                ours, theirs = context.Pipe()
                arguments = (theirs, self.train, self.folder)
                process = context.Process(target=serve, args=arguments, daemon=True)
                process.start()
                theirs.close()  # so that the end of the process ends the connection
                self._processes.append((process, ours))

    def run(self, steps: int, need: int | None) -> tuple[float, JobFigures]:
        """Train in all workers; return seconds until all have ended, and the largest figures.

        Args:
            steps: of each training; 0: only the workers get ready.
            need: bytes of device memory that each one reserves; None: it has the GPU alone.

        Raises:
            RuntimeError: a worker has ended.
        """
        start = time.perf_counter()
        for _, connection in self._processes:
            connection.send((steps, need))
        jobs = [_receive(process, connection) for process, connection in self._processes]
        seconds = time.perf_counter() - start
        return seconds, JobFigures(max(job.peak for job in jobs), max(job.step for job in jobs))


def _receive(process: Any, connection: Connection) -> JobFigures:
    """What a worker reports at the end of its training."""
    try:
        figures: JobFigures = connection.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"a worker ended with exit code {process.exitcode}") from None
    return figures


def serve(connection: Connection, train: Train, folder: Path) -> None:
    """Run the trainings that the connection asks for, until it is closed."""
    while True:
        try:
            steps, need = connection.recv()
        except EOFError:
            return
        with own_share(lambda need=need: need, folder):  # type: ignore[misc]
            figures = train(steps) if steps else JobFigures()
        connection.send(figures)


@contextmanager
def changed_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment for processes that are started in the block."""
    former = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(former)
