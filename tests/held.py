"""Processes that hold something until their input is closed, or until they are killed."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Start = Callable[[int], subprocess.Popen]


@contextmanager
def started_holders(program: str, folder: Path) -> Iterator[Start]:
    """Yield a function that starts a program with a folder and a number; all are killed at the end.

    The program writes a line when it holds what it wants, and reads its input to the end.
    """
    started = []

    def start(number: int) -> subprocess.Popen:
        arguments = [sys.executable, "-c", program, str(folder), str(number)]
        process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
