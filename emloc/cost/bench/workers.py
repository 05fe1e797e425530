"""Worker processes of a benchmark, which train side by side on one GPU."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from emloc.runtime.gpu_ledger import own_share

END_SECONDS = 10  # that a worker may take to end by itself

# Trains so many steps, and returns the peak of device memory in bytes.
Train = Callable[[int], int]


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

    def run(self, steps: int, need: int | None) -> tuple[float, int]:
        """Train in all workers; return seconds until all have ended, and the largest peak.

        Args:
            steps: of each training; 0: only the workers get ready.
            need: bytes of device memory that each one reserves; None: it has the GPU alone.

        Raises:
            RuntimeError: a worker has ended.
        """
        start = time.perf_counter()
        for _, connection in self._processes:
            connection.send((steps, need))
        peaks = [_receive(process, connection) for process, connection in self._processes]
        return time.perf_counter() - start, max(peaks)


def _receive(process: Any, connection: Connection) -> int:
    """The peak that a worker reports at the end of its training."""
    try:
        peak: int = connection.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"a worker ended with exit code {process.exitcode}") from None
    return peak


def serve(connection: Connection, train: Train, folder: Path) -> None:
    """Run the trainings that the connection asks for, until it is closed."""
    while True:
        try:
            steps, need = connection.recv()
        except EOFError:
            return
        with own_share(lambda need=need: need, folder):  # type: ignore[misc]
            peak = train(steps) if steps else 0
        connection.send(peak)


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
