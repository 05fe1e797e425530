"""Runs that differ in the seed alone as one line of words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from emloc.report.rows import STAGES, Row
from emloc.settings import DECISIVE

EMPTY = "."
KINDS = 6  # of rows, that have columns of their own

_PRESET = ("emulator", "adapter", "recovery")  # the groups a method chooses
_SECTIONS = tuple(section for section in DECISIVE if section != "seed")


def lines_of(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Column -> words, a line for each group of runs, in the order of its first."""
    varying = _varying(rows)
    return [_line(group, rows, varying) for group in _groups(rows)]


def columns_of(lines: Sequence[Mapping[str, str]]) -> list[str]:
    """Every column, in the order it comes up."""
    return list(dict.fromkeys(column for line in lines for column in line))


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
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
        and (row.method, row.settings) == (like.method, like.settings)
        and row.seed not in [one.seed for one in group]
    )


def _varying(rows: Sequence[Row]) -> list[str]:
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


def _line(group: Sequence[Row], rows: Sequence[Row], varying: Sequence[str]) -> dict[str, str]:
    """One line of runs that differ in nothing but the seed."""
    first = group[0]
    line = {"method": first.method} | {name: first.settings.get(name, EMPTY) for name in varying}
    if any(row.cell for row in rows):
        line = {"cell": first.cell or EMPTY, **line}
    if len({row.seed for row in rows}) > 1:
        line["seeds"] = " ".join(str(seed) for seed in sorted(row.seed for row in group))
    metric = _metric_name(rows)
    if not first.done:
        return line | {metric: first.state}

    def spread(name: str, form: str) -> str:
        return _spread([row.number(name) for row in group], form)

    def mean(name: str, form: str) -> str:
        return spread(name, form).split(" ")[0]

    line[metric] = spread("score", ".3f")
    for kind in _kinds(rows, metric):
        line[kind] = spread(f"scores/{metric}/{kind}", ".3f")
    line |= {"loss": spread("scores/loss", ".3f"), "gain kept": spread("gain_kept", ".1%")}
    if any("as_trained/loss" in row.numbers for row in rows):
        line["loss as trained"] = spread("as_trained/loss", ".3f")
    line |= {"through MB": EMPTY, "train GiB": EMPTY, "step s": EMPTY}
    if "seconds/train" in first.numbers:
        line["through MB"] = f"{first.numbers['bytes'] / 1e6:.0f}"
        line["train GiB"] = f"{max(row.numbers['peak_gib/train'] for row in group):.2f}"
        line["step s"] = mean("step_seconds", ".3f")
    return line | {f"{stage} s": mean(f"seconds/{stage}", ".0f") for stage in STAGES}


def _spread(values: Sequence[float | None], form: str) -> str:
    """Mean, and standard deviation of several; empty where one of them is not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return EMPTY
    mean = format(statistics.mean(known), form)
    return f"{mean} ± {format(statistics.stdev(known), form)}" if len(known) > 1 else mean


def _metric_name(rows: Sequence[Row]) -> str:
    names = {row.metric for row in rows if row.done}
    return names.pop() if len(names) == 1 else "score"


def _kinds(rows: Sequence[Row], metric: str) -> list[str]:
    """Kinds of rows that the metric is also given for; none if they are more than fit a table."""
    head = f"scores/{metric}/"
    found = sorted({n.removeprefix(head) for r in rows for n in r.numbers if n.startswith(head)})
    return found if len(found) <= KINDS else []
