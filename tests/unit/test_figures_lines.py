"""Fronts, points, lines and panels of figures."""

import random

import pytest

from emloc.report.draw.labels import distinct_settings
from emloc.report.draw.panels import panels
from emloc.report.draw.pareto import front
from emloc.report.draw.series import Value, number, series
from emloc.report.rows import Row


def row(method: str, seed: int = 0, score: float = 0.5, cell: str = "", **settings) -> Row:
    dotted_settings = {name.replace("__", "."): value for name, value in settings.items()}
    fields = {"experiment": "x", "run": "r", "state": "done", "model": "m", "task": "t"}
    numbers = {"score": score}
    return Row(
        **fields,
        cell=cell,
        method=method,
        seed=seed,
        metric="f1",
        data="",
        settings=dotted_settings,
        numbers=numbers,
    )


# The Pareto front --------------------------------------------------------------------------------


def test_the_front_contains_all_undominated_points():
    points = [(3.0, 0.9), (1.0, 0.2), (2.0, 0.5), (2.5, 0.4), (2.0, 0.3), (9.0, 0.9)]
    assert front(points) == [1, 2, 0]
    assert front([]) == []
    assert front([(1.0, 1.0), (1.0, 1.0)]) == [0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_the_front_equals_its_definition(seed):
    draw = random.Random(seed)
    points = [(float(draw.randrange(8)), float(draw.randrange(8))) for _ in range(30)]
    free = {
        i
        for i, (x, y) in enumerate(points)
        if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
    }
    actual = front(points)
    assert set(actual) == free
    assert [points[i] for i in actual] == sorted(points[i] for i in actual)


# Points and lines --------------------------------------------------------------------------------


def test_seeds_are_joined_to_one_point_with_mean_and_deviation():
    (line,) = series([row("emloc", seed, score) for seed, score in ((0, 0.2), (1, 0.4))])
    (point,) = line.points.values()
    assert point.value(number("score")) == Value(pytest.approx(0.3), pytest.approx(0.02**0.5))
    assert point.value(number("gain_kept")) is None


def test_a_point_needs_the_values_of_all_its_seeds():
    rows = [row("emloc", 0), row("emloc", 1)]
    rows[0].numbers["gain_kept"] = 0.5
    (line,) = series(rows)
    assert line.points[""].value(number("gain_kept")) is None


def test_a_method_that_ignores_the_ratio_is_one_point():
    rows = [
        row("lora", seed, 0.5 + seed, emulator="full", compression__ratio=ratio)
        for ratio in ("0.25", "0.5")
        for seed in (0, 1)
    ]
    (line,) = series(rows)
    assert [one.seed for one in line.points[""].rows] == [0, 1]
    assert len(series([row("emloc", compression__ratio=ratio) for ratio in ("0.25", "0.5")])) == 2


def test_lines_are_labelled_by_the_settings_that_differ():
    rows = [
        row("emloc", recovery="correction", recovery__clamp="3.0"),
        row("emloc", recovery="correction", recovery__clamp="null"),
        row("emloc", recovery="none"),
        row("lora", recovery="none"),
    ]
    labels = [line.label for line in series(rows)]
    assert labels == [
        "emloc correction clamp=3.0",
        "emloc correction clamp=none",
        "emloc none",
        "lora",
    ]
    assert [line.label for line in series(rows, "recovery.clamp")] == ["emloc", "lora"]


def test_cells_of_one_method_with_other_recipes_stay_apart():
    rows = [row("emloc", cell=f"lr_{rate}", train__learning_rate=rate) for rate in ("1", "2")]
    assert [line.label for line in series(rows)] == ["lr_1", "lr_2"]


def test_a_choice_labels_its_values_unless_one_was_overridden():
    one, two = {"recovery": "a", "recovery.x": "1"}, {"recovery": "b", "recovery.x": "2"}
    assert distinct_settings([one, two]) == ["recovery"]
    assert distinct_settings([one, two, {**one, "recovery.x": "3"}]) == ["recovery", "recovery.x"]
    assert distinct_settings([one]) == []


# Panels ------------------------------------------------------------------------------------------


def test_each_recipe_is_a_panel_that_also_shows_zero_shot():
    rows = [row("zero_shot", train__learning_rate="1", train="quick")]
    rows += [
        row(method, train__learning_rate=rate) for method in ("lora", "emloc") for rate in "12"
    ]
    actual = panels(rows)
    assert [panel.title for panel in actual] == [
        "m on t, learning_rate=1",
        "m on t, learning_rate=2",
    ]
    methods = [[one.method for one in panel.rows] for panel in actual]
    assert methods == [["lora", "emloc", "zero_shot"]] * 2


def test_the_swept_setting_does_not_split_panels():
    rows = [row("emloc", lora__rank=rank, lora__alpha=rank) for rank in ("4", "8")]
    assert len(panels(rows)) == 2
    assert [panel.title for panel in panels(rows)] == ["m on t, rank=4", "m on t, rank=8"]
    assert len(panels(rows, "lora.rank", ["lora.alpha"])) == 1


def test_a_setting_of_one_method_does_not_split_panels():
    rows = [row("offload", train__checkpointing="True"), row("lora", train__checkpointing="False")]
    (panel,) = panels(rows)
    assert len(panel.rows) == 2
    assert panel.metric == "f1"


def test_zero_shot_alone_is_a_panel():
    (panel,) = panels([row("zero_shot")])
    assert [one.method for one in panel.rows] == ["zero_shot"]
