"""Everything there is to say about a folder of runs, written into another."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emloc.config.experiments import Experiment, experiment
from emloc.config.paths import EXPERIMENTS
from emloc.report.figures import drawings, save, save_records
from emloc.report.glossary import column_meanings
from emloc.report.grid_rows import Placed
from emloc.report.latex import latex
from emloc.report.markdown import is_run, markdown, notes
from emloc.report.origin import origin
from emloc.report.page import FIGURES, NARROW, PageFigure, Report, Section, page
from emloc.report.paper import QUANTITIES, Paper, paper_of
from emloc.report.rows import Row, write_rows
from emloc.report.run_table import table_of
from emloc.report.summary import summary
from emloc.report.table import Table
from emloc.report.task_table import READ, pivot

if TYPE_CHECKING:
    from emloc.report.draw.drawing import Drawing

_CSS_PIXELS = 140  # of an inch of a figure, whose text is then as large as the page's


@dataclass(frozen=True)
class _Part:
    """A table as it is in the Markdown and LaTeX files of its name, and on the page."""

    name: str
    caption: str
    shown: Table
    notes: Sequence[str]


def write_report(place: Path, rows: Sequence[Row], to: Path) -> list[Path]:
    """Write tables, figures and their page into `to`, and return the files.

    `table`: a line for each method or cell, as Markdown, LaTeX and CSV. `by_task_score`: a
    column for each task, where an experiment has several. `runs.csv`: all numbers of each run.

    Args:
        place: a folder of runs, one run, or a file of rows.
        rows: what `rows_of(place)` gave, at least one.
        to: a folder, made if it is not there.
    """
    paper = paper_of([row.experiment for row in rows], EXPERIMENTS)
    shown = table_of(rows, paper, unrun=not is_run(place))
    made = origin(place, rows)
    asked = _asked(made["experiments"])
    parts = [
        *_by_task(asked, rows, paper),
        _Part("table", "Runs", shown, notes(shown, rows, paper)),
    ]
    to.mkdir(parents=True, exist_ok=True)
    drawn = drawings(rows, place)
    saved = _save_figures(drawn, drawings(rows, place, columns=1), to)
    report = Report(
        title=", ".join(made["experiments"]),
        lead=[*([asked.about] if asked else []), summary(rows, made, place)],
        sections=[_section(part) for part in parts],
        meanings=column_meanings(shown.columns, rows),
        figures=_page_figures(drawn),
        origin=made,
    )
    texts = {f"{part.name}.md": _markdown(part) for part in parts}
    texts |= {f"{part.name}.tex": latex(part.shown, part.notes) for part in parts}
    texts |= {"provenance.json": json.dumps(made, indent=1) + "\n", "report.html": page(report)}
    for name, text in texts.items():
        (to / name).write_text(text, encoding="utf-8")
    write_rows(rows, to / "runs.csv")
    _write_words(shown, to / "table.csv")
    return [*(to / name for name in (*texts, "runs.csv", "table.csv")), *saved]


def _markdown(part: _Part) -> str:
    notes = [f"* {note}" for note in part.notes]
    return "\n".join([markdown(part.shown, bold=True), "", *notes, ""])


def _asked(names: Sequence[str]) -> Experiment | None:
    """The experiment that all runs are of, if they are of one that is known."""
    files = [EXPERIMENTS / f"{name}.yaml" for name in names]
    return experiment(files[0]) if len(files) == 1 and files[0].exists() else None


def _by_task(asked: Experiment | None, rows: Sequence[Row], paper: Paper) -> list[_Part]:
    """Scores, or what the paper has instead, as a paper prints them; of runs on several tasks."""
    if asked is None or len({(row.model, row.task) for row in rows}) == 1:
        return []
    placed = Placed(asked, rows)
    quantities = [QUANTITIES[name] for name in paper.quantities or ["score"]]
    return [
        _Part(f"by_task_{each.name}", f"{each.head} by task", pivot(placed, paper, each), [READ])
        for each in quantities
    ]


def _section(part: _Part) -> Section:
    files = [f"{part.name}.md", f"{part.name}.tex"]
    files += ["table.csv", "runs.csv"] if part.name == "table" else []
    return Section(part.caption, part.shown, part.notes, files)


def _save_figures(
    drawn: Mapping[str, Drawing], narrow: Mapping[str, Drawing], to: Path
) -> list[Path]:
    """Write each figure with its numbers, and once more for narrow screens."""
    figures, narrow_figures = (
        {stem: one.figure for stem, one in some.items()} for some in (drawn, narrow)
    )
    return [
        *save(figures, to / FIGURES, ("svg", "png", "pdf")),
        *save_records(drawn, to / FIGURES),
        *save(narrow_figures, to / NARROW, ("svg",)),
    ]


def _page_figures(drawn: Mapping[str, Drawing]) -> list[PageFigure]:
    figures = []
    for stem, one in drawn.items():
        width, height = (round(_CSS_PIXELS * inches) for inches in one.figure.get_size_inches())
        figures.append(PageFigure(stem, one.caption, one.alt, width, height))
    return figures


def _write_words(shown: Table, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([shown.columns, *shown.words()])
