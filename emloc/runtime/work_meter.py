"""Count the arithmetic and the weights of some work, where both take place.

The code that runs a block or reads a weight reports to all meters that are running. So the counts
hold for any order of passes, and for methods of plug-ins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class WorkMeter:
    """Counts of the work inside one `with metered()` block."""

    # Multiplications in linear layers of decoder blocks: of one token of a row, summed over rows.
    operations: int = 0
    # Bytes of weights that were brought to the computing device, from disk or from host memory.
    weight_bytes: int = 0


_running: list[WorkMeter] = []


@contextmanager
def metered(meter: WorkMeter | None = None) -> Iterator[WorkMeter]:
    """Yield a meter that counts until the `with` block ends; meters may be nested.

    `meter` counts on from what it has; None: a new one.
    """
    meter = meter or WorkMeter()
    _running.append(meter)
    try:
        yield meter
    finally:
        _running.remove(meter)


def count_operations(operations: int) -> None:
    """Add multiplications (see `WorkMeter`) to all running meters."""
    for meter in _running:
        meter.operations += operations


def count_weights(nbytes: int) -> None:
    """Add bytes of weights that reach the computing device to all running meters."""
    for meter in _running:
        meter.weight_bytes += nbytes
