"""The log of a run's numbers: each line goes to metrics.jsonl and to the run's tracker."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from emloc.config.run_folder import Run
from emloc.errors import ConfigError
from emloc.report.tracking.trackers import STEP, Line, Nothing, Session, Tracker
from emloc.runtime.atomic import write_text

log = logging.getLogger("emloc")


class Record:
    """Log of one run's numbers, in the order in which they arrive.

    A resumed run keeps the lines of its earlier attempts. Training resumes from the last
    checkpoint, so some steps run twice. A new line removes the old lines of later steps, and its
    numbers replace those of its own step that have the same names. A value that is not finite is
    written as null. Leaving the `with` block closes the tracker with the status of the run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._path = run.folder / "metrics.jsonl"
        self._lines = _read(self._path)
        self._pending = list(self._lines)  # lines that the tracker has not received
        self._session: Session = Nothing()
        self._has_failed = False
        if self._lines:
            self._write()  # drops a line that was cut off when the run was killed

    @property
    def last(self) -> int:
        """The last training step in the log; 0 without any."""
        return max((_step(line) for line in self._lines), default=0)

    def follow(self, tracker: Tracker) -> None:
        """Attach a tracker. It receives all earlier lines before the next line."""
        self._session = tracker.start(self._run.folder, self._run.config, self.last)

    def add(self, line: Mapping[str, float]) -> None:
        """Write one line of numbers and send it to the tracker."""
        new = {name: value if math.isfinite(value) else None for name, value in line.items()}
        same = [old for old in self._lines if STEP in new and old.get(STEP) == new[STEP]]
        whole = {name: value for part in (*same, new) for name, value in part.items()}
        if any(old in self._pending for old in same):
            new = whole
        replaced = [old for old in self._lines if _is_replaced(old, new)]
        if replaced:
            self._lines = [old for old in self._lines if old not in replaced]
            self._pending = [old for old in self._pending if old not in replaced]
            self._write()
        self._lines.append(whole)
        with self._path.open("a") as file:
            file.write(json.dumps(whole) + "\n")
        self._pending.append(new)
        self._send_pending()

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._send_pending()
        self._call_tracker(partial(self._session.close, self._run.status))

    def _send_pending(self) -> None:
        waiting, self._pending = self._pending, []
        for line in waiting:
            if not self._has_failed:
                self._call_tracker(partial(self._session.log, line))

    def _call_tracker(self, action: Callable[[], None]) -> None:
        """Call the tracker. Its first failure is logged and ends the tracking, but not the run."""
        try:
            action()
        except Exception as error:  # why: no failure of a tracker may end a training of days
            if not self._has_failed:
                log.warning(
                    "tracker: %s: %s; this run is no longer tracked", type(error).__name__, error
                )
            self._has_failed = True

    def _write(self) -> None:
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))


def training_line(step: int, values: Mapping[str, float]) -> dict[str, float]:
    """Return a line of the Trainer's log with the names of this log: `train/loss`, `train/step`."""
    renamed = {f"train/{name}": value for name, value in values.items() if name != "step"}
    return renamed | {STEP: step}


def stage_line(stage: str, facts: Mapping[str, Any]) -> dict[str, float]:
    """Return a stage's numbers as `<stage>/<name>`: seconds, peak_gib, and those of its facts."""
    numbers = facts | facts.get("scores", {})
    return {f"{stage}/{k}": v for k, v in numbers.items() if isinstance(v, int | float)}


def _is_replaced(old: Line, new: Line) -> bool:
    """Whether the new line is of the same stage, or of the same training step or an earlier one.

    No line of a stage is replaced by one of a training step.
    """
    if STEP in new or STEP in old:
        return STEP in new and STEP in old and _step(old) >= _step(new)
    return not old.keys().isdisjoint(new)


def _step(line: Line) -> int:
    return int(line.get(STEP) or 0)


def _read(path: Path) -> list[Line]:
    if not path.exists():
        return []
    *whole, _ = path.read_text().split("\n")
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise ConfigError(
            f"{path}: the file is damaged: {error}; delete this file and run the command again"
        ) from error
