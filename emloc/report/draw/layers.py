"""What an emulator kept of each layer, by depth: rank, energy lost, and spectrum."""

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

from emloc.report.draw.labels import format_name
from emloc.report.draw.series import RATIO
from emloc.report.draw.sheet import finish, percent
from emloc.report.draw.style import KINDS, PAGE
from emloc.report.rows import Row

RUNS = 3  # of a report, or a sweep would be a hundred figures
# As a block computes them; others follow in their order.
_ORDER = ("q", "k", "v", "qkv", "o", "projection", "gate", "up", "gate_up", "down", "fc1", "fc2")
_COLUMNS = 4
_FLOOR = 1e-8  # share of energy below which a direction holds nothing but rounding


@dataclass(frozen=True)
class Layer:
    """One factorised linear."""

    tower: str  # what it is a layer of: the name up to the number of its block
    block: int
    kind: str  # q, k, v, o, gate, up, down, ...
    rank: int
    lost: float  # share of the output energy
    index: tuple[int, ...]  # directions whose share of it is known, 1 the strongest
    share: tuple[float, ...]
    directions: int  # how many there are; 0 where no spectrum was recorded


def layers_of(table: Mapping[str, Any]) -> list[Layer]:
    """The layers of a `layers.json` that have a rank, by depth."""
    found = []
    for name, facts in table.items():
        parts = re.fullmatch(r"(.*?)\.(\d+)\.(?:.*\.)?(\w+)", name)
        if parts and isinstance(facts, dict) and {"rank", "kept"} <= facts.keys():
            kind = parts[3].removesuffix("_proj").removesuffix("_layer")
            spectrum = facts.get("spectrum", {})
            total = spectrum.get("total") or 1.0
            found.append(
                Layer(
                    tower=parts[1],
                    block=int(parts[2]),
                    kind=kind,
                    rank=facts["rank"],
                    lost=max(0.0, round(1 - facts["kept"], 12)),
                    index=tuple(spectrum.get("index", ())),
                    share=tuple(energy / total for energy in spectrum.get("energy", ())),
                    directions=spectrum.get("directions", 0),
                )
            )
    return sorted(found, key=lambda layer: layer.block)


def draw(rows: Sequence[Row], place: Path) -> Mapping[str, Figure]:
    """`layers_<run>` -> figure, of one run for each model, task and size, and `RUNS` at most.

    A model of two towers is two figures, as language and vision have other layers.
    """
    found: dict[str, Figure] = {}
    for row, layers in _chosen(rows, place):
        towers = list(dict.fromkeys(layer.tower for layer in layers))
        for tower in towers:
            name = "vision" if "vision" in tower else "language"
            stem = f"layers_{row.run}" + (f"_{name}" if len(towers) > 1 else "")
            title = f"{row.cell or row.method}, {_size(row)}, {row.model}"
            title += f", {name} tower" if len(towers) > 1 else ""
            found[stem] = _figure([one for one in layers if one.tower == tower], title)
    return found


def _chosen(rows: Sequence[Row], place: Path) -> list[tuple[Row, list[Layer]]]:
    """The first of each model, task and size, those with spectra before those without."""
    found: dict[tuple[str, ...], tuple[Row, list[Layer]]] = {}
    for row in rows:
        folder = place if (place / "status.json").exists() else place / row.run
        path = folder / "layers.json"
        if row.done and path.exists() and (layers := layers_of(json.loads(path.read_text()))):
            held = row.settings.get(RATIO, ""), format_name(row.settings)
            size = (row.model, row.task, *held)
            before = found.get(size)
            if before is None or (_has_spectra(layers) and not _has_spectra(before[1])):
                found[size] = (row, layers)
    return list(found.values())[:RUNS]


def _has_spectra(layers: Sequence[Layer]) -> bool:
    return any(layer.directions for layer in layers)


def _size(row: Row) -> str:
    ratio = row.settings.get(RATIO, "null")
    share = "" if ratio == "null" else f"{float(ratio):.0%} of parameters"
    packed = format_name(row.settings)
    return share + (f" in {packed}" if packed else "")


def kinds_of(layers: Sequence[Layer]) -> list[str]:
    """The kinds of layers in the order in which a block computes them."""
    found = dict.fromkeys(layer.kind for layer in layers)
    return sorted(found, key=lambda kind: _ORDER.index(kind) if kind in _ORDER else len(_ORDER))


def _figure(layers: Sequence[Layer], title: str) -> Figure:
    kinds = kinds_of(layers)
    below = -(-len(kinds) // _COLUMNS) if _has_spectra(layers) else 0
    heights = [2.1, 1.45 * below] if below else [2.1]
    figure = Figure((PAGE, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    halves = grid[0].subgridspec(1, 2)
    rank, lost = figure.add_subplot(halves[0]), figure.add_subplot(halves[1])
    lost.set_yscale("log")
    for at, kind in enumerate(kinds):
        some = [layer for layer in layers if layer.kind == kind]
        blocks = [layer.block for layer in some]
        colour, marker = KINDS[at % len(KINDS)]
        marks: dict[str, Any] = {"color": colour, "marker": marker}
        # Many kinds have the same rank: the later ones lie within the earlier.
        size = 4.5 - 2.5 * at / len(kinds)
        rank.plot(blocks, [one.rank for one in some], markersize=size, linewidth=size / 3, **marks)
        share = [one.lost or math.nan for one in some]
        lost.plot(blocks, share, markersize=3, linewidth=1, label=kind, **marks)
    rank.set(xlabel="block", ylabel="rank kept", ylim=(0, 1.1 * max(one.rank for one in layers)))
    lost.set(xlabel="block", ylabel="output energy lost")
    low, high = lost.get_ylim()
    lost.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    lost.yaxis.set_minor_formatter(NullFormatter())
    percent(lost.yaxis)
    for axes in (rank, lost):
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if below:
        _spectra(figure, grid[1].subgridspec(below, _COLUMNS), layers, kinds)
    finish(figure, "dots: the rank kept" if below else "", title=title)
    return figure


def _spectra(
    figure: Figure, grid: GridSpecBase, layers: Sequence[Layer], kinds: Sequence[str]
) -> None:
    """A panel for each kind: share of the output energy of every direction, a line a block."""
    depth = ScalarMappable(Normalize(0, max(layer.block for layer in layers) or 1), "viridis")
    places: list[Axes] = []
    for at, kind in enumerate(kinds):
        first = places[0] if places else None
        axes = figure.add_subplot(grid[divmod(at, _COLUMNS)], sharex=first, sharey=first)
        places.append(axes)
        for layer in layers:
            if layer.kind == kind and layer.directions:
                _spectrum(axes, layer, depth.to_rgba(np.array([layer.block]))[0])
        lowest = at + _COLUMNS >= len(kinds)
        axes.set_title(kind, pad=3)
        axes.tick_params(labelleft=at % _COLUMNS == 0, labelbottom=lowest)
        axes.set_ylabel("share of energy" if at % _COLUMNS == 0 else "")
        axes.set_xlabel("share of directions" if at // _COLUMNS == grid.nrows - 1 else "")
    axes = places[0]
    axes.set(xscale="log", yscale="log")
    axes.set_ylim(bottom=max(_FLOOR, axes.get_ylim()[0]))
    axes.xaxis.set_minor_formatter(NullFormatter())
    percent(axes.xaxis)
    bar = figure.colorbar(depth, ax=places, label="block", aspect=40, pad=0.01)
    bar.locator = MaxNLocator(8, integer=True)
    bar.update_ticks()


def _spectrum(axes: Axes, layer: Layer, colour: Any) -> None:
    """One line, with a dot at the rank kept."""
    x = np.array(layer.index) / layer.directions
    y = np.array([share if share > _FLOOR else np.nan for share in layer.share])
    axes.plot(x, y, color=colour, linewidth=0.8)
    solid = ~np.isnan(y)
    if solid.any():
        at = layer.rank / layer.directions
        height = np.exp(np.interp(np.log(at), np.log(x[solid]), np.log(y[solid])))
        axes.plot([at], [height], "o", color=colour, markersize=2.5, label="_rank")
