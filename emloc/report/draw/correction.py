"""What the correction did to each layer: its size, what the clamp shortened, the residual."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from emloc.report.draw.drawing import Drawing
from emloc.report.draw.layers import split_layer_name, tower_name
from emloc.report.draw.series import Series, series
from emloc.report.draw.sheet import add_legend, panel_grid, percent
from emloc.report.draw.style import BLACK, FADED, GREY, Style, line_styles
from emloc.report.rows import Row
from emloc.report.rows.run_files import read_run_file

LINES = 8  # corrected methods or cells in one figure

Measure = Callable[[Mapping[str, Any]], float | None]


@dataclass(frozen=True)
class CorrectedLayer:
    """One layer of a run, with what `correction.json` says of it."""

    label: str  # of the method or cell
    method: str
    run: str
    name: str
    tower: str
    block: int
    facts: Mapping[str, Any]


def draw(rows: Sequence[Row], place: Path, columns: int) -> Mapping[str, Drawing]:
    """Return `correction_<model>_<task>` -> figure, a line for each corrected method or cell.

    A model with two towers has two figures, since language and vision have different layers.
    """
    drawings = {}
    for model, task in dict.fromkeys((row.model, row.task) for row in rows):
        layers = _layers([row for row in rows if (row.model, row.task) == (model, task)], place)
        towers = list(dict.fromkeys(layer.tower for layer in layers))
        for tower in towers:
            members = [layer for layer in layers if layer.tower == tower]
            name = f"_{tower_name(tower)}" if len(towers) > 1 else ""
            figure = _figure(members, f"{model} on {task}{name.replace('_', ', ')}", columns)
            drawing = Drawing(figure, _caption(members), _records(members))
            drawings[f"correction_{model}_{task}{name}"] = drawing
    return drawings


def _layers(rows: Sequence[Row], place: Path) -> list[CorrectedLayer]:
    """Return the layers of the first corrected run of each line."""
    by_line = (_layers_of_line(line, place) for line in series(rows))
    corrected = (layers for layers in by_line if layers)
    return [layer for layers in islice(corrected, LINES) for layer in layers]


def _layers_of_line(line: Series, place: Path) -> list[CorrectedLayer]:
    """Return the layers of the first corrected run of a line; none if no run was corrected."""
    for row in line.rows:
        table = json.loads(read_run_file(place, row, "correction.json") or "{}")
        layers = [
            CorrectedLayer(line.label, line.method, row.run, name, *parts[:2], facts)
            for name, facts in table.items()
            if isinstance(facts, dict) and {"clamped", "mismatch_before"} <= facts.keys()
            if (parts := split_layer_name(name))
        ]
        if layers:
            return layers
    return []


def _figure(layers: Sequence[CorrectedLayer], title: str, columns: int) -> Figure:
    styles = line_styles((layer.label, layer.method, False) for layer in layers)
    figure, (size, clamped, residual, removed) = panel_grid(4, columns, height=1.9)
    for axes, title_of_panel, label in (
        (size, "size of the correction beside the LoRA's", "correction / LoRA"),
        (clamped, "directions that the clamp shortened", "share of directions"),
        (residual, "residual, before and after", "energy"),
        (removed, "residual that the correction removed", "share of energy"),
    ):
        axes.set(title=title_of_panel, xlabel="block", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for axes in (size, residual, removed):
        axes.set_yscale("log")
    for label, style in styles.items():
        members = [layer for layer in layers if layer.label == label]
        _draw_blocks(size, members, lambda facts: facts["ratio"], style, label=label)
        _draw_blocks(clamped, members, lambda facts: facts["clamped"], style)
        _draw_blocks(residual, members, lambda facts: facts["mismatch_after"], style)
        before = style._replace(colour=BLACK, dash=":")
        _draw_blocks(residual, members, lambda facts: facts["mismatch_before"], before, band=False)
        _draw_blocks(removed, members, _share_removed, style)
    residual.plot([], [], color=BLACK, linestyle=":", label="before the correction")
    size.axhline(1, color=GREY, linestyle="--", label="as large as the LoRA", zorder=1)
    clamped.set_ylim(-0.03, 1.03)
    for axes in (clamped, removed):
        percent(axes.yaxis)
    for axes in (size, residual, removed):
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    add_legend(figure, "line: median of the layers of a block; band: all of them", title=title)
    return figure


def _share_removed(facts: Mapping[str, Any]) -> float | None:
    before = facts["mismatch_before"]
    return 1 - facts["mismatch_after"] / before if before > 0 else None


def _draw_blocks(
    axes: Axes,
    layers: Sequence[CorrectedLayer],
    measure: Measure,
    style: Style,
    *,
    label: str | None = None,
    band: bool = True,
) -> None:
    """Draw the median over the layers of each block, and the band from smallest to largest."""
    values: dict[int, list[float]] = {}
    for layer in layers:
        if (value := measure(layer.facts)) is not None:
            values.setdefault(layer.block, []).append(value)
    blocks = sorted(values)
    medians = [statistics.median(values[block]) for block in blocks]
    dot: dict[str, Any] = {"marker": "o", "markersize": 2} if len(blocks) == 1 else {}
    axes.plot(blocks, medians, label=label, color=style.colour, linestyle=style.dash, **dot)
    if not band:
        return
    low, high = ([end(values[block]) for block in blocks] for end in (min, max))
    axes.fill_between(blocks, low, high, color=style.colour, alpha=FADED, linewidth=0)


def _caption(layers: Sequence[CorrectedLayer]) -> str:
    sentences = [
        "What the correction did, by block of the model: its size beside the LoRA's before the "
        "clamp, the share of directions that the clamp shortened, and the energy of the residual "
        "(the original with the adapter less the emulator with it) before and after."
    ]
    for label in dict.fromkeys(layer.label for layer in layers):
        own = [layer.facts for layer in layers if layer.label == label]
        directions = sum(facts["directions"] for facts in own) or 1
        clamped = sum(facts["clamped"] * facts["directions"] for facts in own) / directions
        shares = [share for facts in own if (share := _share_removed(facts)) is not None]
        removed = statistics.mean(shares) if shares else 0.0
        sentences.append(
            f"{label}: the clamp shortened {clamped:.0%} of the directions, the correction "
            f"removed {removed:.1%} of the residual (mean of {len(own)} layers)."
        )
    return " ".join(sentences)


def _records(layers: Sequence[CorrectedLayer]) -> list[dict[str, object]]:
    return [
        {"label": layer.label, "run": layer.run, "layer": layer.name, **layer.facts}
        for layer in layers
    ]
