"""Progress of a long stage: a bar on a terminal, and a line in the log every 30 seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Self, TypeVar

from tqdm import tqdm

from emloc.runtime.distributed import is_first

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0

Clock = Callable[[], float]  # seconds, from an arbitrary start
Item = TypeVar("Item")


class BesideBarFilter(logging.Filter):
    """Filter of the console's log handler: it drops lines that repeat what a bar shows."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the console prints the record."""
        return not getattr(record, "beside_bar", False)


class StageProgress:
    """Progress of one stage, counted in units such as steps, blocks or rows.

    The first of several processes draws a bar on a terminal. At most every 30 seconds it also logs
    a line such as `train: step 40 of 400, loss 1.234, 0.52 s a step, 3 min left`. Where a bar is
    drawn, `BesideBarFilter` keeps that line off the console, and the log file alone has it.
    """

    def __init__(
        self, stage: str, total: int, unit: str, *, done: int = 0, clock: Clock = time.monotonic
    ) -> None:
        """Start at unit `done` of `total`, which is above 0 where a stage is resumed."""
        self._stage, self._total, self._unit, self._clock = stage, total, unit, clock
        self._done = done
        self._values: dict[str, float] = {}
        self._line_time, self._line_done = clock(), done  # of the last line, at first the start
        self._unit_seconds: float | None = None  # a unit takes so long, as of the last line
        silent = not (is_first() and total)
        self._bar = tqdm(desc=stage, total=total, initial=done, unit=unit, disable=silent)

    def update(self, count: int = 1) -> None:
        """Count units that are finished, and log a line if the last one is 30 seconds old."""
        self._done += count
        self._bar.update(count)
        now = self._clock()
        if now - self._line_time >= SECONDS_BETWEEN_LINES:
            if is_first():
                drawn = not self._bar.disable
                log.info("%s", self._line(now), extra={"beside_bar": drawn})
            self._line_time, self._line_done = now, self._done

    def show(self, **values: float) -> None:
        """Show these values, such as `loss`, from now on."""
        self._values |= values
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in self._values.items()})

    def close(self) -> None:
        """Take the bar off the terminal."""
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, now: float) -> str:
        """The line. Its speed is half that since the last line and half that of the last line:
        units of one stage differ, and a resumed stage skips its first ones.
        """
        latest = (now - self._line_time) / max(self._done - self._line_done, 1)
        seconds = latest if self._unit_seconds is None else (self._unit_seconds + latest) / 2
        self._unit_seconds = seconds
        words = [
            f"{self._unit} {self._done} of {self._total}",
            *(f"{name} {value:.3f}" for name, value in self._values.items()),
            f"{_seconds(seconds)} s a {self._unit}",
        ]
        if self._done < self._total:
            words.append(f"{duration(seconds * (self._total - self._done))} left")
        return f"{self._stage}: {', '.join(words)}"


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
