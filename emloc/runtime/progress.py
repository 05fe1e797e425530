"""Progress of a long stage: a bar on a terminal, and a line in the log every 30 seconds."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from threading import Event, Lock, Thread
from typing import Self, TypeVar

from tqdm import tqdm

from emloc.runtime.distributed import is_first

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0
POLL_SECONDS = 5.0  # between two looks at a unit that takes long

Clock = Callable[[], float]  # seconds, from an arbitrary start
Item = TypeVar("Item")


class BesideBarFilter(logging.Filter):
    """Filter of the console's log handler: it drops lines that repeat what a bar shows."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the console prints the record."""
        return not getattr(record, "beside_bar", False)


class StageProgress:
    """Progress of one stage, counted in units such as steps, blocks or rows.

    The first of several processes draws a bar on a terminal. Every 30 seconds it also logs a line
    such as `train: step 40 of 400, loss 1.234, 0.52 s a step, 3 min left`. Where a bar is drawn,
    `BesideBarFilter` keeps that line off the console, and the log file alone has it.

    Close it when the stage has ended or failed, or it goes on to log the unit that was begun.
    """

    def __init__(
        self, stage: str, total: int, unit: str, *, done: int = 0, clock: Clock = time.monotonic
    ) -> None:
        """Start at unit `done` of `total`, which is above 0 where a stage is resumed."""
        self._stage, self._total, self._unit, self._clock = stage, total, unit, clock
        self._done = done
        self._values: dict[str, float] = {}
        self._line_time = self._unit_time = clock()  # of the last line and of the last unit's end
        self._speed_time, self._speed_done = self._unit_time, done  # when the speed was measured
        self._unit_seconds: float | None = None  # the speed: a unit takes so long
        self._is_silent = not (is_first() and total)
        self._bar = tqdm(desc=stage, total=total, initial=done, unit=unit, disable=self._is_silent)
        self._lock, self._is_closed = Lock(), Event()
        if not self._is_silent:
            watched = (weakref.ref(self), self._is_closed)
            Thread(target=_watch, args=watched, daemon=True).start()

    def update(self, count: int = 1) -> None:
        """Count units that are finished, and log a line if it is due."""
        with self._lock:
            self._done += count
            self._unit_time = self._clock()
            self._bar.update(count)
        self.log_if_due()

    def log_if_due(self) -> None:
        """Log a line if the last one is 30 seconds old."""
        if self._is_silent:
            return
        with self._lock:
            now = self._clock()
            if now - self._line_time >= SECONDS_BETWEEN_LINES and not self._is_closed.is_set():
                log.info("%s", self._line(now), extra={"beside_bar": not self._bar.disable})
                self._line_time = now

    def show(self, **values: float) -> None:
        """Show these values, such as `loss`, from now on."""
        self._values |= values
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in self._values.items()})

    def close(self) -> None:
        """Take the bar off the terminal, and log no more lines."""
        self._is_closed.set()
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, now: float) -> str:
        """The line: with the speed, or with the time of the only unit since the last line."""
        words = [
            f"{self._unit} {self._done} of {self._total}",
            *(f"{name} {value:.3f}" for name, value in self._values.items()),
        ]
        if self._done > self._speed_done:
            seconds = self._measured_speed()
            words.append(f"{_seconds(seconds)} s a {self._unit}")
            if self._done < self._total:
                words.append(f"{duration(seconds * (self._total - self._done))} left")
        else:
            spent = duration(now - self._unit_time)
            words.append(f"{self._unit} {self._done + 1} has taken {spent} so far")
        return f"{self._stage}: {', '.join(words)}"

    def _measured_speed(self) -> float:
        """Seconds of a unit: half by the units since the last measurement, half by that one.

        Units of one stage differ, and a resumed stage skips its first ones.
        """
        latest = (self._unit_time - self._speed_time) / (self._done - self._speed_done)
        before = latest if self._unit_seconds is None else self._unit_seconds
        self._unit_seconds = (before + latest) / 2
        self._speed_time, self._speed_done = self._unit_time, self._done
        return self._unit_seconds


def _watch(progress: weakref.ref[StageProgress], is_closed: Event) -> None:
    """Log lines of a stage also while one of its units takes long; runs in a thread."""
    while not is_closed.wait(POLL_SECONDS):
        stage = progress()
        if stage is None:
            return
        stage.log_if_due()
        del stage  # or this thread would keep it


def tracked(
    items: Iterable[Item], stage: str, total: int, unit: str, *, clock: Clock = time.monotonic
) -> Iterator[Item]:
    """Yield the `total` items, and show the progress of the loop over them."""
    with StageProgress(stage, total, unit, clock=clock) as progress:
        for item in items:
            yield item
            progress.update()


def duration(seconds: float) -> str:
    """Words for a time: `40 s`, `12 min`, `2 h 30 min`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
