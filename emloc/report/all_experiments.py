"""One page over all experiments: what is asked for, what there is of it, what the paper has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from emloc.config.experiments import experiment
from emloc.config.run_folder import DONE
from emloc.errors import ConfigError
from emloc.report.grid_rows import Placed
from emloc.report.markdown import markdown
from emloc.report.paper import QUANTITIES, Paper, paper_of
from emloc.report.rows import Row, rows_of
from emloc.report.task_table import READ, pivot

_ORDER = ("table", "ablate_")  # what experiments' names start with; others come last


def tables(experiments: Path, runs: Path) -> str:
    """Markdown of every `<experiments>/*.yaml`, with the runs in `<runs>/<its name>`.

    A run that is not there is taken from `<experiments>/results/<its name>*.csv`, where it is. Of
    several experiments whose names a file's starts with, it is the one with the longest.
    """
    paths = sorted(experiments.glob("*.yaml"), key=lambda path: (_rank(path.stem), path.stem))
    names = [path.stem for path in paths]
    files: dict[str, list[Path]] = {name: [] for name in names}
    for file in sorted((experiments / "results").glob("*.csv")):
        owners = sorted((name for name in names if file.stem.startswith(name)), key=len)
        for owner in owners[-1:]:
            files[owner].append(file)
    sections = [_section(path, files[path.stem], runs) for path in paths]
    return "\n\n".join(["# Results", f"{READ[0].upper()}{READ[1:]}.", *sections])


def _rank(name: str) -> int:
    return next((i for i, start in enumerate(_ORDER) if name.startswith(start)), len(_ORDER))


def _section(path: Path, files: Sequence[Path], runs: Path) -> str:
    asked = experiment(path)
    rows, unread = _rows(runs / asked.name, files)
    paper = paper_of([asked.name], path.parent)
    placed = Placed(asked, rows)
    parts = [f"## {asked.name}", asked.about, _state(placed)]
    for name in paper.quantities or ["score"]:
        quantity = QUANTITIES[name]
        parts += [f"{quantity.head}:"] if name != "score" else []
        parts.append(markdown(pivot(placed, paper, quantity), bold=True))
    return "\n\n".join(part for part in [*parts, _below(rows, paper, unread)] if part)


def _rows(folder: Path, files: Sequence[Path]) -> tuple[list[Row], list[str]]:
    """The runs in the folder and those that only the files have; what is wrong with a file."""
    rows, unread = rows_of(folder), []
    for file in files:
        try:
            more = rows_of(file)
        except ConfigError as error:
            unread.append(str(error))
            continue
        there = {row.run: row for row in rows}
        shared = _shared(more, there)
        rows += [
            replace(row, settings={**shared, **row.settings})
            for row in more
            if row.run not in there
        ]
    return rows, unread


def _shared(stored: Sequence[Row], there: Mapping[str, Row]) -> dict[str, str]:
    """Settings that all runs of a file have and it has no column for, if one of them is there."""
    same = next((there[row.run].settings for row in stored if row.run in there), {})
    columns = {name for row in stored for name in row.settings}
    return {name: word for name, word in same.items() if name not in columns}


def _state(placed: Placed) -> str:
    states = Counter(row.state for row in placed.rows if row.state != DONE)
    others = Counter(
        spot.model
        for spot, rows in placed.found.items()
        for row in rows
        if row.done and spot not in placed.asked
    )
    said = [
        f"{placed.done} of {sum(map(len, placed.asked.values()))} runs done",
        *(f"{number} {state}" for state, number in states.items()),
        *(f"{number} besides of {model}" for model, number in others.items()),
    ]
    return f"{', '.join(placed.models)}: {', '.join(said)}."


def _below(rows: list[Row], paper: Paper, unread: list[str]) -> str:
    """What has to be known to read the tables."""
    metrics = sorted({(row.task, row.metric) for row in rows if row.done})
    scores = ", ".join(f"{task} {metric}" for task, metric in metrics)
    said = [
        *([f"Scores: {scores}."] if metrics else []),
        *(f"Paper: {source}." for source in paper.sources),
        *(f"Not read: {error}." for error in unread),
    ]
    return "\n".join(f"{line}  " if line != said[-1] else line for line in said)
