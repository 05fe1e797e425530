"""Markers of figures: none covers another one, measured in pixels of the drawn page."""

import math
import random
from dataclasses import replace
from itertools import combinations

import pytest
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox
from reported import row

from emloc.config.paths import EXPERIMENTS
from emloc.report.draw import cost, sweep
from emloc.report.draw.markers import DISC, SYMBOL
from emloc.report.draw.placing import Box, marker_offsets
from emloc.report.draw.series import RATIO
from emloc.report.draw.style import RC
from emloc.report.rows import Row, rows_of

PAPER = Box(0, 0, 200, 150)
PARETO = EXPERIMENTS / "results" / "methods_pareto_gsm8k.csv"


def of_costs(points: list[tuple[float, float]]) -> list[Row]:
    """Runs of different methods with a peak memory and a score each."""
    return [
        row(f"m{i:02}", score, **{"peak_gib/train": gib, "seconds/train": 1.0})
        for i, (gib, score) in enumerate(points)
    ]


def of_ratio(scores: list[float]) -> list[Row]:
    """Runs of different methods at two ratios, equal at both."""
    return [
        row(f"m{i:02}", score, settings={"compression.ratio": ratio, "emulator": "svd"})
        for i, score in enumerate(scores)
        for ratio in ("0.25", "0.5")
    ]


def drawn_markers(axes: Axes) -> list[Line2D]:
    return [line for line in axes.get_lines() if line.get_label() == "_marker"]


def pixel_boxes(axes: Axes) -> list[Bbox]:
    """Bounding boxes of all markers, and of the numbers in them, on the page."""
    figure = axes.get_figure(root=True)
    boxes = []
    for line in drawn_markers(axes):
        half = (line.get_markersize() + line.get_markeredgewidth()) / 2 * figure.dpi / 72
        x, y = line.get_transform().transform(line.get_xydata()[0])
        boxes.append(Bbox([[x - half, y - half], [x + half, y + half]]))
    return boxes


def covered(boxes: list[Bbox]) -> list[tuple[Bbox, Bbox]]:
    return [(one, other) for one, other in combinations(boxes, 2) if one.overlaps(other)]


def draw(rows: list[Row], stem: str, columns: int = 2) -> Figure:
    """One figure alone, laid out as in its file."""
    with rc_context(RC):
        if stem == "score_ratio":
            drawings = sweep.draw(rows, sweep.Sweep(stem, RATIO), columns)
        else:
            (kind,) = [kind for kind in cost.COSTS if kind.stem == stem]
            drawings = cost.draw(rows, kind, columns)
    return drawings[stem].figure


# On the page -------------------------------------------------------------------------------------


def test_three_methods_at_one_point_are_three_markers():
    (axes,) = draw(of_costs([(2.0, 0.5)] * 3 + [(4.0, 0.9)]), "score_memory").axes
    boxes = pixel_boxes(axes)
    assert len(boxes) == 4
    assert covered(boxes) == []
    # One stands at the point, and one to each side of it, at the same height.
    point = axes.transData.transform((2.0, 0.5))
    around = sorted(boxes[:3], key=lambda box: box.x0)
    heights = [(box.y0 + box.y1) / 2 for box in around]
    centres = [(box.x0 + box.x1) / 2 - point[0] for box in around]
    assert heights == pytest.approx([point[1]] * 3, abs=0.1)
    assert centres[0] == pytest.approx(-centres[2], abs=0.1)
    assert centres[1] == pytest.approx(0, abs=0.1)
    dots = [line for line in axes.get_lines() if line.get_label() == "_point"]
    assert len(dots) == 2  # of the two that are moved
    assert all(list(dot.get_xydata()[0]) == [2.0, 0.5] for dot in dots)


def test_three_equal_lines_have_three_markers_at_each_value():
    figure = draw(of_ratio([0.5] * 3), "score_ratio")
    (axes,) = figure.axes
    boxes = pixel_boxes(axes)
    assert len(boxes) == 6
    assert covered(boxes) == []
    height = axes.transData.transform((0.25, 0.5))[1]
    assert all((box.y0 + box.y1) / 2 == pytest.approx(height, abs=0.1) for box in boxes)


@pytest.mark.parametrize("stem", ["score_memory", "score_weights", "score_time", "score_ratio"])
def test_markers_of_32_real_runs_do_not_cover_one_another(stem):
    rows = rows_of(PARETO)
    assert len(rows) == 32
    for axes in draw(rows, stem).axes:
        boxes = pixel_boxes(axes)
        assert len(boxes) >= 24
        assert covered(boxes) == []


def test_32_points_in_one_column_are_apart_and_their_numbers_lie_within_them():
    (axes,) = draw(of_costs([(3.0, i / 100) for i in range(32)]), "score_memory").axes
    boxes = pixel_boxes(axes)
    assert covered(boxes) == []
    numbers = [text for text in axes.texts if text.get_text()]
    assert len(boxes) == len(numbers) == 32
    for number in numbers:
        extent = number.get_window_extent()
        assert sum(box.overlaps(extent) for box in boxes) == 1


def test_the_same_runs_give_the_same_places():
    rows = of_costs([(2.0, 0.5)] * 3 + [(2.0, 0.52), (2.1, 0.5)])
    places = [
        [box.extents.tolist() for box in pixel_boxes(draw(rows, "score_memory").axes[0])]
        for _ in range(2)
    ]
    assert places[0] == places[1]


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("stem", ["score_memory", "score_ratio"])
def test_legend_titles_and_labels_stay_on_the_page(columns, stem):
    rows = [
        replace(one, model="a_model_with_a_long_name_of_7b", task="a_task_whose_name_is_long")
        for one in rows_of(PARETO)
    ]
    figure = draw([*rows, row("lora", None)], stem, columns)
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0) >= 0
    assert (box.x1, box.y1) <= (width, height)
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(axes.get_window_extent()) for axes in figure.axes)


# Places ------------------------------------------------------------------------------------------


def placed(points: list[tuple[float, float]], size: float, **more) -> list[Box]:
    offsets = marker_offsets(points, size, PAPER, **more)
    return [
        Box.around(x + right, y + up, size / 2)
        for (x, y), (right, up) in zip(points, offsets, strict=True)
    ]


def overlaps(boxes: list[Box]) -> float:
    return sum(one.overlap(other) for one, other in combinations(boxes, 2))


def test_lone_markers_stay_at_their_points():
    points = [(20.0, 20.0), (40.0, 20.0), (60.0, 90.0)]
    assert marker_offsets(points, DISC, PAPER) == [(0, 0)] * 3


@pytest.mark.parametrize("seed", range(5))
def test_thirty_markers_cover_neither_one_another_nor_other_points(seed):
    draw = random.Random(seed)
    points = [(draw.uniform(10, 190), draw.uniform(10, 140)) for _ in range(32)]
    boxes = placed(points, DISC)
    assert overlaps(boxes) == 0
    for index, box in enumerate(boxes):
        assert box.overlap(PAPER) == pytest.approx(box.area)
        others = [point for i, point in enumerate(points) if i != index]
        assert not any(box.left < x < box.right and box.bottom < y < box.top for x, y in others)


def test_a_marker_stays_inside():
    (first, second) = placed([(196.0, 75.0)] * 2, DISC)
    assert max(first.right, second.right) <= 200.5 + DISC / 2
    assert second.right <= 200


def test_level_markers_keep_their_heights():
    points = [(100.0, 70.0 + i / 2) for i in range(12)]
    offsets = marker_offsets(points, SYMBOL, PAPER, level=True)
    assert all(up == pytest.approx(0, abs=1e-9) for _, up in offsets)
    assert overlaps(placed(points, SYMBOL, level=True)) == pytest.approx(0, abs=1e-9)


def test_a_moved_marker_stands_as_near_as_it_can():
    offsets = marker_offsets([(100.0, 70.0), (102.0, 70.0)], DISC, PAPER)
    assert all(math.hypot(*offset) <= 1.25 * DISC for offset in offsets)
