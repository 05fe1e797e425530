"""Names and bit widths of the packed formats, read from their YAML files without torch."""

from __future__ import annotations

from pathlib import Path

import yaml

from emloc.config.paths import choices
from emloc.config.settings import MODEL_BITS
from emloc.errors import ConfigError


def widths() -> dict[str, int]:
    """Return format -> bits for all choices of group `precision`, from the most bits to the fewest.

    Raises:
        ConfigError: a file does not set `bits`.
    """
    bits_by_name = {name: _read_bits(file) for name, file in sorted(choices("precision").items())}
    return dict(sorted(bits_by_name.items(), key=lambda item: -item[1]))


def format_of(bits: int) -> str:
    """Return the name of the only format with `bits` bits.

    Raises:
        ConfigError: no format or more than one has that width.
    """
    bits_by_name = widths()
    names = [name for name, width in bits_by_name.items() if width == bits]
    if not names:
        available = dict.fromkeys([MODEL_BITS, *bits_by_name.values()])
        raise ConfigError(
            f"compression.bits={bits}: there is no format of that width, only of "
            f"{', '.join(map(str, available))}; "
            f"set compression.bits={MODEL_BITS}"
        )
    if len(names) > 1:
        raise ConfigError(
            f"compression.bits={bits}: {' and '.join(names)} have that width; "
            f"set precision={names[0]}"
        )
    return names[0]


def width_name(bits: int) -> str:
    """Return the label of a bit width in reports: its only format, or else `<bits> bit`."""
    names = [name for name, width in widths().items() if width == bits]
    return names[0] if len(names) == 1 else f"{bits} bit"


def _read_bits(file: Path) -> int:
    """Return the setting `bits` of a format's YAML file.

    Raises:
        ConfigError: the file does not set `bits` to a whole number.
    """
    bits = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("bits")
    if not isinstance(bits, int):
        raise ConfigError(
            f"{file}: `bits` is not set to a whole number; add a line such as bits: 3"
        )
    return bits
