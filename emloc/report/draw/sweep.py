"""A score against a setting: a line for each method, and the references across the panel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from emloc.config.settings import PARTS
from emloc.report.draw.drawing import Drawing, numbered_pages
from emloc.report.draw.markers import HOLLOW, MOVED, Marker, draw_markers
from emloc.report.draw.panels import Panel, panels
from emloc.report.draw.series import (
    RATIO,
    REFERENCES,
    ZERO_SHOT,
    Series,
    Value,
    is_uncompressed,
    number,
    series,
)
from emloc.report.draw.sheet import (
    LEGEND_LABELS,
    add_legend,
    note_of,
    page_slices,
    panel_grid,
    percent,
    settle_layout,
    wrapped,
)
from emloc.report.draw.style import FADED, Style, line_styles
from emloc.report.rows import Row

_LEAST = 3  # values of a setting that count as a sweep
_NAMES = {
    RATIO: "share of parameters kept",
    "calibration.samples": "calibration samples",
    "lora.rank": "LoRA rank",
    "anchor.guard": "rows that judge the rounds of an anchored training",
    "anchor.places": "places of the anchors",
    "anchor.rounds": "rounds of the anchored training",
    "recovery.clamp": "clamp of the correction",
    "recovery.strength": "strength of the correction",
    "train.learning_rate": "learning rate",
    "train.steps": "training steps",
}
_CHANGES_LORA = ("lora", "train")  # sections of settings that also change a LoRA on the original
_SWEPT = ("calibration", "compression", "lora", *PARTS, "train")
_DEPENDENT = {"lora.rank": "lora.alpha"}  # setting -> the one that usually follows it
_NONE = "null"
_TICKS = 9  # that are readable below an axis


@dataclass(frozen=True)
class Sweep:
    """Axes of one figure."""

    stem: str
    setting: str
    measure: str = "score"
    least: int = 2  # values that at least one line must have

    @property
    def name(self) -> str:
        """The setting in words."""
        return _NAMES.get(self.setting, self.setting)


@dataclass(frozen=True)
class SweepPanel:
    """One panel and the lines in it."""

    panel: Panel
    lines: Sequence[Series]
    sweep: Sweep

    @property
    def score_label(self) -> str:
        """Label of the vertical axis."""
        return self.panel.score_label(self.sweep.measure)


def sweeps(rows: Sequence[Row]) -> list[Sweep]:
    """Return every figure of this kind that these runs may have points for."""
    figures = [
        Sweep("score_ratio", RATIO),
        Sweep("gain_calibration", "calibration.samples", "gain_kept"),
    ]
    stems = {one.stem for one in figures}
    for name in _numeric_settings(rows):
        section, _, leaf = name.partition(".")
        stem = f"score_{leaf}" if f"score_{leaf}" not in stems else f"score_{section}_{leaf}"
        stems.add(stem)
        figures.append(Sweep(stem, name, least=_LEAST))
    return figures


def draw(rows: Sequence[Row], sweep: Sweep, columns: int) -> Mapping[str, Drawing]:
    """Return file stem -> page of panels, one for each model, task and recipe with a sweep."""
    dependent = dependent_settings(rows, sweep.setting)
    sweep_panels = []
    for panel in panels(rows, sweep.setting, dependent):
        lines = series(panel.rows, sweep.setting, dependent)
        if any(len(_values(line, sweep)) >= sweep.least for line in lines):
            relevant = [row for line in lines if _is_relevant(line, sweep) for row in line.rows]
            # Labels are computed again, because fewer lines need shorter labels.
            lines = series(relevant, sweep.setting, dependent)
            sweep_panels.append(SweepPanel(panel, lines, sweep))
    pages = [_page(sweep_panels[part], columns, rows) for part in page_slices(len(sweep_panels))]
    return numbered_pages(sweep.stem, pages)


def _page(sweep_panels: Sequence[SweepPanel], columns: int, rows: Sequence[Row]) -> Drawing:
    lines = [line for one in sweep_panels for line in one.lines]
    styles = line_styles((line.label, line.method, bool(line.packed)) for line in lines)
    figure, places = panel_grid(len(sweep_panels), columns, is_wide=len(styles) > LEGEND_LABELS)
    markers = []
    for one, axes in zip(sweep_panels, places, strict=True):
        axes.set(title=wrapped(one.panel.title), ylabel=one.score_label)
        markers.append(_draw_lines(axes, one, styles))
    order = sorted(styles, key=lambda label: (label in REFERENCES, label))
    add_legend(figure, note_of(rows, [line.packed for line in lines]), order)
    settle_layout(figure)
    moved = [draw_markers(*each, level=True) for each in zip(places, markers, strict=True)]
    return Drawing(
        figure,
        _caption(sweep_panels, any(moved)),
        [record for one in sweep_panels for record in _records(one)],
    )


def dependent_settings(rows: Sequence[Row], setting: str) -> tuple[str, ...]:
    """Return settings with one value for each value of this one: a LoRA's alpha for its rank."""
    other = _DEPENDENT.get(setting, "")
    pairs = {(row.settings.get(setting), row.settings.get(other)) for row in rows}
    return (other,) if other and len(pairs) == len({pair[0] for pair in pairs}) else ()


def positions(values: Sequence[str]) -> tuple[dict[str, float], bool]:
    """Return value -> position on the axis, and whether the axis is logarithmic.

    The axis is logarithmic where the values are spaced more evenly on it.

    Args:
        values: numbers, and `null` for "none", which stands last. On a logarithmic axis 0 stands
            one step before the smallest value.
    """
    numbers = sorted({float(value) for value in values if value != _NONE})
    logs = [math.log2(number) for number in numbers if number > 0]
    has_logs = bool(numbers) and (numbers[0] > 0 or (numbers[0] == 0 and len(logs) >= _LEAST))
    is_log = has_logs and _unevenness(logs) <= _unevenness(numbers) and logs[-1] - logs[0] >= 2
    places = {value: float(value) for value in values if value != _NONE}
    if is_log and numbers[0] == 0:
        zero = 2 ** (2 * logs[0] - logs[1])
        places |= {value: zero for value, place in places.items() if place == 0}
    if _NONE in values:
        before, last = [0.0, 1.0, *numbers][-2:]
        places[_NONE] = last * 2 if is_log else last + (last - before or 1.0)
    return places, is_log


def _unevenness(numbers: Sequence[float]) -> float:
    """Widest gap by narrowest gap."""
    gaps = [b - a for a, b in pairwise(numbers)]
    return max(gaps) / min(gaps) if gaps else 1.0


def _numeric_settings(rows: Sequence[Row]) -> list[str]:
    """Return settings with at least three different numbers among the runs."""
    names = dict.fromkeys(name for row in rows for name in row.settings if "." in name)
    return [
        name
        for name in names
        if name.partition(".")[0] in _SWEPT
        and name != RATIO
        and not name.endswith(".seed")
        and len({v for row in rows if _is_number(v := row.settings.get(name, ""))}) >= _LEAST
    ]


def _is_number(value: str) -> bool:
    try:
        return value == _NONE or math.isfinite(float(value))
    except ValueError:
        return False


def _is_constant(line: Series, sweep: Sweep) -> bool:
    """Whether the setting cannot change the line's score."""
    changes_lora = sweep.setting.partition(".")[0] in _CHANGES_LORA
    return line.method == ZERO_SHOT or (line.method in REFERENCES and not changes_lora)


def _is_relevant(line: Series, sweep: Sweep) -> bool:
    """Whether the line belongs into the figure. Of ratios a single value does."""
    return sweep.setting == RATIO or _is_constant(line, sweep) or len(_values(line, sweep)) > 1


def _values(line: Series, sweep: Sweep) -> dict[str, Value]:
    """Return the line's points, setting -> score, in the order of the axis."""
    if _is_constant(line, sweep) or (sweep.setting == RATIO and is_uncompressed(line.rows[0])):
        return {}
    values = {
        name: value
        for name, point in line.points.items()
        if _is_number(name)
        and (name, sweep.setting) != (_NONE, RATIO)  # compression=auto: the ratio is unknown
        and (value := point.value(number(sweep.measure))) is not None
    }
    places, _ = positions(list(values))
    return dict(sorted(values.items(), key=lambda item: places[item[0]]))


def _single_value(line: Series, sweep: Sweep) -> Value | None:
    """Return the score of a line that the setting does not change."""
    return next(iter(line.points.values())).value(number(sweep.measure))


def _draw_lines(axes: Axes, one: SweepPanel, styles: Mapping[str, Style]) -> list[Marker]:
    """Draw all lines, and return their markers, which need the final layout."""
    sweep = one.sweep
    values = {line.label: _values(line, sweep) for line in one.lines}
    names = dict.fromkeys(name for points in values.values() for name in points)
    places, is_log = positions(list(names))
    markers = []
    for line in one.lines:
        points, style = values[line.label], styles[line.label]
        single = _single_value(line, sweep)
        if points:
            x = [places[name] for name in points]
            markers += _draw_line(axes, line.label, x, list(points.values()), style)
        elif single and _is_constant(line, sweep):
            axes.axhline(single.mean, label=line.label, color=style.colour, linestyle=style.rule)
            low, high = single.mean - single.spread, single.mean + single.spread
            axes.axhspan(low, high, color=style.colour, alpha=FADED, linewidth=0)
        elif single and sweep.setting == RATIO:
            places["1"] = 1.0  # these methods train through all parameters
            markers += _draw_line(axes, line.label, [1.0], [single], style)
    _set_axis(axes, sweep, places, is_log and sweep.setting != RATIO)
    return markers


def _draw_line(
    axes: Axes, label: str, x: Sequence[float], values: Sequence[Value], style: Style
) -> list[Marker]:
    """Draw means, and standard deviations over seeds where there are several."""
    y, spread = [value.mean for value in values], [value.spread for value in values]
    dash = style.dash if len(x) > 1 else ""
    axes.plot(x, y, label=label, linestyle=dash, markevery=[], **style.marker_properties)
    if any(spread):
        axes.errorbar(
            x, y, spread, fmt="none", ecolor=style.colour, elinewidth=0.8, capsize=1.5, zorder=1.5
        )
    return [Marker(*point, style) for point in zip(x, y, strict=True)]


def _set_axis(axes: Axes, sweep: Sweep, places: Mapping[str, float], is_log: bool) -> None:
    axes.set_xlabel(sweep.name)
    if is_log:
        axes.set_xscale("log", base=2)
    if sweep.measure != "score":
        percent(axes.yaxis)
    if sweep.setting == RATIO:
        percent(axes.xaxis)
    if len(places) <= _TICKS:
        ticks = {at: "none" if name == _NONE else f"{float(name):g}" for name, at in places.items()}
        if sweep.setting == RATIO:
            ticks = {at: f"{at:.0%}" for at in ticks}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.xaxis.set_minor_locator(NullLocator())
    if len({*places.values()}) == 1:
        axes.margins(x=0.5)


def _caption(sweep_panels: Sequence[SweepPanel], is_moved: bool) -> str:
    score = " and the ".join(dict.fromkeys(one.score_label for one in sweep_panels))
    lines = [line for one in sweep_panels for line in one.lines]
    sentences = [
        f"The {score} against the {sweep_panels[0].sweep.name}, with a line for each method.",
        *([MOVED] if is_moved else []),
    ]
    constant = dict.fromkeys(one.label for one in lines if _is_constant(one, sweep_panels[0].sweep))
    if constant:
        verb = "does" if len(constant) == 1 else "do"
        sentences.append(f"{' and '.join(constant)} {verb} not depend on the setting.")
    if any(len(point.rows) > 1 for line in lines for point in line.points.values()):
        sentences.append("Bars and bands are the standard deviation over seeds.")
    if any(line.packed for line in lines):
        sentences.append(HOLLOW)
    return " ".join(sentences)


def _records(one: SweepPanel) -> list[dict[str, object]]:
    records: list[dict[str, object]] = []
    for line in one.lines:
        values = _values(line, one.sweep)
        single = _single_value(line, one.sweep)
        if not values and single:
            values = {"all" if _is_constant(line, one.sweep) else "1": single}
        records += [
            {
                "panel": one.panel.title,
                "label": line.label,
                one.sweep.setting: name,
                "quantity": one.score_label,
                "mean": value.mean,
                "standard deviation": value.spread,
            }
            for name, value in values.items()
        ]
    return records
