"""Lines that differ in the anchors alone."""

from __future__ import annotations

from collections.abc import Sequence

from emloc.report.draw.series import Series

# Groups in which a method with anchors may differ from the one without. The recovery is one of
# them, since a correction cannot stand behind anchors.
_DIFFERING = ("anchor", "recovery")


def unanchored(line: Series, others: Sequence[Series]) -> Series | None:
    """Return the line of the same emulator and training without anchors.

    None if the line has no anchors, or there is no such line. Among lines with several recoveries,
    that with the recovery of `line` counts, or else the first.
    """
    alike = [other for other in others if not other.is_anchored and _shared(other) == _shared(line)]
    if not line.is_anchored or not alike:
        return None
    return next((other for other in alike if _recovery(other) == _recovery(line)), alike[0])


def _shared(line: Series) -> dict[str, str]:
    return {
        name: value
        for name, value in line.rows[0].decisive.items()
        if name.partition(".")[0] not in _DIFFERING
    }


def _recovery(line: Series) -> str | None:
    return line.rows[0].settings.get("recovery")
