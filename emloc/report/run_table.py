"""A folder of runs as a table: those that differ in the seed alone are one line of words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from emloc.config.stage_order import merged
from emloc.report.groups import groups_of, varying
from emloc.report.paper import QUANTITIES, Number, Paper, Quantity, facts_of
from emloc.report.rows import Row, metric_of
from emloc.report.table import EMPTY, Table, best

KINDS = 6  # of rows, that have columns of their own
NO_PAPER = Paper()


def table_of(rows: Sequence[Row], paper: Paper = NO_PAPER, *, unrun: bool = True) -> Table:
    """A line for each group of runs, the paper's numbers of their models beside them.

    `unrun`: a line also for what the paper has of these models and no run is about.
    """
    paper = paper.of_models(row.model for row in rows)
    absent = _absent(paper, rows) if unrun else []
    heads = _heads(rows, paper, absent)
    groups = groups_of(rows)
    lines = [_line(group, heads, paper) for group in groups]
    peers = [(row.experiment, row.model, row.task, row.data, row.metric) for row, *_ in groups]
    larger = {heads.metric: True} | dict.fromkeys(heads.kinds, True)
    leading = best(lines, peers, larger | {"loss": False, "gain kept": True})
    return Table([*lines, *(_absent_line(numbers, heads) for numbers in absent)], leading)


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean, and standard deviation of several; empty where one of them is not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return EMPTY
    mean = format(statistics.mean(known), form)
    return f"{mean} ± {format(statistics.stdev(known), form)}" if len(known) > 1 else mean


def measured(group: Sequence[Row], quantity: Quantity) -> str:
    """What these runs have of it, in its unit."""
    return spread([quantity.ours(row) for row in group], f".{quantity.digits}f")


@dataclass(frozen=True)
class _Heads:
    """Which columns a table has, as far as that depends on its rows."""

    names: Sequence[str]  # of settings, that tell lines apart
    seeds: bool
    metric: str  # what the score is called
    kinds: Mapping[str, str]  # head of rows of one kind -> their number's name
    as_trained: bool
    quantities: Sequence[Quantity]  # that the paper has
    stages: Sequence[str]  # whose seconds are a column

    @property
    def percent(self) -> bool:
        """Whether scores are shown as the paper's are."""
        return any(quantity.name == "score" for quantity in self.quantities)


def _heads(rows: Sequence[Row], paper: Paper, absent: Sequence[Sequence[Number]]) -> _Heads:
    metric = metric_of(rows)
    kind = f"scores/{metric}/"
    found = sorted({name for row in rows for name in row.numbers if name.startswith(kind)})
    return _Heads(
        names=_names(rows, [number for numbers in absent for number in numbers]),
        seeds=len({row.seed for row in rows}) > 1,
        metric=f"{metric} %" if "score" in paper.quantities else metric,
        kinds={name.removeprefix(kind): name for name in found} if len(found) <= KINDS else {},
        as_trained=any("as_trained/loss" in row.numbers for row in rows),
        quantities=[QUANTITIES[name] for name in paper.quantities],
        stages=reduce(merged, (row.columns for row in rows), ()),
    )


def _names(rows: Sequence[Row], absent: Sequence[Number]) -> list[str]:
    """Columns that tell lines apart."""
    found = varying(rows)
    of = [key for key in ("model", "task") if key in found or _is_of_another(key, rows, absent)]
    several = len({row.experiment for row in rows}) > 1
    cells = any(row.cell for row in rows)
    others = [name for name in found if name not in of]
    return [*["experiment"] * several, *["cell"] * cells, "method", *of, *others]


def _is_of_another(key: str, rows: Sequence[Row], absent: Sequence[Number]) -> bool:
    """Whether the paper has numbers of another one than all rows."""
    ours = {row.settings.get(key) for row in rows}
    return bool({number.keys.get(key) for number in absent} - ours - {None})


def _line(group: Sequence[Row], heads: _Heads, paper: Paper) -> dict[str, str]:
    """One line of runs that differ in nothing but the seed."""
    first = group[0]
    told = {"experiment": first.experiment, "cell": first.cell, "method": first.method}
    known = {**first.settings, **told}
    line = {name: known.get(name) or EMPTY for name in heads.names}
    if heads.seeds:
        line["seeds"] = " ".join(str(seed) for seed in sorted(row.seed for row in group))
    if not first.done:
        return line | {heads.metric: first.state} | _compared(group, heads, paper)

    def shown(name: str, form: str, scale: float = 1) -> str:
        values = [row.number(name) for row in group]
        return spread([None if value is None else scale * value for value in values], form)

    def mean(name: str, form: str) -> str:
        return shown(name, form).split(" ")[0]

    share = (".1f", 100) if heads.percent else (".3f", 1)
    line[heads.metric] = shown("score", *share)
    line |= {head: shown(name, *share) for head, name in heads.kinds.items()}
    line |= _compared(group, heads, paper)
    line |= {"loss": shown("scores/loss", ".3f"), "gain kept": shown("gain_kept", ".1%")}
    if heads.as_trained:
        line["loss as trained"] = shown("as_trained/loss", ".3f")
    line |= {"through MB": EMPTY, "train GiB": EMPTY, "step s": EMPTY}
    if "seconds/train" in first.numbers:
        peaks = [row.number("peak_gib/train") for row in group]
        line["through MB"] = shown("bytes", ".0f", 1e-6).split(" ")[0]
        line["train GiB"] = spread([max((p for p in peaks if p), default=None)], ".2f")
        line["step s"] = mean("step_seconds", ".3f")
    return line | {f"{stage} s": mean(f"seconds/{stage}", ".0f") for stage in heads.stages}


def _compared(group: Sequence[Row], heads: _Heads, paper: Paper) -> dict[str, str]:
    """What the paper has of these runs, and ours less that, in its unit."""
    line = {}
    for quantity in heads.quantities:
        if quantity.name != "score":  # which has a column anyway
            line[quantity.head] = measured(group, quantity)
        number = paper.find(quantity.name, facts_of(group[0]))
        if quantity.name == "score" and not group[0].headline:
            number = None  # of another metric
        line |= _beside(quantity, number, [quantity.ours(row) for row in group])
    return line


def _beside(
    quantity: Quantity, number: Number | None, ours: Sequence[float | None]
) -> dict[str, str]:
    known = [value for value in ours if value is not None]
    less = EMPTY
    if number is not None and known and len(known) == len(ours):
        exact = statistics.mean(known) - float(number.word)
        less = format(round(exact, quantity.digits) + 0.0, f"+.{quantity.digits}f")  # no minus zero
    sign = "" if quantity.name == "score" else f" {quantity.sign}"
    return {f"paper{sign}": number.word if number else EMPTY, f"difference{sign}": less}


def _absent_line(numbers: Sequence[Number], heads: _Heads) -> dict[str, str]:
    """What the paper has and no run is about."""
    line = {name: numbers[0].keys.get(name, EMPTY) for name in heads.names} | {heads.metric: EMPTY}
    for number in numbers:
        line |= _beside(QUANTITIES[number.quantity], number, [])
    return line


def _absent(paper: Paper, rows: Sequence[Row]) -> list[list[Number]]:
    """The paper's numbers that no run is about, those of one thing together."""
    facts = [facts_of(row) for row in rows]
    left = [number for number in paper.numbers if not any(map(number.about, facts))]
    things = {tuple(number.keys.items()): number.keys for number in left}
    return [[number for number in left if number.keys == keys] for keys in things.values()]
