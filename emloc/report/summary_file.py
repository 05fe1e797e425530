"""A summary as a CSV file. Tables of words that earlier versions wrote are read, too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from emloc.config.run_folder import DONE
from emloc.config.settings import DECISIVE
from emloc.errors import ConfigError
from emloc.report.rows.csv_files import STD, is_number, read_words, to_number
from emloc.report.run_table import COLUMNS, comparisons
from emloc.report.summary import FACTS, NOT_RUN
from emloc.report.table import EMPTY, number

# Head in a table of an earlier version -> name of the number in a summary.
_OLD_HEADS = {column.head: column.name for column in (*comparisons(), *COLUMNS)}


def is_summary(place: Path) -> bool:
    """Whether it is a file of means over seeds, and not of runs."""
    if not place.is_file():
        return False
    head, _ = read_words(place)
    return "method" in head and "run" not in head


def write_summary(summary: pd.DataFrame, path: Path) -> None:
    """Write numbers at full precision and missing ones as empty cells; no column is empty."""
    filled_columns = [name for name in summary if summary[name].replace(EMPTY, None).notna().any()]
    summary[filled_columns].to_csv(path, index=False, lineterminator="\n")


def read_summary(path: Path) -> pd.DataFrame:
    """The summary in a CSV file.

    Raises:
        ConfigError: it has no score, or a cell in a column of numbers holds no number.
    """
    head, lines = read_words(path)
    if "state" not in head:
        if not _measured(head):
            raise ConfigError(
                f"{path}: no table of runs or means, it has no column of a score; "
                "give one that emloc report wrote"
            )
        lines = [_of_old(line) for line in lines]
    summary = pd.DataFrame(lines, dtype=object)
    summary = summary.reindex(columns=summary.columns.union(FACTS, sort=False)).fillna(EMPTY)
    for name in filter(is_number, summary):
        try:
            summary[name] = [to_number(word) if word else math.nan for word in summary[name]]
        except ValueError as error:
            raise ConfigError(f"{path}: column {name} cannot be read: {error}") from error
    return summary


def _of_old(line: Mapping[str, str]) -> dict[str, str]:
    """A line of a table of words, with each number split into mean and standard deviation."""
    words = {head: EMPTY if word == "." else word for head, word in line.items()}
    score, *others = _measured(words)
    metric = score.removesuffix(" %")
    is_done = number(words[score]) is not None
    new = {head: word for head, word in words.items() if head not in (score, *others)}
    new["state"] = DONE if is_done else words[score] or NOT_RUN
    new["metric"] = metric if is_done else EMPTY
    for head in (score, *others) if is_done else others:
        name = "score" if head == score else _new_name(head, metric)
        # The unit of the earlier head, as a sign or power of ten that a number may have.
        is_score = name.partition("/")[0] in ("score", "scores") and name != "scores/loss"
        unit = "%" if is_score and score != metric else "e6" if name == "bytes" else EMPTY
        mean, _, spread = words[head].partition(" ± ")
        new[name] = mean and mean + unit
        if spread:
            new[f"{name}{STD}"] = spread + unit
    return new


def _measured(heads: Iterable[str]) -> list[str]:
    """The heads that are no names of a run and no settings; the first is that of the score."""
    return [head for head in heads if head not in FACTS and head.partition(".")[0] not in DECISIVE]


def _new_name(head: str, metric: str) -> str:
    is_stage = head.endswith(" s")
    new = f"seconds/{head.removesuffix(' s')}" if is_stage else f"scores/{metric}/{head}"
    return _OLD_HEADS.get(head, new)
