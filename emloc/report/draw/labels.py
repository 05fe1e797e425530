"""Labels of lines and points: their cell or method, and settings where that is not enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from emloc.config.formats import width_name
from emloc.config.settings import MODEL_BITS
from emloc.report.rows import Row

Settings = Mapping[str, str]  # choices of groups and dotted keys, with their values

BITS = "compression.bits"


def format_name(settings: Settings) -> str:
    """Return the packed format of a run: the one in `precision`, else the usual one of its bits.

    Empty where weights are in the model's dtype, or the bits are not decided.
    """
    bits = settings.get(BITS, "null")
    if bits in ("", "null", str(MODEL_BITS)):
        return ""
    return settings.get("precision") or width_name(int(bits))


def line_labels(
    lines: Sequence[Sequence[Row]], settings: Sequence[Settings], swept: str
) -> list[str]:
    """Return a label for each line, different from all other labels.

    Args:
        lines: the runs of each line.
        settings: for each line, the settings that all of its runs share.
        swept: the setting in which runs of a line differ. Labels leave it out.
    """
    names = [_name(rows, swept) for rows in lines]
    labels = []
    for name, own in zip(names, settings, strict=True):
        namesakes = [one for one, other in zip(settings, names, strict=True) if other == name]
        words = [word for key in distinct_settings(namesakes) if (word := _word(key, own))]
        # A format may be named twice, by its name and by its bits.
        labels.append(" ".join([name, *dict.fromkeys(words)]))
    return labels


def distinct_settings(settings: Sequence[Settings]) -> list[str]:
    """Return names of settings that differ. The choice of a group stands for all of its values."""
    differing = [
        name
        for name in dict.fromkeys(key for one in settings for key in one)
        if len({one.get(name) for one in settings}) > 1
    ]
    choices = [name for name in differing if "." not in name]
    explained = [name for name in choices if _decides_group(name, differing, settings)]
    leaves = [name for name in differing if "." in name and name.split(".")[0] not in explained]
    return choices + leaves


def _decides_group(choice: str, differing: Sequence[str], settings: Sequence[Settings]) -> bool:
    """Whether runs with the same choice have the same values in the whole group."""
    inside = [name for name in differing if name.startswith(f"{choice}.")]
    values = {(one.get(choice), *(one.get(name) for name in inside)) for one in settings}
    return len(values) == len({one.get(choice) for one in settings})


def _word(name: str, settings: Settings) -> str:
    value = settings.get(name)
    if value is None:
        return ""
    if "." not in name:
        return value
    if name == BITS and value != "null":
        return format_name(settings) or f"{value} bit"
    return f"{name.partition('.')[2]}={'none' if value == 'null' else value}"


def _name(rows: Sequence[Row], swept: str) -> str:
    """Return the words that all cells share, without that of a swept ratio; else the method."""
    cells = [row.cell.split("_") for row in rows]
    if swept == "compression.ratio":
        cells = [
            [word for word in words if word != _ratio_word(row)]
            for words, row in zip(cells, rows, strict=True)
        ]
    shared = [word for word in cells[0] if all(word in words for words in cells)]
    return "_".join(shared) or rows[0].named_method


def _ratio_word(row: Row) -> str:
    ratio = row.settings.get("compression.ratio", "null")
    return "" if ratio == "null" else f"r{100 * float(ratio):.0f}"
