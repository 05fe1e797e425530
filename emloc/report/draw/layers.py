"""Compression of each layer by its depth: rank, energy lost, and spectrum."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecBase
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from emloc.report.draw.drawing import Drawing
from emloc.report.draw.labels import format_name
from emloc.report.draw.series import RATIO
from emloc.report.draw.sheet import add_legend, percent
from emloc.report.draw.style import COLUMN, KINDS, PAGE
from emloc.report.rows import Row
from emloc.report.rows.run_files import read_run_file

RUNS = 3  # figures of a report; a sweep has hundreds of runs
# Layers in the order in which a block computes them. Others follow.
_ORDER = ("q", "k", "v", "qkv", "o", "projection", "gate", "up", "gate_up", "down", "fc1", "fc2")
_FLOOR = 1e-8  # share of energy that is only rounding error


@dataclass(frozen=True)
class Layer:
    """One factorised linear."""

    tower: str  # name of the layer up to the number of its block
    block: int
    kind: str  # q, k, v, o, gate, up, down, ...
    rank: int
    lost: float  # share of the output energy that the emulator loses
    index: tuple[int, ...]  # recorded directions of the spectrum, 1 is the strongest
    share: tuple[float, ...]  # share of the output energy in each recorded direction
    directions: int  # number of all directions; 0 without a spectrum


def layers_of(table: Mapping[str, Any]) -> list[Layer]:
    """Return the layers of a `layers.json` that have a rank, by depth."""
    layers = []
    for name, facts in table.items():
        parts = split_layer_name(name)
        if parts and isinstance(facts, dict) and {"rank", "kept"} <= facts.keys():
            tower, block, kind = parts
            spectrum = facts.get("spectrum", {})
            total = spectrum.get("total") or 1.0
            layers.append(
                Layer(
                    tower=tower,
                    block=block,
                    kind=kind,
                    rank=facts["rank"],
                    lost=max(0.0, round(1 - facts["kept"], 12)),
                    index=tuple(spectrum.get("index", ())),
                    share=tuple(energy / total for energy in spectrum.get("energy", ())),
                    directions=spectrum.get("directions", 0),
                )
            )
    return sorted(layers, key=lambda layer: layer.block)


def split_layer_name(name: str) -> tuple[str, int, str] | None:
    """Return tower, block and kind of a layer; None for a layer outside the blocks."""
    parts = re.fullmatch(r"(.*?)\.(\d+)\.(?:.*\.)?(\w+)", name)
    if parts is None:
        return None
    return parts[1], int(parts[2]), parts[3].removesuffix("_proj").removesuffix("_layer")


def tower_name(tower: str) -> str:
    """Return what a tower is called in titles."""
    return "vision" if "vision" in tower else "language"


def draw(rows: Sequence[Row], place: Path, columns: int) -> Mapping[str, Drawing]:
    """Return `layers_<run>` -> figure of one run for each model, task and size, at most `RUNS`.

    A model with two towers has two figures, since language and vision have different layers.
    """
    drawings: dict[str, Drawing] = {}
    for row, layers in _select_runs(rows, place):
        towers = list(dict.fromkeys(layer.tower for layer in layers))
        for tower in towers:
            name = tower_name(tower)
            stem = f"layers_{row.run}" + (f"_{name}" if len(towers) > 1 else "")
            parts = [row.cell or row.named_method, _size(row), row.model]
            parts += [f"{name} tower"] if len(towers) > 1 else []
            title = ", ".join(filter(None, parts))
            members = [layer for layer in layers if layer.tower == tower]
            figure = _figure(members, title, columns)
            drawings[stem] = Drawing(figure, _caption(members, title), _records(members))
    return drawings


def _select_runs(rows: Sequence[Row], place: Path) -> list[tuple[Row, list[Layer]]]:
    """Return the first run of each model, task and size; a run with spectra is preferred."""
    runs: dict[tuple[str, ...], tuple[Row, list[Layer]]] = {}
    for row in rows:
        layers = layers_of(json.loads(read_run_file(place, row, "layers.json") or "{}"))
        if layers:
            size = row.settings.get(RATIO, ""), format_name(row.settings)
            key = (row.model, row.task, *size)
            if key not in runs or (_has_spectra(layers) and not _has_spectra(runs[key][1])):
                runs[key] = (row, layers)
    return list(runs.values())[:RUNS]


def _has_spectra(layers: Sequence[Layer]) -> bool:
    return any(layer.directions for layer in layers)


def _size(row: Row) -> str:
    ratio = row.settings.get(RATIO, "null")
    share = "" if ratio == "null" else f"{float(ratio):.0%} of parameters"
    packed = format_name(row.settings)
    return share + (f" in {packed}" if packed else "")


def kinds_of(layers: Sequence[Layer]) -> list[str]:
    """Return the kinds of layers in the order in which a block computes them."""
    kinds = dict.fromkeys(layer.kind for layer in layers)
    return sorted(kinds, key=lambda kind: _ORDER.index(kind) if kind in _ORDER else len(_ORDER))


def _caption(layers: Sequence[Layer], title: str) -> str:
    sentences = [
        f"Compression of each layer ({title}): the rank that the emulator keeps,",
        "and the share of the layer's output energy that it loses, by block.",
    ]
    if _has_spectra(layers):
        sentences.append(
            "Below, the share of the output energy in each direction, from the strongest to the "
            "weakest, a line for each block; dots mark the rank kept."
        )
    return " ".join(sentences)


def _records(layers: Sequence[Layer]) -> list[dict[str, object]]:
    return [
        {
            "block": layer.block,
            "kind": layer.kind,
            "rank": layer.rank,
            "output energy lost": layer.lost,
        }
        for layer in layers
    ]


def _figure(layers: Sequence[Layer], title: str, columns: int) -> Figure:
    kinds = kinds_of(layers)
    below = -(-len(kinds) // (2 * columns)) if _has_spectra(layers) else 0
    above = 2 // columns
    heights = [2.1 * above, 1.45 * below] if below else [2.1 * above]
    width = PAGE if columns == 2 else COLUMN
    figure = Figure((width, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    parts = grid[0].subgridspec(above, columns)
    rank, lost = (figure.add_subplot(parts[divmod(at, columns)]) for at in range(2))
    lost.set_yscale("log")
    for at, kind in enumerate(kinds):
        members = [layer for layer in layers if layer.kind == kind]
        blocks = [layer.block for layer in members]
        colour, marker = KINDS[at % len(KINDS)]
        # Several kinds have the same rank: later markers are smaller, so that all are seen.
        size = 4.5 - 2.5 * at / len(kinds)
        ranks = [layer.rank for layer in members]
        rank.plot(blocks, ranks, color=colour, marker=marker, markersize=size, linewidth=size / 3)
        share = [layer.lost or math.nan for layer in members]
        lost.plot(blocks, share, color=colour, marker=marker, markersize=3, linewidth=1, label=kind)
    rank.set(xlabel="block", ylabel="rank kept", ylim=(0, 1.1 * max(one.rank for one in layers)))
    lost.set(xlabel="block", ylabel="output energy lost")
    low, high = lost.get_ylim()
    lost.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    lost.yaxis.set_minor_formatter(NullFormatter())
    percent(lost.yaxis)
    for axes in (rank, lost):
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if below:
        _draw_spectra(figure, grid[1].subgridspec(below, 2 * columns), layers, kinds)
    add_legend(figure, "dots: the rank kept" if below else "", title=title)
    return figure


def _draw_spectra(
    figure: Figure, grid: GridSpecBase, layers: Sequence[Layer], kinds: Sequence[str]
) -> None:
    """Draw a panel for each kind: the share of output energy of every direction, by block."""
    depth = ScalarMappable(Normalize(0, max(layer.block for layer in layers) or 1), "viridis")
    columns = grid.ncols
    panels: list[Axes] = []
    for at, kind in enumerate(kinds):
        first = panels[0] if panels else None
        axes = figure.add_subplot(grid[divmod(at, columns)], sharex=first, sharey=first)
        panels.append(axes)
        for layer in layers:
            if layer.kind == kind and layer.directions:
                _draw_spectrum(axes, layer, depth.to_rgba(np.array([layer.block]))[0])
        axes.set_title(kind, pad=3)
        axes.tick_params(labelleft=at % columns == 0, labelbottom=at + columns >= len(kinds))
        axes.set_ylabel("share of energy" if at % columns == 0 else "")
        axes.set_xlabel("share of directions" if at // columns == grid.nrows - 1 else "")
    axes = panels[0]
    axes.set(xscale="log", yscale="log")
    axes.set_ylim(bottom=max(_FLOOR, axes.get_ylim()[0]))
    axes.xaxis.set_minor_formatter(NullFormatter())
    percent(axes.xaxis)
    bar = figure.colorbar(depth, ax=panels, label="block", aspect=40, pad=0.01)
    bar.locator = MaxNLocator(8, integer=True)
    bar.update_ticks()


def _draw_spectrum(axes: Axes, layer: Layer, colour: Any) -> None:
    """Draw one line, with a dot at the rank kept."""
    x = np.array(layer.index) / layer.directions
    y = np.array([share if share > _FLOOR else np.nan for share in layer.share])
    axes.plot(x, y, color=colour, linewidth=0.8)
    solid = ~np.isnan(y)
    if solid.any():
        at = layer.rank / layer.directions
        height = np.exp(np.interp(np.log(at), np.log(x[solid]), np.log(y[solid])))
        axes.plot([at], [height], "o", color=colour, markersize=2.5, label="_rank")
