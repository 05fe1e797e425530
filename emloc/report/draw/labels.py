"""What a line is called: by its cells or its method, and by settings where that is not enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from emloc.config.formats import width_name
from emloc.config.settings import MODEL_BITS
from emloc.report.rows import Row

Told = Mapping[str, str]

BITS = "compression.bits"


def format_name(settings: Told) -> str:
    """The packed format of a run: the one it names, else the one of its bits.

    Empty where numbers are in the model's dtype, or the bits were left open.
    """
    bits = settings.get(BITS, "null")
    if bits in ("", "null", str(MODEL_BITS)):
        return ""
    return settings.get("precision") or width_name(int(bits))


def called(lines: Sequence[Sequence[Row]], told: Callable[[Row], Told], swept: str) -> list[str]:
    """A name for each line, different from all others.

    Args:
        lines: the runs of each.
        told: the settings, choices and dotted keys, that all runs of a line have in common.
        swept: the setting in which runs of a line differ; it is not part of a name.
    """
    names = [_name(rows, swept) for rows in lines]
    settings = [told(rows[0]) for rows in lines]
    found = []
    for name, mine in zip(names, settings, strict=True):
        peers = [one for one, other in zip(settings, names, strict=True) if other == name]
        words = [word for key in distinct(peers) if (word := _word(key, mine))]
        # Once, where a format is told by its name and by its bits.
        found.append(" ".join([name, *dict.fromkeys(words)]))
    return found


def distinct(peers: Sequence[Told]) -> list[str]:
    """Names of the settings that tell these apart; a choice stands for all the values it brings."""
    differing = [
        name
        for name in dict.fromkeys(key for one in peers for key in one)
        if len({one.get(name) for one in peers}) > 1
    ]
    choices = [name for name in differing if "." not in name]
    brought = [name for name in choices if _decides(name, differing, peers)]
    leaves = [name for name in differing if "." in name and name.split(".")[0] not in brought]
    return choices + leaves


def _decides(choice: str, differing: Sequence[str], peers: Sequence[Told]) -> bool:
    """Whether no value of the group differs under the same choice."""
    inside = [name for name in differing if name.startswith(f"{choice}.")]
    values = {(one.get(choice), *(one.get(name) for name in inside)) for one in peers}
    return len(values) == len({one.get(choice) for one in peers})


def _word(name: str, told: Told) -> str:
    value = told.get(name)
    if value is None:
        return ""
    if "." not in name:
        return value
    if name == BITS and value != "null":
        return format_name(told) or f"{value} bit"
    return f"{name.partition('.')[2]}={'none' if value == 'null' else value}"


def _name(rows: Sequence[Row], swept: str) -> str:
    """What the names of all cells share, but for the word of a swept ratio; else the method."""
    cells = [row.cell.split("_") for row in rows]
    if swept == "compression.ratio":
        cells = [
            [word for word in words if word != _ratio_word(row)]
            for words, row in zip(cells, rows, strict=True)
        ]
    shared = [word for word in cells[0] if all(word in words for words in cells)]
    return "_".join(shared) or rows[0].method


def _ratio_word(row: Row) -> str:
    ratio = row.settings.get("compression.ratio", "null")
    return "" if ratio == "null" else f"r{100 * float(ratio):.0f}"
