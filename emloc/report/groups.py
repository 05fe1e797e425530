"""Which runs are seeds of one another, and what tells the others apart."""

from __future__ import annotations

from collections.abc import Sequence

from emloc.config.settings import DECISIVE
from emloc.report.rows import Row
from emloc.report.table import EMPTY

_PRESET = ("emulator", "adapter", "recovery")  # the groups a method chooses
_SECTIONS = tuple(section for section in DECISIVE if section != "seed")


def groups_of(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs that differ in nothing but the seed together, in the order of the first."""
    groups: list[list[Row]] = []
    for row in rows:
        group = next((group for group in groups if _joins(row, group)), None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    return groups


def _joins(row: Row, group: Sequence[Row]) -> bool:
    """Whether it is one more seed of the group. What failed is a line by itself."""
    like = group[0]
    return (
        row.done
        and like.done
        and _what(row) == _what(like)
        and row.seed not in [one.seed for one in group]
    )


def _what(row: Row) -> tuple[object, ...]:
    """All that a run is told by but its seed."""
    named = (row.experiment, row.cell, row.method, row.model, row.task)
    return (*named, row.decisive)


def varying(rows: Sequence[Row]) -> list[str]:
    """Groups whose choice differs between rows, and settings that differ under one choice."""
    return [name for section in _SECTIONS for name in _varying_in(section, rows)]


def _varying_in(section: str, rows: Sequence[Row]) -> list[str]:
    # What a method presets is told by its name: it counts only where one method ran with two. Of a
    # cell all is told by its name.
    by_method = [row.cell or (row.method if section in _PRESET else "") for row in rows]
    choices = [row.settings.get(section, EMPTY) for row in rows]
    names = [section] if _differ(by_method, choices) else []
    peers = list(zip(by_method, choices, strict=True))
    inside = f"{section}."
    leaves = dict.fromkeys(key for row in rows for key in row.settings if key.startswith(inside))
    swept = {leaf: [row.settings.get(leaf, EMPTY) for row in rows] for leaf in leaves}
    return names + [leaf for leaf, values in swept.items() if _differ(peers, values)]


def _differ(peers: Sequence[object], values: Sequence[str]) -> bool:
    """Whether rows of the same `peers` have different values."""
    return len(set(zip(peers, values, strict=True))) > len(set(peers))
