"""The content of the offline W&B runs, which `wandb sync` would upload."""

import json
import math
from pathlib import Path

from inspected import offline_runs
from transformers import Trainer


def interrupt_training(patch) -> None:
    """Interrupt the training in this process in its fourth step, as Ctrl-C would."""
    step, count = Trainer.training_step, iter(range(1, 100))

    def interrupted(*arguments, **named):
        if next(count) == 4:
            raise KeyboardInterrupt
        return step(*arguments, **named)

    patch.setattr(Trainer, "training_step", interrupted)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(recorded: list[dict]) -> list[int]:
    return [line["train/step"] for line in recorded if "train/loss" in line]


def test_all_metrics_and_tables_of_a_run_are_in_its_files_and_in_wandb(
    emloc, tiny, one_run, tmp_path
):
    run = ("method=emloc_nf4", "eval.harness=false", "tracker=wandb", "tracker.adapter=true")
    done = emloc.fork(*tiny, *run, HOME=str(tmp_path / "home"))
    assert done.code == 0, done.output
    assert not list((tmp_path / "home").rglob("*wandb*"))
    assert "wandb" not in done.output.lower()

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

    (entry,) = offline_runs(one_run())
    last = {"train/step": 5}  # W&B adds the last step to metrics that are plotted over it
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


def test_an_interrupted_run_resumes_as_the_same_wandb_run_without_repeated_steps(
    emloc, tiny, one_run, monkeypatch
):
    run = (*tiny, "method=lora", "eval.harness=false", "tracker=wandb", "train.save_every=2")
    with monkeypatch.context() as patch:
        interrupt_training(patch)
        first = emloc(*run)
    assert first.code == 130, first.output
    assert steps(lines(one_run())) == [1, 2, 3]
    second = emloc(*run)
    assert second.code == 0, second.output
    curve = [json.loads(line) for line in (one_run() / "curve.jsonl").open()]
    recorded = lines(one_run())
    assert [line["train/loss"] for line in recorded if "train/loss" in line] == [
        line["loss"] for line in curve
    ]
    assert steps(recorded) == [line["step"] for line in curve] == [1, 2, 3, 4, 5]

    interrupted, resumed = offline_runs(one_run())
    assert (interrupted.exit_code, resumed.exit_code) == (130, 0)
    assert interrupted.summary["state"] == "interrupted"
    assert (resumed.summary["state"], resumed.summary["error"]) == ("done", "")
    assert resumed.run["run_id"] == interrupted.run["run_id"]
    assert resumed.run["resume"]
    assert steps(interrupted.history) == [1, 2, 3]
    assert steps(resumed.history) == [4, 5]


def test_failed_runs_are_marked_and_a_shared_training_is_recorded_in_each_run(
    emloc, tiny, tmp_path
):
    sweep = ("-m", "method=lora", "train.learning_rate=2e-3,1e30", "eval.limit=3,4", "name=rates")
    ran = emloc(*sweep, *tiny, "eval.harness=false", "tracker=wandb")
    assert ran.code == 1, ran.output
    done, failed = [], []
    for path in sorted((tmp_path / "runs/rates").glob("*/status.json")):
        state = json.loads(path.read_text())["state"]
        {"done": done, "failed": failed}[state].append(path.parent)
    assert (len(done), len(failed)) == (2, 2)

    cached = []
    for run in done:
        recorded = lines(run)
        assert steps(recorded) == [1, 2, 3, 4, 5]
        (entry,) = offline_runs(run)
        assert steps(entry.history) == [1, 2, 3, 4, 5]
        cached += [line["train/cached"] for line in recorded if "train/cached" in line]
    assert sorted(cached) == [False, True]

    (entry,) = offline_runs(failed[0])
    assert entry.exit_code == 1
    assert (entry.summary["state"], entry.summary["stage"]) == ("failed", "train")
    assert "FloatingPointError: the loss is nan" in entry.summary["error"]
