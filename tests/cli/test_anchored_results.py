"""What a run with anchors leaves in its folder."""

import json
from pathlib import Path

from emloc.report.draw.round_marks import round_marks
from emloc.report.rows import rows_of


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def training_lines(lines: list[dict]) -> list[dict]:
    """Losses of all steps and passes, in the order of the steps."""
    names = ("train/step", "train/loss", "train/original_loss", "train/rejected_loss")
    some = [{name: line[name] for name in names if name in line} for line in lines]
    return sorted(filter(None, some), key=lambda line: (line["train/step"], sorted(line)))


def test_the_rounds_of_a_training_are_in_all_files_of_each_run_that_shares_it(
    emloc, tiny, tmp_path
):
    anchors = ("anchor.places=2", "anchor.rounds=2", "anchor.guard=3")
    sweep = ("-m", "method=emloc_anchored", "eval.limit=3,4", "eval.harness=false", "name=rounds")
    ran = emloc(*tiny, *sweep, *anchors)
    assert ran.code == 0, ran.output
    first, second = sorted((tmp_path / "runs/rounds").glob("*/anchors.jsonl"))
    passes = read_lines(first)
    assert [line["step"] for line in passes] == [0, 2, 5]
    assert passes == read_lines(second)

    recorded = [read_lines(path.parent / "metrics.jsonl") for path in (first, second)]
    assert training_lines(recorded[0]) == training_lines(recorded[1])
    losses = {
        line["train/step"]: line["train/original_loss"]
        for line in recorded[0]
        if "train/original_loss" in line
    }
    rejected = sum(line.get("rejected", False) for line in passes)
    assert losses == {
        line["step"]: line["original_loss"] for line in passes if not line.get("rejected")
    }
    assert [line["train/step"] for line in recorded[0] if "train/loss" in line] == [1, 2, 3, 4, 5]

    for path in (first, second):
        metrics = json.loads((path.parent / "metrics.json").read_text())
        assert metrics["facts"]["train"] == {"passes": 3, "rejected_rounds": rejected}
    rows = rows_of(tmp_path / "runs/rounds")
    assert [row.named_method for row in rows] == ["emloc_anchored"] * 2
    marks = round_marks(tmp_path / "runs/rounds", rows[:1])
    assert {mark.step: mark.loss.mean for mark in marks if not mark.is_rejected} == losses
