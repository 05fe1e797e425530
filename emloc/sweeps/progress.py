"""How far a sweep is: which of its cells were begun and ended, whichever process runs them.

Every process writes a file of its own for each cell, so that none waits for another and a shared
file system will do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from emloc.config.run_folder import DONE
from emloc.runtime.atomic import write_json


@dataclass(frozen=True)
class Stint:
    """One cell in the hands of one process; times in seconds since 1970."""

    cell: str  # name of the run folder
    begun: float
    before: bool  # done by an earlier launch, so that it took no time
    ended: float | None = None
    state: str = ""  # as in status.json; empty until it ended

    def lasted(self, now: float) -> float:
        """Seconds so far."""
        return (now if self.ended is None else self.ended) - self.begun


@dataclass(frozen=True)
class Tally:
    """The stints of one launch, a file each in `folder`."""

    folder: Path

    def begin(self, number: int, cell: str, before: bool) -> None:
        """Job `number` of the launch is at work."""
        self._put(number, Stint(cell, time.time(), before))

    def end(self, number: int, cell: str, state: str) -> None:
        """It has ended; one that was killed may never have begun."""
        path = self._path(number, cell)
        begun = _read(path) if path.exists() else Stint(cell, time.time(), False)
        self._put(number, replace(begun, ended=time.time(), state=state))

    def stints(self) -> list[Stint]:
        """All of them, but for those of killed processes whose cell was begun anew."""
        found = sorted((_read(path) for path in self.folder.glob("*.json")), key=lambda s: s.begun)
        last = {stint.cell: stint for stint in found}
        return [stint for stint in found if stint.ended or last[stint.cell] is stint]

    def _path(self, number: int, cell: str) -> Path:
        return self.folder / f"{cell}-{number}.json"

    def _put(self, number: int, stint: Stint) -> None:
        write_json(self._path(number, stint.cell), asdict(stint))


def _read(path: Path) -> Stint:
    return Stint(**json.loads(path.read_text()))


def line(stints: Sequence[Stint], total: int | None, now: float) -> str:
    """`3 of 12 cells done, 1 failed, about 14 min left`; `total` None: nobody knows it."""
    ended = [stint for stint in stints if stint.ended is not None]
    bad = sum(stint.state != DONE for stint in ended)
    words = [f"{len(ended) - bad} of {total} cells done" if total else f"{len(ended)} cells done"]
    if bad:
        words.append(f"{bad} failed")
    left = seconds_left(stints, total, now) if total else None
    if left is not None:
        words.append(f"about {_duration(left)} left")
    return ", ".join(words)


def seconds_left(stints: Sequence[Stint], total: int, now: float) -> float | None:
    """What the other cells will take, at the mean of those that were done in this launch.

    As many go on side by side as did so far. None where nothing is known: none was done, or all
    that go on have taken longer.
    """
    worked = [stint for stint in stints if not stint.before]
    ended = [stint.lasted(now) for stint in worked if stint.state == DONE]
    running = [stint.lasted(now) for stint in worked if stint.ended is None]
    waiting = max(total - len(stints), 0)
    if not ended:
        return None
    mean = sum(ended) / len(ended)
    work = waiting * mean + sum(max(mean - so_far, 0) for so_far in running)
    return work / min(_side_by_side(worked, now), waiting + len(running)) if work else None


def _side_by_side(stints: Sequence[Stint], now: float) -> int:
    """The most that were at work at one time."""
    return max(
        sum(other.begun <= one.begun < other.begun + other.lasted(now) for other in stints)
        for one in stints
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
