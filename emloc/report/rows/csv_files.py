"""CSV files of results: which columns hold numbers, and how a cell is read.

`experiments/results/README.md` lists the columns with their units. Earlier versions wrote `=`
before the name of a number, and `94.3%` for a share; both are still read.
"""

from __future__ import annotations

import csv
from decimal import Decimal
from pathlib import Path

from emloc.errors import ConfigError

STD = "_std"  # behind the name of a number: its standard deviation over seeds
_NUMBERS = (
    *("score", "gain_kept", "bytes", "trainable", "step_seconds", "passes", "rejected_rounds"),
    *("trained_rows", "forwards", "weights_read"),
)
_KINDS = (
    *("scores", "as_trained", "seconds", "peak_gib", "row_forwards", "weights_read"),
    *("ours", "difference"),
)


def is_number(name: str) -> bool:
    """Whether the column of this name holds numbers; all other columns hold words."""
    name = name.removesuffix(STD)
    kind, slash, _ = name.partition("/")
    return name in _NUMBERS or (bool(slash) and kind in _KINDS)


def to_number(word: str) -> float:
    """The number in a cell; a percentage becomes a share.

    Raises:
        ValueError: the cell holds no number.
    """
    value = float(word.removesuffix("%"))
    # Of decimal digits, so that 4.4% becomes 0.044 and no number beside it.
    return float(Decimal(word[:-1]) / 100) if word.endswith("%") else value


def read_words(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns of a CSV file, and column -> word for each line.

    Raises:
        ConfigError: a line has more or fewer values than the head has columns.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        head = [name.removeprefix("=") for name in next(reader, [])]
        lines = []
        for values in reader:
            if len(values) != len(head):
                raise ConfigError(
                    f"{path}:{reader.line_num}: cannot be read: {len(values)} values in "
                    f"{len(head)} columns; write the file again with emloc report --csv"
                )
            lines.append(dict(zip(head, values, strict=True)))
    return head, lines
