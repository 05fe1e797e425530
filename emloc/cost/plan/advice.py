"""Which method of a plan to take: the fastest that fits and has kept most of LoRA's gain so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emloc.cost.plan.fit import usable_bytes
from emloc.cost.plan.gains import ORIGIN
from emloc.cost.plan.rows import PlanRow
from emloc.runtime.memory import GIB

# Least share of LoRA's gain that a recommended method has kept, if one that fits has kept as much.
ENOUGH = 0.95


@dataclass(frozen=True)
class Machine:
    """Memory and disk of the machine to plan for, in GiB."""

    gpu: float
    host: float
    disk: float

    def lacks(self, row: PlanRow) -> str | None:
        """Return what a method needs more of than there is: GPU, host or disk; None if it fits."""
        if row.need.peak > usable_bytes(self.gpu):
            return "GPU"
        if row.cost.host > self.host * GIB:
            return "host"
        return "disk" if row.cost.disk > self.disk * GIB else None


def advice(rows: Sequence[PlanRow], machine: Machine, steps: int) -> str:
    """Return a sentence that recommends a method, and says why."""
    fitting = [row for row in rows if machine.lacks(row) is None]
    if not fitting:
        nearest = min(rows, key=lambda row: row.need.peak)
        return (
            f"recommended: nothing, since no method fits; {nearest.method} needs the least memory "
            f"of the GPU, {nearest.need.peak / GIB:.2g} GiB, and {nearest.cost.host / GIB:.3g} GiB "
            "of host memory"
        )
    measured = [row for row in fitting if row.gain is not None]
    good = [row for row in measured if row.gain is not None and row.gain >= ENOUGH]
    if good:
        best = min(good, key=lambda row: row.seconds)
        why = f"it is the fastest that fits and has kept at least {ENOUGH:g} of LoRA's gain"
    elif measured:
        best = max(measured, key=lambda row: row.gain or 0.0)
        why = f"of what fits it has kept most of LoRA's gain, but less than {ENOUGH:g} of it"
    else:
        best = min(fitting, key=lambda row: row.seconds)
        why = "it is the fastest that fits; how much of LoRA's gain it keeps was not measured"
    share = f"{best.gain:.3f} of it, {ORIGIN}" if best.gain is not None else "not measured"
    return (
        f"recommended: {settings_of(best)}, about {hours(best.seconds)} for {steps} steps; {why} "
        f"({share})"
    )


def settings_of(row: PlanRow) -> str:
    """Return the settings of a row, as on the command line."""
    method, *settings = row.method.split()
    words = [f"method={method}"]
    for word in settings:
        words.append(word if "=" in word else f"compression.bits={row.bits}")
    if row.ratio is not None:
        words.append(f"compression.ratio={row.ratio:g}")
    return " ".join(words)


def hours(seconds: float) -> str:
    """Return a duration in minutes or hours."""
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
