"""One page over all experiments: the requested runs, their results, and the paper's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from emloc.config.experiments import experiment
from emloc.config.run_folder import DONE
from emloc.errors import ConfigError
from emloc.report.grid import STATES, Grid
from emloc.report.markdown import markdown
from emloc.report.notes import sentence
from emloc.report.paper import QUANTITIES, Paper, paper_of
from emloc.report.rows import Row, rows_of
from emloc.report.task_table import HOW_TO_READ, task_table


def tables(experiments: Path, runs: Path) -> str:
    """Markdown of every `<experiments>/*.yaml`, with the runs in `<runs>/<its name>`.

    Runs that are not there are read from `<experiments>/results/<its name>*.csv`. A file belongs to
    the experiment with the longest name that its own name starts with.
    """
    names = sorted(
        (path.stem for path in experiments.glob("*.yaml")),
        key=lambda name: (not name.startswith("table"), not name.startswith("ablate_"), name),
    )
    files: dict[str, list[Path]] = {name: [] for name in names}
    for file in sorted((experiments / "results").glob("*.csv")):
        if owners := [name for name in names if file.stem.startswith(name)]:
            files[max(owners, key=len)].append(file)
    sections = [_section(experiments / f"{name}.yaml", files[name], runs) for name in names]
    return "\n\n".join(["# Results", sentence(HOW_TO_READ), *sections])


def _section(path: Path, files: Sequence[Path], runs: Path) -> str:
    requested = experiment(path)
    rows, errors = _rows(runs / requested.name, files)
    paper = paper_of([requested.name], path.parent)
    grid = Grid(requested, rows)
    parts = [f"## {requested.name}", requested.about, _progress(grid)]
    failures: list[str] = []
    for name in paper.quantities or ["score"]:
        table, failures = task_table(grid, paper, QUANTITIES[name])
        parts += [f"{QUANTITIES[name].head}:"] if name != "score" else []
        parts.append(markdown(table, bold=True))
    return "\n\n".join(filter(None, [*parts, _notes(rows, paper, failures, errors)]))


def _rows(folder: Path, files: Sequence[Path]) -> tuple[list[Row], list[str]]:
    """The runs in the folder and those that only the files have; errors of unreadable files."""
    rows, errors = rows_of(folder), []
    for file in files:
        try:
            stored = rows_of(file)
        except ConfigError as error:
            errors.append(str(error))
            continue
        present = {row.run: row.settings for row in rows}
        # A file has no column for a setting that all of its runs share: take it from a folder.
        shared = next((present[row.run] for row in stored if row.run in present), {})
        columns = {name for row in stored for name in row.settings}
        shared = {name: word for name, word in shared.items() if name not in columns}
        rows += [
            replace(row, settings={**shared, **row.settings})
            for row in stored
            if row.run not in present
        ]
    return rows, errors


def _progress(grid: Grid) -> str:
    """How many of the requested runs are in which state, and the runs off the grid."""
    states = grid.states()
    counts = [f"{states[name]} {name}" for name in STATES if states[name] and name != DONE]
    besides = [f"{count} of {column}" for column, count in grid.off_grid().items()]
    progress = ", ".join([f"{states[DONE]} of {states.total()} runs done", *counts])
    off_grid = f"; besides these runs: {', '.join(besides)}" if besides else ""
    return f"{', '.join(grid.requested['model'].unique())}: {progress}{off_grid}."


def _notes(
    rows: Sequence[Row], paper: Paper, failures: Sequence[str], errors: Sequence[str]
) -> str:
    """The metrics, the runs left out, the paper's tables and unreadable files, a line for each."""
    metrics = sorted({(row.task, row.metric) for row in rows if row.done})
    scores = ", ".join(f"{task} {metric}" for task, metric in metrics)
    notes = [
        *([f"Scores: {scores}."] if metrics else []),
        *map(sentence, failures),
        *(f"Paper: {source}." for source in paper.sources),
        *(f"Not read: {error}." for error in errors),
    ]
    return "  \n".join(notes)
