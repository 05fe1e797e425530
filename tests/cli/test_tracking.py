"""Runs as W&B sees them: what is in the offline runs that `wandb sync` would send."""

import json
import math
from pathlib import Path

from inspected import entries
from transformers import Trainer


def interrupt_training(patch) -> None:
    """The training of this process is interrupted in its fourth step, as by Ctrl-C."""
    step, count = Trainer.training_step, iter(range(1, 100))

    def interrupted(*arguments, **named):
        if next(count) == 4:
            raise KeyboardInterrupt
        return step(*arguments, **named)

    patch.setattr(Trainer, "training_step", interrupted)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(found: list[dict]) -> list[int]:
    return [line["train/step"] for line in found if "train/loss" in line]


def test_all_that_a_run_knows_is_in_its_record_and_in_wandb(emloc, tiny, one_run, tmp_path):
    run = ("method=emloc_nf4", "eval.harness=false", "tracker=wandb", "tracker.adapter=true")
    done = emloc.process(*tiny, *run, HOME=str(tmp_path / "home"))
    assert done.code == 0, done.said
    assert not list((tmp_path / "home").rglob("*wandb*"))
    assert "wandb" not in done.said.lower()

    recorded = lines(one_run())
    assert steps(recorded) == [1, 2, 3, 4, 5]
    numbers = {name: value for line in recorded for name, value in line.items()}
    assert all(math.isfinite(value) for value in numbers.values())
    stages = ("calibrate", "emulate", "train", "recover", "evaluate", "as_trained")
    assert {name.split("/")[0] for name in numbers} == set(stages)
    for stage in stages:
        assert {f"{stage}/{name}" for name in ("seconds", "peak_gib", "cached")} <= set(numbers)
    assert {"train/loss", "train/learning_rate", "train/trainable"} <= set(numbers)
    assert {"emulate/bytes", "emulate/parameters", "emulate/share_of_linears"} <= set(numbers)
    metrics = json.loads((one_run() / "metrics.json").read_text())
    assert numbers["evaluate/loss"] == metrics["scores"]["loss"]
    assert numbers["as_trained/loss"] == metrics["scores_as_trained"]["loss"]

    (entry,) = entries(one_run())
    last = {"train/step": 5}  # which W&B adds to all that is drawn over it
    assert entry.history == [line | (last if "train/seconds" in line else {}) for line in recorded]
    assert entry.exit_code == 0
    predictions = [json.loads(line) for line in (one_run() / "predictions.jsonl").open()]
    assert [
        {name: value for name, value in row.items() if name != "loss"}
        for row in entry.table("predictions")
    ] == predictions
    layers = json.loads((one_run() / "layers.json").read_text())
    assert {row["layer"]: row["kept"] for row in entry.table("layers")} == {
        layer: line["kept"] for layer, line in layers.items()
    }
    assert len(entry.table("correction")) == len(layers) == 14
    kinds = [artifact["type"] for artifact in entry.of("artifact")]
    assert sorted(kinds) == ["adapter", "run_table", "run_table", "run_table"]
    assert list((entry.folder / "files/media/images/figures").glob("layers_[0-9]*.png"))


def test_an_interrupted_run_goes_on_as_the_same_run_with_no_step_twice(
    emloc, tiny, one_run, monkeypatch
):
    run = (*tiny, "method=lora", "eval.harness=false", "tracker=wandb", "train.save_every=2")
    with monkeypatch.context() as patch:
        interrupt_training(patch)
        first = emloc(*run)
    assert first.code == 130, first.said
    assert steps(lines(one_run())) == [1, 2, 3]
    second = emloc(*run)
    assert second.code == 0, second.said
    curve = [json.loads(line) for line in (one_run() / "curve.jsonl").open()]
    recorded = lines(one_run())
    assert [line["train/loss"] for line in recorded if "train/loss" in line] == [
        line["loss"] for line in curve
    ]
    assert steps(recorded) == [line["step"] for line in curve] == [1, 2, 3, 4, 5]

    left, continued = entries(one_run())
    assert (left.exit_code, continued.exit_code) == (130, 0)
    assert left.summary["state"] == "interrupted"
    assert (continued.summary["state"], continued.summary["error"]) == ("done", "")
    assert continued.run["run_id"] == left.run["run_id"]
    assert continued.run["resume"]
    assert steps(left.history) == [1, 2, 3]
    assert steps(continued.history) == [4, 5]


def test_a_failed_run_is_a_failed_run_and_a_shared_training_is_in_every_record(
    emloc, tiny, tmp_path
):
    sweep = ("-m", "method=lora", "train.learning_rate=2e-3,1e30", "eval.limit=3,4", "name=rates")
    ran = emloc(*sweep, *tiny, "eval.harness=false", "tracker=wandb")
    assert ran.code == 1, ran.said
    done, failed = [], []
    for path in sorted((tmp_path / "runs/rates").glob("*/status.json")):
        state = json.loads(path.read_text())["state"]
        {"done": done, "failed": failed}[state].append(path.parent)
    assert (len(done), len(failed)) == (2, 2)

    cached = []
    for run in done:
        recorded = lines(run)
        assert steps(recorded) == [1, 2, 3, 4, 5]
        (entry,) = entries(run)
        assert steps(entry.history) == [1, 2, 3, 4, 5]
        cached += [line["train/cached"] for line in recorded if "train/cached" in line]
    assert sorted(cached) == [False, True]

    (entry,) = entries(failed[0])
    assert entry.exit_code == 1
    assert (entry.summary["state"], entry.summary["stage"]) == ("failed", "train")
    assert "FloatingPointError: the loss is nan" in entry.summary["error"]
