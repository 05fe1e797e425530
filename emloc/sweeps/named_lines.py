"""Console lines of jobs that run side by side and write to one terminal or file."""

from __future__ import annotations

import logging
from multiprocessing import current_process


class NamedFormatter(logging.Formatter):
    """Formatter that puts the name of the run in front of each message without it."""

    def __init__(self, name: str) -> None:
        super().__init__("[%(asctime)s] %(message)s", "%H:%M:%S")
        self._name = name

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback."""
        if not record.message.startswith(self._name):
            record.message = f"{self._name}: {record.message}"
        return super().formatMessage(record)


def name_console_lines(name: str) -> None:
    """Name the run in the console lines of a worker process, which shares its console."""
    if current_process().name != "MainProcess":
        for handler in logging.getLogger().handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setFormatter(NamedFormatter(name))
