"""Figures of files that runs leave: training curves, and what the correction did."""

import json
from pathlib import Path

import pytest
from reported import write_run

from emloc.report.draw.drawing import Drawing
from emloc.report.figures import drawings
from emloc.report.rows import rows_of


def draw(folder: Path) -> dict[str, Drawing]:
    return drawings(rows_of(folder), folder)


def write_curve(folder: Path, run: str, losses: list[float]) -> None:
    lines = [json.dumps({"step": 5 * at, "loss": loss}) for at, loss in enumerate(losses, 1)]
    (folder / f"{run}-llama3_8b-gsm8k-s0" / "curve.jsonl").write_text("\n".join(lines) + "\n")


# Training curve ----------------------------------------------------------------------------------


def test_a_curve_is_the_mean_over_seeds_at_the_steps_that_all_seeds_have(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "lora", 0.5, seed)
    write_curve(tmp_path, "lora", [4.0, 3.0])
    (tmp_path / "lora-llama3_8b-gsm8k-s1" / "curve.jsonl").write_text(
        '{"step": 5, "loss": 2.0}\n{"step": 10, "loss": 1.0}\n{"step": 15, "loss": 1.0}\n'
    )
    found = draw(tmp_path)["training_curve"]
    (line,) = found.figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [5, 10]
    assert list(line.get_ydata()) == [3.0, 2.0]
    assert len(found.figure.axes[0].collections) == 1  # the band
    assert [one["seeds"] for one in found.records] == [2, 2]
    assert found.caption.endswith("Lines are means over seeds, bands are the standard deviation.")
    assert found.figure.axes[0].get_xlabel() == "training step"


def test_equal_curves_alternate_so_that_each_of_them_is_seen(tmp_path):
    methods = ("emloc", "emloc_covariance", "emloc_uncorrected")
    for method in (*methods, "lora"):
        write_run(tmp_path, method, 0.5)
    write_curve(tmp_path, "lora", [9.0, 8.0])
    found = draw(tmp_path)["training_curve"]
    patterns = {one.get_label(): one._unscaled_dash_pattern for one in found.figure.axes[0].lines}
    assert patterns["lora"] == (0, None)
    seen = set()
    for method in methods:
        offset, (dash, gap) = patterns[method]
        assert gap == pytest.approx(2 * dash)
        seen.add(-offset % (dash + gap))
    assert seen == {0, dash, 2 * dash}  # each fills a third that the others leave free
    assert "share a line of alternating colours" in found.caption


def test_runs_without_curves_have_no_figure_of_them(tmp_path):
    write_run(tmp_path, "zero_shot", 0.5)
    assert "training_curve" not in draw(tmp_path)


# What the correction did -------------------------------------------------------------------------


def write_correction(folder: Path, table: dict) -> None:
    path = folder / "emloc-llama3_8b-gsm8k-s0" / "correction.json"
    path.write_text(json.dumps(table))


def facts(ratio: float | None, clamped: float, before: float, after: float) -> dict:
    known = {"directions": 8, "ratio": ratio, "clamped": clamped, "removed": before - after}
    return known | {"mismatch_before": before, "mismatch_after": after}


def test_the_correction_is_drawn_by_block_with_all_that_it_did(tmp_path):
    write_run(tmp_path, "emloc", 0.5)
    table = {
        "model.layers.0.self_attn.q_proj": facts(2.0, 0.5, 10.0, 5.0),
        "model.layers.0.self_attn.k_proj": facts(4.0, 1.0, 20.0, 15.0),
        "model.layers.1.self_attn.q_proj": facts(None, 0.0, 8.0, 6.0),
        "model.layers.1.self_attn.k_proj": facts(1.0, 0.0, 8.0, 8.0),
    }
    write_correction(tmp_path, table)
    found = draw(tmp_path)["correction_llama3_8b_gsm8k"]
    size, clamped, residual, removed = found.figure.axes
    lines = [[list(line.get_ydata()) for line in axes.get_lines()] for axes in found.figure.axes]
    assert lines[0][0] == [3.0, 1.0]  # medians over the layers of a block
    assert lines[0][1] == [1, 1]  # as large as the LoRA
    assert lines[1] == [[0.75, 0.0]]
    assert lines[2][:2] == [[10.0, 7.0], [15.0, 8.0]]  # after, before
    assert lines[3] == [[0.375, 0.125]]
    assert size.get_yscale() == residual.get_yscale() == removed.get_yscale() == "log"
    assert clamped.get_ylabel() == "share of directions"
    assert len(found.records) == 4
    assert found.records[0]["layer"] == "model.layers.0.self_attn.q_proj"
    # 12 of 32 directions; the mean of 50%, 25%, 25% and 0%
    assert "emloc: the clamp shortened 38% of the directions, the correction removed 25.0% of" in (
        found.caption
    )


def test_every_corrected_method_is_a_line(tmp_path):
    write_run(tmp_path, "emloc", 0.5)
    write_run(tmp_path, "emloc_covariance", 0.4)
    write_run(tmp_path, "lora", 0.6)
    labels = {one["label"] for one in draw(tmp_path)["correction_llama3_8b_gsm8k"].records}
    assert labels == {"emloc", "emloc_covariance"}


def test_language_and_vision_are_figures_of_their_own(tmp_path):
    write_run(tmp_path, "emloc", 0.5)
    towers = ("model.language_model.layers", "model.vision_tower.encoder.layer")
    write_correction(tmp_path, {f"{tower}.0.fc1": facts(1.0, 0.0, 2.0, 1.0) for tower in towers})
    stems = [stem for stem in draw(tmp_path) if stem.startswith("correction")]
    assert stems == [f"correction_llama3_8b_gsm8k_{name}" for name in ("language", "vision")]


def test_a_file_that_is_about_no_layers_is_no_figure(tmp_path):
    write_run(tmp_path, "emloc", 0.5)
    write_correction(tmp_path, {"dropped": [1, 2], "bits": 16})
    assert not [name for name in draw(tmp_path) if name.startswith("correction")]
