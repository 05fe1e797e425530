"""Which packed formats there are, and of how many bits, by their YAML files. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import yaml

from emloc.config.paths import choices
from emloc.config.settings import MODEL_BITS
from emloc.errors import ConfigError


def widths() -> dict[str, int]:
    """Name of each choice of group `precision` -> its bits, from the most to the fewest.

    Raises:
        ConfigError: a file says no bits.
    """
    found = {name: _bits(file) for name, file in sorted(choices("precision").items())}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def format_of(bits: int) -> str:
    """The name of the only format of that width.

    Raises:
        ConfigError: there is none, or more than one.
    """
    known = widths()
    names = [name for name, width in known.items() if width == bits]
    if not names:
        there = ", ".join(str(width) for width in dict.fromkeys([MODEL_BITS, *known.values()]))
        raise ConfigError(
            f"compression.bits={bits}: there is no format of that width, but of {there}; "
            f"set compression.bits={MODEL_BITS}"
        )
    if len(names) > 1:
        raise ConfigError(
            f"compression.bits={bits}: {' and '.join(names)} have that width; "
            f"set precision={names[0]}"
        )
    return names[0]


def width_name(bits: int) -> str:
    """What a width is called in a report: by its only format, or by its bits."""
    names = [name for name, width in widths().items() if width == bits]
    return names[0] if len(names) == 1 else f"{bits} bit"


def _bits(file: Path) -> int:
    bits = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("bits")
    if not isinstance(bits, int):
        raise ConfigError(f"{file}: says no bits of a number; add a line such as bits: 3")
    return bits
