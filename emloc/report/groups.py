"""Groups of runs that differ in the seed alone, and the settings in which groups differ."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from emloc.config.settings import DECISIVE, PARTS
from emloc.report.rows import Row
from emloc.report.table import EMPTY

_SECTIONS = tuple(section for section in DECISIVE if section != "seed")


def group_numbers(rows: Sequence[Row]) -> pd.Series:
    """The number of each run's group: runs that differ in the seed alone share one.

    Two methods with the same parts are one method, as an anchored emloc_uncorrected and
    emloc_anchored are.

    Groups are numbered in the order of their first run. A run without results is a group by itself,
    and so is a seed that ran a second time.
    """
    keys = [
        (
            *(row.experiment, row.cell, row.named_method, row.model, row.task),
            frozenset(row.decisive.items()),
            EMPTY if row.done else index,
        )
        for index, row in enumerate(rows)
    ]
    runs = pd.DataFrame({"group": keys, "seed": [row.seed for row in rows]})
    runs["again"] = runs.groupby(["group", "seed"]).cumcount()
    return runs.groupby(["group", "again"], sort=False).ngroup()


def varying(rows: Sequence[Row]) -> list[str]:
    """The groups whose choice differs between runs, and settings that differ under one choice.

    Settings that a method or a cell implies are left out, unless its runs differ in them.
    """
    no_choice = dict.fromkeys(_SECTIONS, EMPTY)
    settings = pd.DataFrame([no_choice | dict(row.settings) for row in rows]).fillna(EMPTY)
    cells, methods = (pd.Series([getattr(r, name) for r in rows]) for name in ("cell", "method"))
    names = []
    for section in _SECTIONS:
        peers = cells.where(cells != EMPTY, methods if section in PARTS else EMPTY)
        choice = settings[section]
        names += [section] if _differs(choice, [peers]) else []
        leaves = [name for name in settings if name.startswith(f"{section}.")]
        names += [leaf for leaf in leaves if _differs(settings[leaf], [peers, choice])]
    return names


def _differs(values: pd.Series, peers: Sequence[pd.Series]) -> bool:
    """Whether runs of the same peers have different values."""
    return bool(values.groupby(list(peers)).nunique().gt(1).any())
