"""A core that other programs use, too, as on a machine that many share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def shared_core(loops: int) -> Iterator[None]:
    """Let all threads of this process run on one core, beside so many busy loops."""
    core = min(os.sched_getaffinity(0))
    before = {int(task): os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")}
    others: list[subprocess.Popen[bytes]] = []
    try:
        for task in before:
            _pin(task, {core})
        for _ in range(loops):  # which inherit the core
            others.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
        for task, cores in before.items():
            _pin(task, cores)


def _pin(task: int, cores: set[int]) -> None:
    with suppress(ProcessLookupError):  # the thread has ended
        os.sched_setaffinity(task, cores)
