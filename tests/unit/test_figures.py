"""The figures of a report; tests read axes and labels instead of pixels."""

import subprocess
import sys
from dataclasses import replace

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from emloc.config.paths import CONF
from emloc.report.draw.sheet import legend_columns, note_of
from emloc.report.draw.style import COLUMN, PAGE, line_styles
from emloc.report.draw.sweep import positions
from emloc.report.figures import drawings, figures, save, save_records
from emloc.report.rows import Row, rows_of, write_rows

EMULATORS = {"zero_shot": "full", "lora": "full", "dora": "full", "qlora": "full"}
SETTINGS = {
    "compression.ratio": "0.5",
    "compression.bits": "16",
    "calibration.samples": "64",
    "lora.rank": "8",
    "lora.alpha": "8",
    "train.steps": "100",
}


def row(method: str, score: float = 0.5, seed: int = 0, **more) -> Row:
    """Return the result of a finished run.

    `more` holds settings, with __ for the dot, and fields and numbers of the row.
    """
    fields = {name: more.pop(name) for name in ("cell", "model", "task", "state") if name in more}
    numbers = {"score": score} | more.pop("numbers", {})
    settings = SETTINGS | {"emulator": EMULATORS.get(method, "svd")}
    settings |= {name.replace("__", "."): value for name, value in more.items()}
    is_done = fields.get("state", "done") == "done"
    return Row(
        **{"experiment": "x", "state": "done", "cell": "", "model": "tiny", "task": "sums"}
        | fields,
        run=f"{method}-{score}-{seed}",
        method=method,
        seed=seed,
        metric="exact_match" if is_done else "",
        data="",
        settings=settings,
        numbers=numbers if is_done else {},
    )


def trained(gib: float, mb: float = 100.0, seconds: float = 10.0, **more) -> dict:
    """Return the numbers of a trained run: peak GiB, MB trained through and seconds."""
    return {"peak_gib/train": gib, "bytes": mb * 1e6, "seconds/train": seconds, **more}


def drawn(rows: list[Row], place) -> dict:
    return figures(rows, place / "rows.csv")


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> x and y values, for all lines with a label."""
    values_by_label = {}
    for line in axes.get_lines():
        if not str(line.get_label()).startswith("_"):
            values_by_label[line.get_label()] = (list(line.get_xdata()), list(line.get_ydata()))
    return values_by_label


def words(figure) -> list[str]:
    """Return all texts written into the panels."""
    return [word for axes in figure.axes for text in axes.texts if (word := text.get_text())]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def ticks(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


# Score against ratio -----------------------------------------------------------------------------


def rows_by_ratio() -> list[Row]:
    rows = [row("zero_shot", 0.1), row("lora", 0.9), row("lora", 0.8, seed=1)]
    for ratio, score in (("0.25", 0.2), ("0.5", 0.4)):
        rows += [
            row("emloc", score + 0.1 * seed, seed, compression__ratio=ratio) for seed in (0, 1)
        ]
    return rows


def test_means_are_plotted_against_the_ratio_with_references_as_horizontal_lines(tmp_path):
    figure = drawn(rows_by_ratio(), tmp_path)["score_ratio"]
    (axes,) = figure.axes
    actual = lines(axes)
    assert actual["emloc"] == ([0.25, 0.5], [pytest.approx(0.25), pytest.approx(0.45)])
    assert actual["lora"][1] == [pytest.approx(0.85)] * 2
    assert actual["zero_shot"][1] == [0.1, 0.1]
    assert legend(figure) == ["emloc", "lora", "zero_shot"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("share of parameters kept", "exact_match")
    assert ticks(axes.xaxis) == ["25%", "50%"]
    assert axes.get_title() == "tiny on sums"
    assert figure.get_size_inches()[0] == COLUMN


def test_the_deviation_over_seeds_is_drawn(tmp_path):
    (axes,) = drawn(rows_by_ratio(), tmp_path)["score_ratio"].axes
    (bars,) = axes.containers
    lower, upper = bars.lines[2][0].get_segments()[0][:, 1]
    assert (lower, upper) == (
        pytest.approx(0.25 - 0.0707, abs=1e-4),
        pytest.approx(0.3207, abs=1e-4),
    )
    spans = sorted(patch.get_height() for patch in axes.patches)
    assert spans == [0.0, pytest.approx(2 * 0.0707, abs=1e-4)]


def test_the_label_of_a_line_omits_the_ratio_of_its_cells(tmp_path):
    rows = [
        row("emloc", 0.2, cell="svd_r25_sequential", compression__ratio="0.25"),
        row("emloc", 0.3, cell="svd_r50_sequential", compression__ratio="0.5"),
        row("emloc", 0.4, cell="svd_r90_nf4", compression__ratio="0.9", compression__bits="4"),
    ]
    rows = [replace(one, settings={**one.settings, "cell": f"x/{one.cell}"}) for one in rows]
    figure = drawn(rows, tmp_path)["score_ratio"]
    actual = lines(figure.axes[0])
    assert actual["svd_sequential"] == ([0.25, 0.5], [0.2, 0.3])
    assert actual["svd_nf4"] == ([0.9], [0.4])
    faces = {one.get_label(): one.get_markerfacecolor() for one in figure.axes[0].get_lines()}
    assert faces["svd_nf4"] == "white" != faces["svd_sequential"]
    assert figure._supxlabel.get_text() == "hollow: nf4"


def test_formats_with_equal_bits_are_labelled_by_their_names(tmp_path):
    named = {"precision": "other", "precision__name": "other", "precision__bits": "4"}
    rows = [
        row("emloc", score, compression__ratio=ratio, **more)
        for ratio in ("0.25", "0.5")
        for score, more in (
            (0.2, {}),
            (0.3, {"compression__bits": "4"}),
            (0.4, {"compression__bits": "4", **named}),
            (0.5, {"compression__bits": "5"}),
        )
    ]
    figure = drawn(rows, tmp_path)["score_ratio"]
    actual = lines(figure.axes[0])
    assert sorted(actual) == ["emloc 16 bit", "emloc 5 bit", "emloc nf4", "emloc other"]
    assert actual["emloc other"] == ([0.25, 0.5], [0.4, 0.4])
    faces = {one.get_label(): one.get_markerfacecolor() for one in figure.axes[0].get_lines()}
    assert [faces[name] == "white" for name in sorted(actual)] == [False, True, True, True]
    assert figure._supxlabel.get_text() == "hollow: 5 bit, nf4, other"


def test_different_settings_of_one_method_are_separate_lines(tmp_path):
    rows = [
        row("emloc", 0.2, emulator__sequential=flag, compression__ratio=ratio)
        for flag in ("True", "False")
        for ratio in ("0.25", "0.5")
    ]
    actual = lines(drawn(rows, tmp_path)["score_ratio"].axes[0])
    assert set(actual) == {"emloc sequential=True", "emloc sequential=False"}


def test_a_method_without_compression_is_drawn_at_all_parameters(tmp_path):
    """It is drawn once for all its ratios, which it ignores."""
    rows = rows_by_ratio()
    rows += [row("dora", 0.7, compression__ratio=ratio) for ratio in ("0.25", "0.5")]
    (axes,) = drawn(rows, tmp_path)["score_ratio"].axes
    assert lines(axes)["dora"] == ([1.0], [0.7])
    assert ticks(axes.xaxis) == ["25%", "50%", "100%"]


def test_a_single_ratio_gives_no_figure(tmp_path):
    assert "score_ratio" not in drawn([row("lora"), row("emloc"), row("svd_llm")], tmp_path)


def test_a_method_has_the_same_colour_in_every_figure(tmp_path):
    rows = [replace(one, numbers=one.numbers | trained(1.0)) for one in rows_by_ratio()]
    actual = drawn(rows, tmp_path)
    assert {"score_ratio", "score_memory"} <= set(actual)
    expected = line_styles([("emloc", "emloc", False)])["emloc"].colour
    for name, label in (("score_ratio", "emloc"), ("score_memory", None)):
        colours = {to_hex(one.get_color()) for one in actual[name].axes[0].get_lines()}
        assert expected.lower() in colours, (name, label)


def test_every_method_has_a_style_and_no_two_the_same():
    methods = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
    styles = line_styles((method, method, False) for method in methods)
    assert len({(look.colour, look.marker) for look in styles.values()}) == len(methods)
    some = line_styles([("lora", "lora", False), ("new", "mine", False)])
    assert some["lora"] == styles["lora"]


def test_lines_of_one_method_share_the_colour_but_not_the_marker():
    styles = line_styles([("b", "emloc", False), ("a", "emloc", False)])
    assert styles["a"].colour == styles["b"].colour
    assert styles["a"].marker != styles["b"].marker
    assert styles == line_styles([("a", "emloc", False), ("b", "emloc", False)])


# Panels ------------------------------------------------------------------------------------------


def test_every_model_and_task_is_a_panel(tmp_path):
    rows = [replace(one, task=task) for task in ("a", "b", "c") for one in rows_by_ratio()]
    figure = drawn(rows, tmp_path)["score_ratio"]
    assert [axes.get_title() for axes in figure.axes] == ["tiny on a", "tiny on b", "tiny on c"]
    assert figure.get_size_inches()[0] == PAGE


def test_a_figure_has_at_most_eight_panels(tmp_path):
    rows = [replace(one, task=f"t{task}") for task in range(9) for one in rows_by_ratio()]
    actual = drawn(rows, tmp_path)
    assert [len(actual[name].axes) for name in ("score_ratio", "score_ratio_2")] == [8, 1]


def test_unfinished_and_failed_runs_are_counted_below_the_figure(tmp_path):
    rows = [*rows_by_ratio(), row("emloc", state="OOM"), row("qlora", state="failed(train)")]
    figure = drawn([*rows, row("lora", state="running")], tmp_path)["score_ratio"]
    note = "2 runs failed or ran out of memory; 1 run not finished"
    assert figure._supxlabel.get_text() == note
    assert note_of(rows_by_ratio()) == ""


def test_a_legend_uses_as_many_columns_as_fit():
    assert legend_columns(["a" * 5] * 8, 3.3) == 4
    assert legend_columns(["a" * 60] * 3, 3.3) == 1
    assert legend_columns(["a"], 3.3) == 1


# Sweeps of other settings ------------------------------------------------------------------------


def rows_by_setting(name: str, values: list[str], method: str = "emloc") -> list[Row]:
    return [row(method, at / 10, **{name: value}) for at, value in enumerate(values)]


def test_a_setting_swept_within_a_method_gives_a_figure(tmp_path):
    rows = [row("lora", 0.9), *rows_by_setting("recovery__clamp", ["1.0", "null", "3.0"])]
    actual = drawn(rows, tmp_path)
    assert set(actual) == {"score_clamp"}
    (axes,) = actual["score_clamp"].axes
    assert lines(axes)["emloc"] == ([1.0, 3.0, 5.0], [0.0, 0.2, 0.1])
    assert ticks(axes.xaxis) == ["1", "3", "none"]
    assert lines(axes)["lora"][1] == [0.9, 0.9]


def test_two_values_are_not_a_sweep(tmp_path):
    assert drawn(rows_by_setting("recovery__clamp", ["1.0", "3.0"]), tmp_path) == {}


def test_values_of_different_methods_are_not_a_sweep(tmp_path):
    rows = [
        row(method, recovery__clamp=value)
        for method, value in (("emloc", "1.0"), ("emloc_nf4", "2.0"), ("mine", "3.0"))
    ]
    assert drawn(rows, tmp_path) == {}


def test_lora_is_a_line_and_no_reference_in_a_sweep_of_ranks(tmp_path):
    """Alpha changes with the rank and does not count as another setting."""
    rows = [row("zero_shot", 0.1)]
    for method in ("lora", "emloc"):
        rows += [
            row(method, int(rank) / 100, lora__rank=rank, lora__alpha=rank)
            for rank in ("4", "8", "16")
        ]
    actual = drawn(rows, tmp_path)
    assert set(actual) == {"score_rank"}
    (axes,) = actual["score_rank"].axes
    assert lines(axes)["lora"] == lines(axes)["emloc"] == ([4.0, 8.0, 16.0], [0.04, 0.08, 0.16])
    assert lines(axes)["zero_shot"][1] == [0.1, 0.1]
    assert axes.get_xscale() == "log"
    assert axes.get_title() == "tiny on sums"


def test_gain_against_calibration_size(tmp_path):
    rows = [
        row("emloc", seed=seed, calibration__samples=size, numbers={"gain_kept": gain + 0.1 * seed})
        for size, gain in (("16", 0.5), ("64", 0.7))
        for seed in (0, 1)
    ]
    rows.append(row("lora", 0.9, numbers={"gain_kept": 1.0}))
    rows.append(row("svd_llm", 0.4, numbers={"gain_kept": 0.3}, calibration__samples="64"))
    actual = drawn(rows, tmp_path)
    (axes,) = actual["gain_calibration"].axes
    assert lines(axes)["emloc"] == ([16.0, 64.0], [pytest.approx(0.55), pytest.approx(0.75)])
    assert (axes.get_xscale(), ticks(axes.xaxis)) == ("log", ["16", "64"])
    assert axes.get_ylabel() == "share of gain kept"
    assert axes.yaxis.get_major_formatter()(0.5) == "50%"
    # A method with one value of the setting has no line.
    assert legend(actual["gain_calibration"]) == ["emloc", "lora"]


def test_without_gains_there_is_no_figure_of_gains(tmp_path):
    rows = rows_by_setting("calibration__samples", ["16", "64", "256"])
    assert set(drawn(rows, tmp_path)) == {"score_samples"}


@pytest.mark.parametrize(
    ("values", "where", "log"),
    [
        (["4", "16", "64"], [4, 16, 64], True),
        (["0.25", "0.5", "0.75", "1.0"], [0.25, 0.5, 0.75, 1], False),
        (["0.0", "1.0", "3.0", "null"], [0, 1, 3, 5], False),
        (["1.0", "4.0", "null"], [1, 4, 8], True),
        (["0", "1.0", "4.0", "16.0"], [0.25, 1, 4, 16], True),
        (["null"], [2], False),
        (["2.0", "3.0"], [2, 3], False),
    ],
)
def test_an_axis_is_logarithmic_if_values_are_more_even_then(values, where, log):
    actual, is_log = positions(values)
    assert [actual[value] for value in values] == where
    assert is_log == log


# Score against what it costs ---------------------------------------------------------------------


def rows_by_cost(count: int, **more) -> list[Row]:
    return [
        row(f"m{i:02}", i / 100, numbers=trained(1.0 + i, 10.0 + i, 5.0 + i) | more)
        for i in range(count)
    ]


def test_each_cell_is_a_numbered_point_and_the_front_is_joined(tmp_path):
    rows = [
        row("zero_shot", 0.1),
        row("lora", 0.9, numbers=trained(8.0, 200.0)),
        row("emloc", 0.7, numbers=trained(4.0, 100.0, 20.0, **{"seconds/emulate": 5.0})),
        row("upop", 0.5, numbers=trained(5.0, 90.0, 7.0)),
    ]
    actual = drawn(rows, tmp_path)
    assert set(actual) == {"score_memory", "score_weights", "score_time"}
    (axes,) = actual["score_memory"].axes
    assert lines(axes)["Pareto front"] == ([4.0, 8.0], [0.7, 0.9])
    assert lines(axes)["zero_shot"][1] == [0.1, 0.1]
    assert sorted(words(actual["score_memory"])) == ["1", "2", "3"]
    assert legend(actual["score_memory"])[:3] == ["1  emloc", "2  lora", "3  upop"]
    assert axes.get_xlabel() == "peak memory of training (GiB)"
    fronts = {name: lines(figure.axes[0])["Pareto front"][0] for name, figure in actual.items()}
    assert fronts["score_weights"] == [90.0, 100.0, 200.0]
    assert fronts["score_time"] == [7.0, 10.0]


def test_arithmetic_is_that_of_all_stages_over_all_rows(tmp_path):
    counted = {"row_forwards/train": 1200.0, "weights_read/train": 1e9, "trained_rows": 400.0}
    rows = [
        row("zero_shot", 0.1),
        row("lora", 0.9, numbers=trained(8.0, **counted)),
        row("emloc", 0.7, numbers=trained(4.0, **counted | {"row_forwards/train": 300.0})),
        row("upop", 0.5, numbers=trained(5.0)),  # of an earlier version, which did not count
    ]
    figure = drawn(rows, tmp_path)["score_forwards"]
    (axes,) = figure.axes
    assert lines(axes)["Pareto front"] == ([300.0, 1200.0], [0.7, 0.9])
    assert axes.get_xlabel() == "arithmetic of all stages (forwards of the original)"


def test_known_gains_are_a_second_panel(tmp_path):
    figure = drawn(rows_by_cost(4, gain_kept=0.5), tmp_path)["score_memory"]
    names = [axes.get_ylabel() for axes in figure.axes]
    assert names == ["exact_match", "share of gain kept"]


def test_each_point_has_a_number_and_the_key_names_it(tmp_path):
    figure = drawn(rows_by_cost(16), tmp_path)["score_memory"]
    assert sorted(words(figure), key=int) == [str(i) for i in range(1, 17)]
    assert legend(figure)[0] == "1  m00"
    assert legend(figure)[15] == "16  m15"


def test_a_recipe_with_two_points_has_no_panel_beside_larger_ones(tmp_path):
    rows = rows_by_cost(4) + [
        replace(one, settings={**one.settings, "train.steps": "9"}) for one in rows_by_cost(2)
    ]
    figure = drawn(rows, tmp_path)["score_memory"]
    assert [axes.get_title() for axes in figure.axes] == ["tiny on sums, steps=100"]
    assert len(drawn(rows_by_cost(2), tmp_path)["score_memory"].axes) == 1


def test_costs_that_differ_much_have_a_logarithmic_axis(tmp_path):
    rows = [row(f"m{gib}", 0.5, numbers=trained(gib)) for gib in (1.0, 2.0, 9.0)]
    actual = drawn(rows, tmp_path)
    scales = [actual[name].axes[0].get_xscale() for name in ("score_memory", "score_weights")]
    assert scales == ["log", "linear"]


# Captions, numbers, and narrow screens --------------------------------------------------------


def test_a_caption_is_sentences_about_what_is_drawn(tmp_path):
    actual = drawings(rows_by_ratio(), tmp_path / "rows.csv")["score_ratio"]
    assert actual.caption == (
        "The exact_match against the share of parameters kept, with a line for each method. "
        "lora and zero_shot do not depend on the setting. "
        "Bars and bands are the standard deviation over seeds."
    )
    assert actual.alt == "tiny on sums: exact_match against share of parameters kept"
    (cost, *_) = drawings(rows_by_cost(4), tmp_path / "rows.csv").values()
    assert cost.caption.startswith("The exact_match against the peak memory of training (GiB).")
    assert "standard deviation" not in cost.caption


def test_the_numbers_of_a_figure_are_written_beside_it(tmp_path):
    actual = drawings(rows_by_ratio(), tmp_path / "rows.csv")
    (path,) = save_records(actual, tmp_path)
    assert path.name == "score_ratio.csv"
    head, *table = path.read_text().splitlines()
    assert head == "panel,label,compression.ratio,quantity,mean,standard deviation"
    assert "tiny on sums,zero_shot,all,exact_match,0.1,0.0" in table
    (quarter,) = [line for line in table if line.startswith("tiny on sums,emloc,0.25,exact_match")]
    mean, deviation = map(float, quarter.split(",")[-2:])
    assert (mean, deviation) == (pytest.approx(0.25), pytest.approx(0.0707, abs=1e-4))
    assert len(table) == 4


def test_a_cost_has_a_record_for_each_point_with_its_number(tmp_path):
    records = drawings(rows_by_cost(3), tmp_path / "rows.csv")["score_memory"].records
    assert [(one["number"], one["label"], one["mean"]) for one in records] == [
        (1, "m00", 0.0),
        (2, "m01", 0.01),
        (3, "m02", 0.02),
    ]


def test_panels_stand_below_one_another_on_a_narrow_screen(tmp_path):
    rows = rows_by_cost(4, gain_kept=0.5)
    narrow = drawings(rows, tmp_path / "rows.csv", columns=1)["score_memory"].figure
    wide = drawings(rows, tmp_path / "rows.csv")["score_memory"].figure
    assert narrow.get_size_inches()[0] == COLUMN
    assert wide.get_size_inches()[0] == PAGE
    first, second = (axes.get_position() for axes in narrow.axes)
    assert second.y1 < first.y0
    assert sorted(words(narrow)) == sorted(words(wide))


# Files -------------------------------------------------------------------------------------------


def test_without_finished_runs_there_is_no_figure(tmp_path):
    assert drawn([row("emloc", state="running")], tmp_path) == {}
    assert drawn([], tmp_path) == {}


def test_a_tidy_file_gives_the_figures_of_its_folder(tmp_path):
    rows = [replace(one, numbers=one.numbers | trained(1.0 + one.seed)) for one in rows_by_ratio()]
    write_rows(rows, tmp_path / "rows.csv")
    again = rows_of(tmp_path / "rows.csv")
    first, second = drawn(rows, tmp_path), drawn(again, tmp_path)
    assert list(first) == list(second)
    for name, figure in first.items():
        pairs = zip(figure.axes, second[name].axes, strict=True)
        assert all(lines(one) == lines(other) for one, other in pairs)


def test_the_files_of_a_figure_are_the_same_every_time(tmp_path):
    forms = ("png", "pdf", "svg")
    written = save(drawn(rows_by_ratio(), tmp_path), tmp_path / "a" / "figures", forms)
    assert [path.name for path in written] == [f"score_ratio.{form}" for form in forms]
    again = save(drawn(rows_by_ratio(), tmp_path), tmp_path / "b", forms)
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in again]
    head = written[0].read_bytes()
    assert head.startswith(b"\x89PNG")
    assert int.from_bytes(head[16:20], "big") == round(200 * COLUMN)


def test_tables_do_not_import_matplotlib_and_figures_do_not_import_torch():
    program = (
        "import sys\n"
        "import emloc.report.figures\n"
        "print({'matplotlib', 'torch'} & {*sys.modules})\n"
        "import emloc.report.draw.cost, emloc.report.draw.layers, emloc.report.draw.sweep\n"
        "print({'matplotlib', 'matplotlib.pyplot', 'torch', 'transformers'} & {*sys.modules})\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert process.stdout.splitlines() == ["set()", "{'matplotlib'}"]
