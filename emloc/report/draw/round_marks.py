"""Marks on a training curve: the original's loss at the rounds of a training with anchors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from emloc.report.draw.series import Value
from emloc.report.draw.style import Style
from emloc.report.rows import Row
from emloc.report.rows.run_files import read_run_file

ROUNDS_FILE = "anchors.jsonl"  # in the folder of a run: a line for each pass of the original
ORIGINAL = (
    "Markers are the loss of the original with the adapter, on rows that are not trained on, "
    "between the rounds of a training with anchors."
)
REJECTED = "A cross is a round that has raised this loss and was undone."
_ABOVE_LINES = 3
_SIZE = 4.5  # points


@dataclass(frozen=True)
class RoundMark:
    """The original's loss at the end of a round, over the seeds; a rejected round has one seed."""

    step: int
    loss: Value
    is_rejected: bool
    seeds: int = 1


def round_marks(place: Path, rows: Sequence[Row]) -> list[RoundMark]:
    """Return the marks of runs that differ in the seed alone; none if they have no anchors.

    A mark is the mean over seeds, at the steps at which all seeds have a loss. Rejected rounds are
    marked one by one, since the others do not end there with the same state.
    """
    losses: list[dict[int, float]] = []
    rejections: list[RoundMark] = []
    for row in rows:
        lines = map(json.loads, read_run_file(place, row, ROUNDS_FILE).splitlines())
        finite = [line for line in lines if math.isfinite(line.get("original_loss", math.nan))]
        rejections += [
            RoundMark(line["step"], Value.over([line["original_loss"]]), True)
            for line in finite
            if line.get("rejected")
        ]
        losses.append(
            {line["step"]: line["original_loss"] for line in finite if not line.get("rejected")}
        )
    means = [
        RoundMark(
            step, Value.over([one[step] for one in losses]), is_rejected=False, seeds=len(rows)
        )
        for step in losses[0]
        if all(step in one for one in losses)
    ]
    return [*means, *rejections]


def draw_round_marks(axes: Axes, marks: Sequence[RoundMark], style: Style) -> None:
    """Draw accepted rounds with the marker of their method, and rejected ones as crosses."""
    for is_rejected, marker in ((False, style.marker), (True, "x")):
        some = [mark for mark in marks if mark.is_rejected == is_rejected]
        if some:
            axes.errorbar(
                [mark.step for mark in some],
                [mark.loss.mean for mark in some],
                [mark.loss.spread for mark in some] if any(m.loss.spread for m in some) else None,
                fmt=marker,
                color=style.colour,
                markersize=_SIZE,
                markeredgecolor=style.colour if is_rejected else "white",
                markeredgewidth=1.2 if is_rejected else 0.5,
                elinewidth=0.8,
                label="_rejected" if is_rejected else "_original",
                zorder=_ABOVE_LINES,
            )


def round_records(marks: Sequence[RoundMark]) -> list[dict[str, object]]:
    """Return a record of each mark."""
    return [
        {
            "step": mark.step,
            "loss of the original (nats)": mark.loss.mean,
            "standard deviation": mark.loss.spread,
            "seeds": mark.seeds,
            "rejected": "yes" if mark.is_rejected else "no",
        }
        for mark in marks
    ]
