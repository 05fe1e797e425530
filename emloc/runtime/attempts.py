"""What the attempts of an interrupted stage have spent, so that its figures are those of all.

A stage that is interrupted leaves a file with its seconds, peak memory and work beside its folder.
The attempt that finishes the stage adds them to its own. An attempt that was killed, and not
interrupted, leaves nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from emloc.runtime.atomic import write_json
from emloc.runtime.work_meter import WorkMeter, metered


@dataclass(eq=False)
class Spent(WorkMeter):
    """What the attempts of one stage have spent so far."""

    seconds: float = 0.0
    peak_gib: float = 0.0  # the largest of the attempts, which the `with` block measures


def earlier_attempts(folder: Path) -> Spent:
    """Return what interrupted attempts have spent in a folder; zeros without any."""
    path = _file(folder)
    return Spent(**json.loads(path.read_text())) if path.exists() else Spent()


@contextmanager
def attempt(folder: Path) -> Iterator[Spent]:
    """Yield the sum over all attempts, which holds this one when the `with` block has ended.

    If the block ends by an exception, the sum is left beside `folder` for the next attempt;
    otherwise nothing is left.
    """
    spent, start = earlier_attempts(folder), time.perf_counter()
    ended = False
    try:
        with metered(spent):
            yield spent
        ended = True
    finally:
        spent.seconds += time.perf_counter() - start
        if ended:
            _file(folder).unlink(missing_ok=True)
        else:
            with suppress(OSError):  # a full disk may be what has ended the attempt
                write_json(_file(folder), asdict(spent))


def _file(folder: Path) -> Path:
    # Not inside, where a stage may list what an earlier attempt of its own has written.
    return folder.with_name(f"{folder.name}.attempts.json")
