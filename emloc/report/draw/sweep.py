"""A score against a setting: a line for each method, the references across."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from emloc.report.draw.panels import panels
from emloc.report.draw.series import (
    RATIO,
    REFERENCES,
    ZERO_SHOT,
    Series,
    Value,
    is_whole,
    number,
    series,
)
from emloc.report.draw.sheet import ROWS, blank, by_stem, finish, note_of, pages, percent
from emloc.report.draw.style import FADED, Look, looks_of
from emloc.report.rows import Row

LEAST = 3  # values of a setting that are a sweep of it

_NAMES = {
    RATIO: "share of parameters kept",
    "calibration.samples": "calibration samples",
    "lora.rank": "LoRA rank",
    "recovery.clamp": "clamp of the correction",
    "recovery.strength": "strength of the correction",
    "train.learning_rate": "learning rate",
    "train.steps": "training steps",
}
_TRAINED = ("lora", "train")  # sections of settings that change a LoRA on the original as well
_SWEPT = ("calibration", "compression", "lora", "emulator", "adapter", "recovery", "train")
_ALIKE = {"lora.rank": "lora.alpha"}  # what most often goes with it
_NONE = "null"
_KEYS = 12  # of lines, that stand above a panel one column wide
_TICKS = 9  # that are told apart below an axis


@dataclass(frozen=True)
class Sweep:
    """One figure: what stands on its axes."""

    stem: str
    setting: str
    measure: str = "score"
    least: int = 2  # values that some line has to have


def sweeps(rows: Sequence[Row]) -> list[Sweep]:
    """Every figure of this kind that there may be something for."""
    found = [
        Sweep("score_ratio", RATIO),
        Sweep("gain_calibration", "calibration.samples", "gain_kept"),
    ]
    taken = {one.stem for one in found}
    for name in _numeric(rows):
        section, _, leaf = name.partition(".")
        stem = f"score_{leaf}" if f"score_{leaf}" not in taken else f"score_{section}_{leaf}"
        taken.add(stem)
        found.append(Sweep(stem, name, least=LEAST))
    return found


def draw(rows: Sequence[Row], sweep: Sweep) -> Mapping[str, Figure]:
    """Stem -> page of panels, one for each model, task and recipe in which something is swept."""
    alike = alike_of(rows, sweep.setting)
    shown = []
    for panel in panels(rows, sweep.setting, alike):
        lines = series(panel.rows, sweep.setting, alike)
        if any(len(_values(line, sweep)) >= sweep.least for line in lines):
            rows_shown = [row for line in lines if _shown(line, sweep) for row in line.rows]
            # Once more, since fewer lines take fewer words to be told apart.
            shown.append((panel, series(rows_shown, sweep.setting, alike)))
    figures = []
    for page in pages(len(shown), 2 * ROWS):
        every = [line for _, lines in shown[page] for line in lines]
        looks = looks_of((line.label, line.method, bool(line.packed)) for line in every)
        figure, places = blank(len(shown[page]), wide=len(looks) > _KEYS)
        for (panel, lines), axes in zip(shown[page], places, strict=True):
            axes.set_title(panel.title)
            axes.set_ylabel(panel.metric if sweep.measure == "score" else "share of gain kept")
            _lines(axes, lines, sweep, looks)
        order = sorted(looks, key=lambda label: (label in REFERENCES, label))
        finish(figure, note_of(rows, [line.packed for line in every]), order)
        figures.append(figure)
    return by_stem(sweep.stem, figures)


def alike_of(rows: Sequence[Row], setting: str) -> tuple[str, ...]:
    """Settings that have one value for each of this one's: a LoRA's alpha, if it is its rank."""
    other = _ALIKE.get(setting, "")
    pairs = {(row.settings.get(setting), row.settings.get(other)) for row in rows}
    return (other,) if other and len(pairs) == len({pair[0] for pair in pairs}) else ()


def positions(values: Sequence[str]) -> tuple[dict[str, float], bool]:
    """Where values stand on an axis, and whether it is logarithmic: where that is more even.

    Args:
        values: numbers, and null for none at all, which stands last; where the others go by their
            logarithms, 0 stands a step before them.
    """
    numbers = sorted({float(value) for value in values if value != _NONE})
    logs = [math.log2(number) for number in numbers if number > 0]
    positive = bool(numbers) and (numbers[0] > 0 or (numbers[0] == 0 and len(logs) >= LEAST))
    more_even = positive and _unevenness(logs) <= _unevenness(numbers)
    log = more_even and logs[-1] - logs[0] >= 2
    found = {value: float(value) for value in values if value != _NONE}
    if log and numbers[0] == 0:
        before = 2 ** (2 * logs[0] - logs[1])
        found |= {value: before for value, at in found.items() if at == 0}
    if _NONE in values:
        before, last = [0.0, 1.0, *numbers][-2:]
        found[_NONE] = last * 2 if log else last + (last - before or 1.0)
    return found, log


def _unevenness(numbers: Sequence[float]) -> float:
    gaps = [b - a for a, b in pairwise(numbers)]
    return max(gaps) / min(gaps) if gaps else 1.0


def _numeric(rows: Sequence[Row]) -> list[str]:
    """Settings of which some row has a number, and the rows together `LEAST` values."""
    names = dict.fromkeys(name for row in rows for name in row.settings if "." in name)
    return [
        name
        for name in names
        if name.partition(".")[0] in _SWEPT
        and name != RATIO
        and not name.endswith(".seed")
        and len({value for row in rows if _is_number(value := row.settings.get(name, ""))}) >= LEAST
    ]


def _is_number(value: str) -> bool:
    try:
        return value == _NONE or math.isfinite(float(value))
    except ValueError:
        return False


def _is_across(line: Series, sweep: Sweep) -> bool:
    """Whether the line says the same at any value of the setting."""
    trained = sweep.setting.partition(".")[0] in _TRAINED
    return line.method == ZERO_SHOT or (line.method in REFERENCES and not trained)


def _shown(line: Series, sweep: Sweep) -> bool:
    """Whether the line says something about the setting; of ratios a single one does."""
    return sweep.setting == RATIO or _is_across(line, sweep) or len(_values(line, sweep)) > 1


def _values(line: Series, sweep: Sweep) -> dict[str, Value]:
    """The line's points, setting -> score, in the order of the axis."""
    if _is_across(line, sweep) or (sweep.setting == RATIO and is_whole(line.rows[0])):
        return {}
    found = {
        name: value
        for name, point in line.points.items()
        if _is_number(name)
        and (name, sweep.setting) != (_NONE, RATIO)  # solved for: not known
        and (value := point.value(number(sweep.measure))) is not None
    }
    where, _ = positions(list(found))
    return dict(sorted(found.items(), key=lambda item: where[item[0]]))


def _lines(axes: Axes, lines: Sequence[Series], sweep: Sweep, looks: Mapping[str, Look]) -> None:
    values = [_values(line, sweep) for line in lines]
    where, log = positions(list(dict.fromkeys(name for one in values for name in one)))
    for line, known in zip(lines, values, strict=True):
        look = looks[line.label]
        single = next(iter(line.points.values())).value(number(sweep.measure))
        if known:
            x, dash = [where[name] for name in known], look.dash if len(known) > 1 else ""
            _line(axes, x, list(known.values()), {"label": line.label, "linestyle": dash}, look)
        elif single and _is_across(line, sweep):
            axes.axhline(single.mean, label=line.label, color=look.colour, linestyle=look.rule)
            low, high = single.mean - single.spread, single.mean + single.spread
            axes.axhspan(low, high, color=look.colour, alpha=FADED, linewidth=0)
        elif single and sweep.setting == RATIO:
            # Nothing is left out of the model that these are trained through.
            where["1"] = 1.0
            _line(axes, [1.0], [single], {"label": line.label, "linestyle": ""}, look)
    _axis(axes, sweep, where, log and sweep.setting != RATIO)


def _line(
    axes: Axes, x: Sequence[float], values: Sequence[Value], told: Mapping[str, Any], look: Look
) -> None:
    """Means, and standard deviations over seeds where there are several."""
    y, spread = [value.mean for value in values], [value.spread for value in values]
    axes.plot(x, y, **told, **look.marks)
    if any(spread):
        bars: dict[str, Any] = {
            "fmt": "none",
            "ecolor": look.colour,
            "elinewidth": 0.8,
            "zorder": 1.5,
        }
        axes.errorbar(x, y, spread, capsize=1.5, **bars)


def _axis(axes: Axes, sweep: Sweep, where: Mapping[str, float], log: bool) -> None:
    axes.set_xlabel(_NAMES.get(sweep.setting, sweep.setting))
    if log:
        axes.set_xscale("log", base=2)
    if sweep.measure != "score":
        percent(axes.yaxis)
    if sweep.setting == RATIO:
        percent(axes.xaxis)
    if len(where) <= _TICKS:
        words = {at: "none" if name == _NONE else f"{float(name):g}" for name, at in where.items()}
        if sweep.setting == RATIO:
            words = {at: f"{at:.0%}" for at in words}
        axes.set_xticks(list(words), list(words.values()))
        axes.xaxis.set_minor_locator(NullLocator())
    if len({*where.values()}) == 1:
        axes.margins(x=0.5)
