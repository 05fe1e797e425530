"""How reports show trainings with anchors: their names, columns, points and rounds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib import rc_context
from matplotlib.axes import Axes
from reported import row, write_run

from emloc.report.draw import cost, curve, sweep
from emloc.report.draw.drawing import Drawing
from emloc.report.draw.style import RC, line_styles
from emloc.report.markdown import markdown
from emloc.report.rows import Row, rows_of, write_rows
from emloc.report.run_table import notes_of, table_of
from emloc.report.summary import summary_of

SVD = {"emulator": "svd", "adapter": "lora", "recovery": "none", "compression.ratio": "0.25"}
SVD |= {"compression.bits": "16"}
ANCHORS = SVD | {"anchor": "blocks", "anchor.rounds": "4"}
PLAIN = SVD | {"anchor": "none"}
CORRECTED = PLAIN | {"recovery": "correction"}


def trained(method: str, score: float, settings: dict, gib: float = 4.0, **changed) -> Row:
    return row(
        method,
        score,
        settings=settings,
        **{"peak_gib/train": gib, "seconds/train": 1.0, "bytes": gib * 1e9, **changed},
    )


# Tables ------------------------------------------------------------------------------------------


def test_two_ways_to_start_one_method_are_one_line_over_their_seeds():
    rows = [
        trained("emloc_anchored", 0.5, ANCHORS, seed=0),
        trained("emloc_uncorrected", 0.7, ANCHORS, seed=1),
        trained("emloc_uncorrected", 0.2, PLAIN, seed=0),
    ]
    frame = table_of(summary_of(rows)).frame
    assert list(frame["method"]) == ["emloc_anchored", "emloc_uncorrected"]
    assert list(frame["accuracy"]) == ["0.600 ± 0.141", "0.200"]
    assert list(frame["seeds"]) == ["0 1", "0"]


def test_anchors_that_differ_are_lines_with_a_column():
    rows = [trained("emloc_anchored", 0.5, ANCHORS | {"anchor.rounds": r}) for r in ("1", "4")]
    frame = table_of(summary_of(rows)).frame
    assert list(frame["anchor.rounds"]) == ["1", "4"]
    assert list(frame["method"]) == ["emloc_anchored"] * 2


def choose_anchor(run: Path, choice: str) -> None:
    """Make the folder of a run one of a run with this choice."""
    path = run / "choices.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"anchor": choice}))


def test_a_run_from_before_anchors_is_one_without_them(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "emloc", 0.5, seed)
    choose_anchor(tmp_path / "emloc-llama3_8b-gsm8k-s1", "none")
    rows = rows_of(tmp_path)
    assert [one.settings["anchor"] for one in rows] == ["none", "none"]
    assert list(table_of(summary_of(rows)).frame["seeds"]) == ["0 1"]


def test_the_file_of_anchored_runs_keeps_the_choice_that_names_them(tmp_path):
    rows = [trained("emloc_uncorrected", 0.5, ANCHORS, seed=seed) for seed in (0, 1)]
    write_rows(rows, tmp_path / "rows.csv")
    assert [one.named_method for one in rows_of(tmp_path / "rows.csv")] == ["emloc_anchored"] * 2
    write_rows([replace(one, settings=PLAIN) for one in rows], tmp_path / "plain.csv")
    head = (tmp_path / "plain.csv").read_text().splitlines()[0].split(",")
    assert "compression.ratio" in head
    assert "anchor" not in head


def test_rejected_rounds_have_a_column_only_where_there_are_some():
    def shown(*counts: float) -> tuple[str, list[str]]:
        rows = [
            trained("emloc_anchored", 0.5, ANCHORS | {"anchor.rounds": str(at)}, rejected_rounds=n)
            for at, n in enumerate(counts)
        ]
        rows.append(trained("emloc", 0.4, CORRECTED))
        table = table_of(summary_of(rows))
        return markdown(table), notes_of(table)

    text, notes = shown(2, 0)
    assert "rejected rounds" in text
    assert any(note.startswith("rejected rounds: rounds of an anchored") for note in notes)
    text, notes = shown(0, 0)
    assert "rejected rounds" not in text + "".join(notes)


def test_the_numbers_of_rounds_are_those_of_the_results(tmp_path):
    write_run(tmp_path, "emloc", 0.5)
    (path,) = tmp_path.glob("*/metrics.json")
    facts = {"facts": {"train": {"passes": 5, "rejected_rounds": 1}}}
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    (one,) = rows_of(tmp_path)
    assert (one.numbers["passes"], one.numbers["rejected_rounds"]) == (5, 1)
    write_rows([one], tmp_path / "rows.csv")
    assert rows_of(tmp_path / "rows.csv")[0].numbers == one.numbers


def test_a_lora_with_anchors_is_no_reference_for_the_gain(tmp_path):
    for method, score in (("zero_shot", 0.0), ("lora", 0.5), ("emloc", 0.25)):
        write_run(tmp_path, method, score, method=method)
    gains = {one.method: one.numbers.get("gain_kept") for one in rows_of(tmp_path)}
    assert gains == {"zero_shot": 0.0, "lora": 1.0, "emloc": 0.5}
    choose_anchor(tmp_path / "lora-llama3_8b-gsm8k-s0", "blocks")
    assert all("gain_kept" not in one.numbers for one in rows_of(tmp_path))


# Figures -----------------------------------------------------------------------------------------


def points(axes: Axes) -> dict[tuple[float, float], str]:
    """Position -> marker of each method."""
    lines = [line for line in axes.get_lines() if line.get_label() == "_marker"]
    return {tuple(map(float, line.get_xydata()[0])): line.get_marker() for line in lines}


def arrows(axes: Axes) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Start and end of each arrow."""
    return [
        (text.xyann, text.xy)
        for text in axes.texts
        if text.arrow_patch is not None and text.arrowprops["arrowstyle"] == "->"
    ]


def pareto(*rows: Row) -> Drawing:
    (memory,) = [kind for kind in cost.COSTS if kind.stem == "score_memory"]
    with rc_context(RC):
        return cost.draw(rows, memory, columns=2)["score_memory"]


def training_curve(folder: Path) -> Drawing:
    with rc_context(RC):
        return curve.draw(rows_of(folder), folder, columns=2)["training_curve"]


def test_an_arrow_leads_to_a_method_with_anchors_from_the_one_without():
    drawing = pareto(
        trained("lora", 0.9, PLAIN | {"emulator": "full"}, 9.0),
        trained("emloc", 0.3, CORRECTED, 4.0),
        trained("emloc_uncorrected", 0.4, PLAIN, 5.0),
        trained("emloc_anchored", 0.7, ANCHORS, 6.0),
        trained("emloc_anchored", 0.8, ANCHORS | {"compression.ratio": "0.5"}, 8.0),
    )
    (axes,) = drawing.figure.axes
    assert arrows(axes) == [((5.0, 0.4), (6.0, 0.7))]  # of the other ratio there is none without
    marker_of = points(axes)
    assert {marker_of[6.0, 0.7], marker_of[8.0, 0.8]} == {"s"}
    assert {marker_of[9.0, 0.9], marker_of[4.0, 0.3], marker_of[5.0, 0.4]} == {"o"}
    assert "Squares are methods with anchors. An arrow leads to" in drawing.caption


def test_where_only_the_corrected_method_ran_the_arrow_leads_from_it():
    drawing = pareto(
        trained("lora", 0.9, PLAIN | {"emulator": "full"}, 9.0),
        trained("emloc", 0.3, CORRECTED, 4.0),
        trained("emloc_uncorrected", 0.7, ANCHORS, 6.0),
    )
    assert arrows(drawing.figure.axes[0]) == [((4.0, 0.3), (6.0, 0.7))]


def test_a_figure_without_anchors_says_nothing_of_them():
    drawing = pareto(
        trained("lora", 0.9, PLAIN | {"emulator": "full"}, 9.0),
        trained("emloc", 0.3, CORRECTED, 4.0),
        trained("emloc_uncorrected", 0.4, PLAIN, 5.0),
    )
    assert arrows(drawing.figure.axes[0]) == []
    assert "nchors" not in drawing.caption


@pytest.mark.parametrize(
    ("method", "anchored"),
    [
        ("emloc", "emloc_anchored"),
        ("emloc_nf4", "emloc_nf4_anchored"),
        ("qlora", "qlora_anchored"),
        ("upop", "upop anchor=blocks"),
        ("of_a_plug_in", "of_a_plug_in anchor=blocks"),
    ],
)
def test_anchors_keep_the_colour_and_change_marker_and_dash(method, anchored):
    styles = line_styles([(method, method, False), (anchored, anchored, False)])
    assert styles[anchored].colour == styles[method].colour
    assert styles[anchored].marker != styles[method].marker
    assert styles[anchored].dash != styles[method].dash


def test_the_rounds_are_an_axis_of_their_own():
    rows = [
        trained("emloc_anchored", int(rounds) / 10, ANCHORS | {"anchor.rounds": rounds})
        for rounds in ("1", "4", "8")
    ]
    (rounds,) = [one for one in sweep.sweeps(rows) if one.setting == "anchor.rounds"]
    with rc_context(RC):
        drawing = sweep.draw(rows, rounds, columns=2)["score_rounds"]
    assert drawing.figure.axes[0].get_xlabel() == "rounds of the anchored training"


# The training curve ------------------------------------------------------------------------------


def write_rounds(folder: Path, seed: int, *lines: dict) -> None:
    write_run(folder, "emloc", 0.5, seed)
    path = folder / f"emloc-llama3_8b-gsm8k-s{seed}" / "anchors.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def pass_at(step: int, loss: float, **more) -> dict:
    return {"step": step, "schedule_step": step, "rate": 1.0, "original_loss": loss, **more}


def marks(axes: Axes, label: str) -> list[tuple[float, float]]:
    lines = [bar.lines[0] for bar in axes.containers if bar.get_label() == label]
    return [tuple(map(float, point)) for line in lines for point in line.get_xydata()]


def test_the_originals_loss_is_on_the_curve_at_the_ends_of_the_rounds(tmp_path):
    write_rounds(tmp_path, 0, pass_at(0, 2.0), pass_at(4, 1.5), pass_at(8, 1.0))
    write_run(tmp_path, "lora", 0.5)
    drawing = training_curve(tmp_path)
    (axes,) = drawing.figure.axes
    assert marks(axes, "_original") == [(0.0, 2.0), (4.0, 1.5), (8.0, 1.0)]
    assert marks(axes, "_rejected") == []
    markers = {line.get_label(): line.get_marker() for line in axes.get_lines()}
    assert markers["lora"] in ("", "None")
    assert markers["emloc"] == line_styles([("emloc", "emloc", False)])["emloc"].marker
    assert "Markers are the loss of the original with the adapter" in drawing.caption
    assert "cross" not in drawing.caption
    losses = [one["loss of the original (nats)"] for one in drawing.records if "rejected" in one]
    assert losses == [2.0, 1.5, 1.0]


def test_rejected_rounds_are_crosses_and_accepted_ones_the_mean_over_seeds(tmp_path):
    worse = {"change": 1.0, "error": 0.1, "rejected": True}
    write_rounds(tmp_path, 0, pass_at(0, 2.0), pass_at(4, 3.0, **worse), pass_at(4, 2.0))
    write_rounds(tmp_path, 1, pass_at(0, 1.0), pass_at(4, 1.0), pass_at(8, 0.5))
    drawing = training_curve(tmp_path)
    (axes,) = drawing.figure.axes
    assert marks(axes, "_original") == [(0.0, 1.5), (4.0, 1.5)]  # seed 0 has none at step 8
    assert marks(axes, "_rejected") == [(4.0, 3.0)]
    assert "A cross is a round that has raised this loss and was undone." in drawing.caption
    rejections = [one for one in drawing.records if one.get("rejected") == "yes"]
    assert [(one["step"], one["seeds"]) for one in rejections] == [(4, 1)]


@pytest.mark.parametrize("line", [{"step": 0, "rate": 1.0}, pass_at(0, float("inf"))])
def test_passes_without_a_finite_loss_leave_no_mark(tmp_path, line):
    write_rounds(tmp_path, 0, line)
    drawing = training_curve(tmp_path)
    assert marks(drawing.figure.axes[0], "_original") == []
    assert "original" not in drawing.caption
