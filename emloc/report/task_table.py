"""An experiment as a paper prints it: a line for each label of its grid, a column for each task."""

from __future__ import annotations

import pandas as pd

from emloc.report.grid import COLUMN, LINE_MODEL, POINT, Grid, tuples
from emloc.report.groups import group_numbers
from emloc.report.notes import left_out
from emloc.report.paper import KEYS, Paper, Quantity
from emloc.report.table import EMPTY, Table, best

HOW_TO_READ = (
    "mean ± standard deviation over seeds, [2/3] where seeds are missing, then the paper's number "
    "in brackets; scores in percent, the best of ours in bold; empty: no result"
)


def task_table(grid: Grid, paper: Paper, quantity: Quantity) -> tuple[Table, list[str]]:
    """Our number of each line and task, then the paper's in brackets; the best of ours stands out.

    `[2/3]` counts the seeds that are done and those that the grid requests. A line whose runs have
    no result is left out, unless the paper has a number for it.

    Returns:
        The table, and a note on the runs of lines without a result.

    Raises:
        ConfigError: the paper has two numbers for one line and task.
    """
    paper = Paper([number for number in paper.numbers if number.quantity == quantity.name])
    runs = _with_words(grid, quantity)
    points = pd.concat([grid.requested, _absent(grid, paper), runs], ignore_index=True)
    numbers = [paper.find(quantity.name, facts) for facts in _facts(grid, points)]
    points["number"] = [f"({number.word})" if number else EMPTY for number in numbers]
    heads = list(points[COLUMN].unique())
    of_line = [*grid.keys, LINE_MODEL]
    names = [*of_line, *grid.extra_keys]
    lines = points[of_line].drop_duplicates().merge(runs[names].drop_duplicates(), how="left")
    lines = lines.fillna(EMPTY)

    def pivot(cells: pd.DataFrame, index: list[str], word: str) -> pd.DataFrame:
        """The words of cells in all lines and columns; words of one cell are joined."""
        cells = cells[cells[word].ne(EMPTY)].drop_duplicates([*index, COLUMN, word])
        table = cells.pivot_table(word, index, COLUMN, aggfunc="; ".join, fill_value=EMPTY)
        every = pd.MultiIndex.from_frame(lines[index])
        return table.reindex(index=every, columns=heads, fill_value=EMPTY).set_axis(lines.index)

    has_result = runs["done"].groupby(tuples(runs, names)).transform("any").astype(bool)
    theirs = pivot(points.drop_duplicates([*of_line, COLUMN]), of_line, "number")
    if quantity.name == "score":  # a score of another metric is not held against the paper's
        theirs = theirs.where(pivot(runs[~runs["headline"]], names, "word").eq(EMPTY), EMPTY)
    numbers_first = runs[has_result].sort_values("done", ascending=False, kind="stable")
    words = (pivot(numbers_first, names, "word") + " " + theirs).map(str.strip)
    has_failed = tuples(lines, names).isin(tuples(runs[~has_result], names))
    labels = lines[names].rename(columns={LINE_MODEL: "model"})
    if len({*grid.requested["model"]}) == 1 or lines[LINE_MODEL].eq(EMPTY).all():
        labels = labels.drop(columns="model")
    frame = labels.join(words)[words.ne(EMPTY).any(axis=1) | ~has_failed].reset_index(drop=True)
    scores = heads if quantity.name == "score" else []
    failures = [row for row, has in zip(grid.rows, has_result, strict=True) if not has]
    table = Table(frame, best(frame, [EMPTY] * len(frame), dict.fromkeys(scores, True)))
    return table, left_out(failures)


def _with_words(grid: Grid, quantity: Quantity) -> pd.DataFrame:
    """The runs, each with the word of all runs that differ from it in the seed alone."""
    runs = grid.runs.assign(
        done=pd.Series([row.done for row in grid.rows], dtype=bool),
        headline=pd.Series([row.headline for row in grid.rows], dtype=bool),
    )
    seeds = dict(grid.requested.groupby(POINT)["seed"].nunique())
    # The grid does not say how many seeds it requests of each of several extra settings.
    variants = tuples(runs, grid.extra_keys).groupby(runs[POINT]).transform("nunique")
    groups = group_numbers(grid.rows)
    words = []
    for index, point in enumerate(runs[POINT]):
        rows = [grid.rows[i] for i in groups.index[groups == groups[index]]]
        requested = seeds.get(point, 0) if variants[index] == 1 else 0
        missing = f" [{len(rows)}/{requested}]" if len(rows) < requested else EMPTY
        word = quantity.word(rows)
        words.append(word and f"{word}{missing}" if rows[0].done else rows[0].state)
    return runs.assign(word=words)


def _facts(grid: Grid, points: pd.DataFrame) -> list[dict[str, str]]:
    """The facts of each point that a number of the paper may name."""
    return points[list(KEYS)].assign(experiment=grid.experiment.name).to_dict("records")


def _absent(grid: Grid, paper: Paper) -> pd.DataFrame:
    """The points of which only the paper has numbers."""
    facts = _facts(grid, pd.concat([grid.requested, grid.runs]))
    requested = dict.fromkeys(tuples(grid.requested, ["model", "task"]))
    empty = dict.fromkeys([*grid.keys, *KEYS], EMPTY)
    absent = []
    for number in paper.numbers:
        if not any(map(number.about, facts)):
            line = {**empty, "cell": number.keys.get("method", EMPTY), **number.keys}
            tasks = [task for model, task in requested if model == line["model"]]
            named = [line["task"]] if line["task"] else tasks or [EMPTY]
            absent += [line | {"task": task} for task in named]
    return grid.placed(pd.DataFrame(absent, columns=list(empty)))
