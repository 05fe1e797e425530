"""Runs that differ in the seed alone as one line of numbers: means and standard deviations.

A summary has the facts of each group of runs, the settings that tell groups apart, and numbers by
the names that they have in a row. `<name>_std` is the standard deviation of `<name>` over seeds. A
number is missing where one of the seeds lacks it; a word that does not apply is empty.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import reduce

import pandas as pd

from emloc.config.stage_order import merged
from emloc.report.draw.labels import format_name
from emloc.report.groups import group_numbers, varying
from emloc.report.paper import NO_PAPER, QUANTITIES, Paper, facts_of
from emloc.report.rows import FIELDS, Row, frame_of
from emloc.report.rows.csv_files import STD, is_number
from emloc.report.table import EMPTY

NOT_RUN = "not run"  # state of a line that only the paper has
SIZE = "compressed_to"  # column: share of the parameters and packed format, in words
FACTS = (*(name for name in FIELDS if name not in ("run", "seed")), "seeds")

_WHOLE = ("full", "offload")  # emulators with all parameters of the model
_TRAINED = ("bytes", "peak_gib/train", "step_seconds")  # numbers of runs that train
_TOTALS = ("forwards", "weights_read")  # over the stages that count as cost
_SPREAD = ("score", "scores", "as_trained", "gain_kept", "ours")  # what has a standard deviation


def summary_of(rows: Sequence[Row], paper: Paper = NO_PAPER, *, unrun: bool = True) -> pd.DataFrame:
    """One line for each group of runs, with the paper's numbers of their models.

    `ours/<quantity>`, `paper/<quantity>` and `difference/<quantity>` are in the paper's unit.

    Args:
        rows: at least one run.
        paper: numbers of the paper; those of other models are ignored.
        unrun: whether numbers of the paper that no run is about have lines, too.
    """
    paper = paper.of_models(row.model for row in rows)
    groups = group_numbers(rows)
    firsts = [rows[index] for index in groups.drop_duplicates().index]
    labels = [name for name in varying(rows) if name not in FIELDS]
    seeds = pd.Series([row.seed for row in rows]).sort_values().astype(str).groupby(groups)
    facts = pd.DataFrame(
        {
            **{name: getattr(row, name, EMPTY) for name in FACTS},
            "method": row.named_method,
            **{name: row.word(name) for name in labels},
            SIZE: _size(row),
            **{f"paper/{name}": _papers(paper, name, row) for name in paper.quantities},
        }
        for row in firsts
    )
    facts["seeds"] = seeds.agg(" ".join)
    absent = pd.DataFrame(_absent(paper, rows) if unrun else [])
    table = pd.concat([facts.join(_means(rows, paper, groups)), absent], ignore_index=True)
    for name in paper.quantities:
        theirs = pd.to_numeric(table[f"paper/{name}"])
        table[f"difference/{name}"] = table[f"ours/{name}"] - theirs
    return table.fillna({name: EMPTY for name in table if not is_number(name)})


def _means(rows: Sequence[Row], paper: Paper, groups: pd.Series) -> pd.DataFrame:
    """Means of all numbers over each group, maxima of memory, and standard deviations of scores."""
    frame = frame_of(rows)
    stages: list[str] = reduce(merged, [row.columns for row in rows])
    seconds = [name for stage in stages if (name := f"seconds/{stage}") in frame]
    others = [n for n in frame if is_number(n) and not n.startswith("seconds/") and n != "score"]
    runs = frame.reindex(columns=["score", *others, *seconds]).astype(float)
    trained = [name for name in _TRAINED if name in runs]
    for name in _TOTALS:
        totals = pd.Series([getattr(row, name) for row in rows], dtype=float)
        runs = runs.assign(**{name: totals}) if totals.notna().any() else runs
    runs.loc[["seconds/train" not in row.numbers for row in rows], trained] = math.nan
    for name in paper.quantities:
        runs[f"ours/{name}"] = pd.Series([QUANTITIES[name].ours(row) for row in rows], dtype=float)
    by_group = runs.groupby(groups)
    complete = by_group.count().eq(by_group.size(), axis=0)
    means = by_group.agg(statistics.mean).where(complete)  # exact: 0.265 and 0.266 make 0.2655
    peaks = [name for name in runs if name.startswith("peak_gib/")]
    means[peaks] = by_group[peaks].max()
    spreads = by_group.std().where(complete)
    spreads = spreads[[name for name in runs if name.partition("/")[0] in _SPREAD]]
    return means.join(spreads.add_suffix(STD))


def _size(row: Row) -> str:
    """What the model was compressed to while training, as `50% nf4`; empty for the original."""
    ratio = row.settings.get("compression.ratio", "null")
    is_whole = row.settings.get("emulator") in _WHOLE or ratio in ("", "null")
    share = EMPTY if is_whole else f"{float(ratio):.0%}"
    return f"{share} {format_name(row.settings)}".strip()


def _papers(paper: Paper, quantity: str, row: Row) -> str:
    """The paper's number beside a run, as it is printed there."""
    number = paper.find(quantity, facts_of(row))
    is_other_metric = quantity == "score" and not row.headline
    return number.word if number and not is_other_metric else EMPTY


def _absent(paper: Paper, rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line for each method, model and task of which only the paper has numbers."""
    facts = [facts_of(row) for row in rows]
    lines: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
    for number in paper.numbers:
        if not any(map(number.about, facts)):
            line = lines.setdefault(tuple(number.keys.items()), {**number.keys, "state": NOT_RUN})
            line[f"paper/{number.quantity}"] = number.word
    return list(lines.values())
