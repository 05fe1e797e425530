"""Every number of a run, written once: to metrics.jsonl, and the same line to its tracker."""

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
from emloc.report.tracking.trackers import STEP, Line, Nothing, Session, Tracker
from emloc.runtime.atomic import write_text

log = logging.getLogger("emloc")


class Record:
    """What a run logs, in the order it came. A `with` block of it ends as the run ended.

    An attempt that goes on from an interrupted one keeps its lines. A training goes on from its
    last checkpoint, so that some steps come again: a line takes the place of those which say the
    same, so no step is there twice. A value that is not finite is written as null.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._path = run.folder / "metrics.jsonl"
        self._lines = _read(self._path)
        self._waiting = list(self._lines)  # what the tracker has not been told
        self._session: Session = Nothing()
        self._lost = False
        if self._lines:
            self._write()  # without a line that was cut off when the run was killed

    @property
    def last(self) -> int:
        """The last step of the training that is recorded; 0 if none is."""
        return max((_step(line) for line in self._lines), default=0)

    def follow(self, tracker: Tracker) -> None:
        """From now on the tracker hears of every line, of earlier attempts' before the next."""
        self._session = tracker.start(self._run.folder, self._run.config, self.last)

    def add(self, line: Mapping[str, float]) -> None:
        """Write one line of numbers, and hand it on."""
        new = {name: value if math.isfinite(value) else None for name, value in line.items()}
        again = [old for old in self._lines if _again(old, new)]
        if again:
            self._lines = [old for old in self._lines if old not in again]
            self._waiting = [old for old in self._waiting if old not in again]
            self._write()
        self._lines.append(new)
        with self._path.open("a") as file:
            file.write(json.dumps(new) + "\n")
        self._waiting.append(new)
        self._hand_on()

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hand_on()
        self._tell(partial(self._session.close, self._run.status))

    def _hand_on(self) -> None:
        waiting, self._waiting = self._waiting, []
        for line in waiting:
            if not self._lost:
                self._tell(partial(self._session.log, line))

    def _tell(self, action: Callable[[], None]) -> None:
        """A tracker mirrors a run; what fails there is said and costs the run nothing."""
        try:
            action()
        except Exception as error:  # why: whatever it was, a training of days must not end of it
            if not self._lost:
                log.warning(
                    "tracker: %s: %s; the run goes on without it", type(error).__name__, error
                )
            self._lost = True

    def _write(self) -> None:
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))


def training_line(step: int, values: Mapping[str, float]) -> dict[str, float]:
    """A line of the training's log as it is recorded: `train/loss` ... and `train/step`."""
    named = {f"train/{name}": value for name, value in values.items() if name != "step"}
    return named | {STEP: step}


def stage_line(stage: str, facts: Mapping[str, Any]) -> dict[str, float]:
    """A stage's numbers as `<stage>/<name>`: seconds, peak_gib, and what it says of its work."""
    numbers = facts | facts.get("scores", {})
    return {f"{stage}/{k}": v for k, v in numbers.items() if isinstance(v, int | float)}


def _again(old: Line, new: Line) -> bool:
    """Whether the new line says what the old one did: of this step or one before, or of a stage."""
    if STEP in new or STEP in old:
        return STEP in new and _step(old) >= _step(new)
    return not old.keys().isdisjoint(new)


def _step(line: Line) -> int:
    return int(line.get(STEP) or 0)


def _read(path: Path) -> list[Line]:
    if not path.exists():
        return []
    *whole, _ = path.read_text().split("\n")
    return [json.loads(line) for line in whole]
