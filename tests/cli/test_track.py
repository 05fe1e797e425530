"""The metrics file of a run, and what the tracker W&B receives."""

import json
import logging
import math
import os
import re
import subprocess
import sys
import time

import pytest
from inspected import offline_runs
from omegaconf import OmegaConf

from emloc.config.run_folder import Run
from emloc.errors import ConfigError
from emloc.report.tracking.artifacts import PREDICTIONS, table_of_runs, tables_of_run
from emloc.report.tracking.metrics_log import Record, stage_line, training_line
from emloc.report.tracking.trackers import Nothing, Wandb, compare

SETTINGS = {"project": "emloc", "entity": None, "mode": "offline", "adapter": False}
PROVENANCE = {"commit": "abc", "versions": {"torch": "2"}}


@pytest.fixture
def tracker():
    return Wandb(**SETTINGS)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home folder, where W&B must find no settings."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ERROR_REPORTING"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path / "home"
    assert not list((tmp_path / "home").rglob("*wandb*"))


@pytest.fixture
def start_run(tmp_path):
    """Function that starts a run as `emloc` does."""

    def begin(name: str = "emloc-tiny-sums-s0-12345678") -> Run:
        sections = {"model": {"name": "tiny"}, "task": {"name": "sums"}, "lora": {"rank": 8}}
        run = Run(tmp_path / "runs" / "demo" / name)
        sections["tracker"] = {"_target_": "emloc.report.tracking.trackers.Wandb", **SETTINGS}
        run.begin(OmegaConf.create({"name": "demo", "method": "emloc", "seed": 0, **sections}), {})
        return run

    return begin


def results(score: float = 0.5) -> dict:
    return {
        "method": "emloc",
        "metric": "exact_match",
        "score": score,
        "scores": {"exact_match": score, "loss": 1.0},
        "data": {"name": "sums"},
        "emulator": {"bytes": 1000},
        "seconds": {"train": 1.0},
        "peak_gib": {"train": 0.5},
        "provenance": PROVENANCE,
    }


def lines(run: Run) -> list[dict]:
    text = (run.folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def write_lines(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class RecordingTracker:
    """A tracker, and at the same time its session, that records all calls."""

    def __init__(self, fails: bool = False) -> None:
        self.lines, self.status, self.last, self.fails = [], None, None, fails

    def start(self, folder, config, last):
        self.last = last
        return self

    def log(self, line):
        if self.fails:
            raise ConnectionResetError("it is gone")
        self.lines.append(dict(line))

    def close(self, status):
        self.status = status

    def compare(self, folder, group):
        raise NotImplementedError


# The record --------------------------------------------------------------------------------------


def test_logged_metrics_are_written_to_the_file_and_sent_to_the_tracker(start_run):
    run, tracker = start_run(), RecordingTracker()
    with Record(run) as record:
        record.follow(tracker)
        record.add(training_line(10, {"loss": 1.5, "learning_rate": 1e-4}))
        assert lines(run) == tracker.lines
        record.add(stage_line("train", {"seconds": 2.5, "note": "x", "samples": ["a"]}))
        run.finish(results())
    first = {"train/loss": 1.5, "train/learning_rate": 1e-4, "train/step": 10}
    assert lines(run) == tracker.lines == [first, {"train/seconds": 2.5}]
    assert (tracker.last, tracker.status["state"]) == (-1, "done")


def test_scores_of_a_stage_are_logged_by_their_names():
    facts = {"scores": {"loss": 1.5, "exact_match/even": 0.5}, "rows": 6, "seconds": 0.1}
    assert stage_line("evaluate", facts) == {
        "evaluate/rows": 6,
        "evaluate/seconds": 0.1,
        "evaluate/loss": 1.5,
        "evaluate/exact_match/even": 0.5,
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_logged_as_null(start_run, value):
    run = start_run()
    with Record(run) as record:
        record.add({"evaluate/loss": value, "evaluate/rows": 6})
    assert lines(run) == [{"evaluate/loss": None, "evaluate/rows": 6}]


def attempt(
    run: Run, *steps: int, tracker: RecordingTracker | None = None, loss: float = 1.0
) -> None:
    with Record(run) as record:
        record.follow(tracker or Nothing())
        for step in steps:
            record.add(training_line(step, {"loss": loss}))


def test_a_resumed_training_logs_each_step_once(start_run):
    attempt(start_run(), 10, 20, 30, 40)
    tracker = RecordingTracker()
    attempt(start_run(), 30, 40, 50, tracker=tracker, loss=2.0)
    losses_by_step = [(line["train/step"], line["train/loss"]) for line in lines(start_run())]
    assert losses_by_step == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 2.0)]
    assert tracker.lines == lines(start_run())
    assert tracker.last == 40


def test_a_restarted_training_removes_the_steps_of_the_last_attempt(start_run):
    attempt(start_run(), 10, 20, 30)
    attempt(start_run(), 10, loss=2.0)
    assert lines(start_run()) == [{"train/loss": 2.0, "train/step": 10}]


def pass_line(step: int, loss: float, name: str = "original_loss") -> dict[str, float]:
    return {f"train/{name}": loss, "train/step": step}


def test_the_originals_loss_is_a_line_beside_the_loss_of_its_step(start_run):
    run = start_run()
    with Record(run) as record:
        record.add(stage_line("emulate", {"seconds": 1.0}))
        assert record.last == -1
        record.add(training_line(0, {"original_loss": 3.0}))
        assert record.last == 0
        record.add(training_line(5, {"loss": 2.0}))
        record.add(training_line(5, {"rejected_loss": 4.0}))
        record.add(training_line(5, {"original_loss": 3.0}))
    assert lines(run) == [
        {"emulate/seconds": 1.0},
        pass_line(0, 3.0),
        {"train/loss": 2.0, "train/step": 5},
        pass_line(5, 4.0, "rejected_loss"),
        pass_line(5, 3.0),
    ]


def test_passes_that_a_resumed_training_repeats_replace_no_losses(start_run):
    for loss, steps in ((1.0, (1, 2, 3, 4)), (2.0, (4, 5))):
        with Record(start_run()) as record:
            for step in (0, 2):
                record.add(training_line(step, {"original_loss": loss}))
            for step in steps:
                record.add(training_line(step, {"loss": loss}))
    recorded = lines(start_run())
    losses_by_step = [
        (one["train/step"], one["train/loss"]) for one in recorded if "train/loss" in one
    ]
    assert losses_by_step == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]
    assert [one for one in recorded if "train/loss" not in one] == [
        pass_line(0, 2.0),
        pass_line(2, 2.0),
    ]


def test_a_tracker_receives_the_metrics_of_earlier_attempts(start_run):
    attempt(start_run(), 10, 20)
    tracker = RecordingTracker()
    attempt(start_run(), tracker=tracker)
    assert [line["train/step"] for line in tracker.lines] == [10, 20]


def test_a_repeated_stage_replaces_only_its_own_line(start_run):
    for seconds in (1.0, 2.0):
        with Record(start_run()) as record:
            if seconds == 1.0:
                record.add(training_line(10, {"loss": 1.5}))
            record.add(stage_line("emulate", {"seconds": seconds}))
            record.add(stage_line("train", {"seconds": seconds}))
    assert lines(start_run()) == [
        {"train/loss": 1.5, "train/step": 10},
        {"emulate/seconds": 2.0},
        {"train/seconds": 2.0},
    ]


def test_an_incomplete_last_line_is_dropped(start_run):
    run = start_run()
    whole = '{"train/step": 10}\n'
    (run.folder / "metrics.jsonl").write_text(whole + '{"train/st')
    attempt(start_run(), 20)
    assert [line["train/step"] for line in lines(run)] == [10, 20]


def test_a_failing_tracker_does_not_fail_the_run_and_warns_once(start_run, caplog):
    tracker = RecordingTracker(fails=True)
    with caplog.at_level(logging.WARNING):
        attempt(start_run(), 10, 20, 30, tracker=tracker)
    assert len(lines(start_run())) == 3
    assert len(caplog.messages) == 1
    assert "ConnectionResetError: it is gone" in caplog.text
    assert tracker.status["state"] == "running"  # the session is closed in spite of the failure


# Tables ------------------------------------------------------------------------------------------


def test_the_table_of_predictions_has_losses_and_answers_and_a_first_part(tmp_path):
    count = PREDICTIONS + 5
    rows = [{"id": f"test/{i}", "nll": 6.0 + i, "tokens": 4, "right": 2} for i in range(count)]
    write_lines(tmp_path / "predictions.jsonl", rows)
    answers = [{"id": f"test/{i}", "answer": f"é{i}", "references": ["a", "b"]} for i in (1, 0)]
    write_lines(tmp_path / "answers.jsonl", answers)
    table = tables_of_run(tmp_path)["predictions"]
    assert table.columns == ["id", "loss", "nll", "tokens", "right", "answer", "references"]
    assert len(table.rows) == PREDICTIONS == 200
    assert table.rows[1] == ["test/1", 1.75, 7.0, 4, 2, "é1", '["a", "b"]']
    assert table.rows[2][-2:] == [None, None]


def test_only_files_with_one_entry_per_layer_become_tables(tmp_path):
    spectrum = {"index": [1], "energy": [0.5]}
    layers = {"a": {"rank": 3, "shape": [2, 4], "spectrum": spectrum}, "b": {"rank": 5}}
    (tmp_path / "layers.json").write_text(json.dumps(layers))
    (tmp_path / "correction.json").write_text(json.dumps({"dropped": [1, 2], "bits": 16}))
    tables = tables_of_run(tmp_path)
    assert list(tables) == ["layers"]
    assert tables["layers"].columns == ["layer", "rank", "shape"]
    assert tables["layers"].rows == [["a", 3, "[2, 4]"], ["b", 5, None]]


def test_the_table_of_runs_has_the_settings_that_differ_and_the_numbers(start_run, tmp_path):
    for name, score in (("one", 0.25), ("two", 0.75)):
        run = start_run(name)
        config = OmegaConf.create(run.config | {"lora": {"rank": int(score * 8)}})
        run.begin(config, {"method": "emloc"})
        run.finish(results(score))
    table = table_of_runs(tmp_path / "runs" / "demo")
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["run"] for row in rows] == ["one", "two"]
    assert [row["lora.rank"] for row in rows] == ["2", "6"]
    assert [row["score"] for row in rows] == [0.25, 0.75]
    assert "task.name" not in table.columns


# Weights & Biases --------------------------------------------------------------------------------


def finished(run: Run, tracker: Wandb) -> None:
    """Do a whole run with a tracker and leave the usual files in its folder."""
    with Record(run) as record:
        record.follow(tracker)
        for step in (1, 2, 3):
            record.add(training_line(step, {"loss": 1 / step}))
        rows = [{"id": f"test/{i}", "nll": 6.0 + i, "tokens": 4} for i in range(3)]
        write_lines(run.folder / "predictions.jsonl", rows)
        adapter = run.folder / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "hub/tiny"}')
        (adapter / "adapter_model.safetensors").write_bytes(b"weights")
        record.add(stage_line("evaluate", {"scores": {"loss": 1.0}}))
        run.finish(results())


def test_an_offline_wandb_run_contains_all_data_of_the_run(start_run, tracker, home):
    run = start_run()
    finished(run, tracker)
    (entry,) = offline_runs(run.folder)
    described = entry.run
    assert described["run_group"] == "demo"
    assert described["display_name"] == run.folder.name
    assert re.fullmatch(f"demo-{run.folder.name}-[0-9a-f]{{8}}", described["run_id"])
    assert described["job_type"] == "emloc"
    assert described["tags"] == ["tiny", "sums"]
    config = described["config"]["update"]
    assert {k: v for k, v in config.items() if k != "_wandb"} == run.config
    assert entry.history == lines(run)
    assert any(one.get("step_metric") == "train/step" for one in entry.of("metric"))
    assert entry.exit_code == 0
    assert entry.summary["state"] == "done"
    assert entry.summary["score"] == 0.5
    assert entry.table("predictions")[2] == {"id": "test/2", "loss": 2.0, "nll": 8.0, "tokens": 4}
    assert [one["type"] for one in entry.of("artifact")] == ["run_table"]


def test_wandb_receives_nothing_about_the_machine_or_the_code(start_run, tracker):
    run = start_run()
    finished(run, tracker)
    (entry,) = offline_runs(run.folder)
    kinds = {record["type"] for record in entry.records}
    assert not {"environment", "stats", "output", "output_raw"} & kinds
    assert "git" not in entry.run
    files = {path.name for path in (entry.folder / "files").iterdir()}
    assert files == {"media"}


def test_tracker_adapter_logs_the_adapter_without_a_copy(start_run, tracker):
    run = start_run()
    wishes = Wandb(**SETTINGS | {"adapter": True})
    finished(run, wishes)
    (entry,) = offline_runs(run.folder)
    (artifact,) = [one for one in entry.of("artifact") if one["type"] == "adapter"]
    assert artifact["name"] == f"adapter-{run.folder.name}"
    paths = {one["path"]: one["local_path"] for one in artifact["manifest"]["contents"]}
    assert paths == {
        name: str(run.folder / "adapter" / name)
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    metadata = json.loads(artifact["metadata"])
    assert metadata == {"base_model": "hub/tiny", "method": "emloc", "exact_match": 0.5}


def test_a_run_without_an_adapter_logs_no_artifact(start_run):
    run = start_run()
    with Record(run) as record:
        record.follow(Wandb(**SETTINGS | {"adapter": True}))
        run.finish(results())
    (entry,) = offline_runs(run.folder)
    assert entry.of("artifact") == []
    assert entry.exit_code == 0


@pytest.mark.parametrize(
    ("state", "code"), [("failed", 1), ("oom", 1), ("interrupted", 130), ("running", 1)]
)
def test_an_unsuccessful_run_logs_its_state_and_exit_code(start_run, tracker, state, code):
    run = start_run()
    with Record(run) as record:
        record.follow(tracker)
        record.add(training_line(1, {"loss": 1.0}))
        if state != "running":
            run.mark(state, stage="train", error="too large")
    (entry,) = offline_runs(run.folder)
    assert entry.exit_code == code
    assert entry.summary["state"] == state
    if state != "running":
        assert (entry.summary["stage"], entry.summary["error"]) == ("train", "too large")
    assert not (entry.folder / "files/media").exists()


ENDLESS = """
import sys, time
from pathlib import Path
from emloc.report.tracking.metrics_log import Record, training_line
from emloc.config.run_folder import Run
from emloc.report.tracking.trackers import Wandb

record = Record(Run(Path(sys.argv[1])))
record.follow(Wandb(project="emloc", entity=None, mode="offline", adapter=False))
for step in (1, 2, 3):
    record.add(training_line(step, {"loss": 1.0}))
while True:
    time.sleep(1)
"""


def steps_sent(folder) -> list[int]:
    """Return the steps in the file of W&B, which a separate process writes with a delay."""
    try:
        return [line["train/step"] for one in offline_runs(folder) for line in one.history]
    except (subprocess.CalledProcessError, ValueError):  # the file is not complete yet
        return []


def test_a_killed_run_leaves_an_offline_run_without_an_exit_record(start_run):
    """`wandb sync` uploads such a run as failed."""
    run = start_run()
    with subprocess.Popen([sys.executable, "-c", ENDLESS, str(run.folder)]) as process:
        while steps_sent(run.folder) != [1, 2, 3]:
            assert process.poll() is None
            time.sleep(0.2)
        process.kill()
    (entry,) = offline_runs(run.folder)
    assert entry.history == lines(run)
    assert [line["train/step"] for line in lines(run)] == [1, 2, 3]
    assert entry.of("exit") == []


def test_an_interrupted_run_resumes_the_same_wandb_run(start_run, tracker):
    for steps in ((0, 1, 2, 3), (0, 3, 4)):
        run = start_run()
        with Record(run) as record:
            record.follow(tracker)
            for step in steps:
                record.add(training_line(step, {"loss": 1.0}))
            run.mark("interrupted")
    finished(start_run(), Nothing())
    with Record(run) as record:
        record.follow(tracker)
        record.add(stage_line("train", {"seconds": 1.0}))
    first, second, third = offline_runs(run.folder)
    assert first.run["run_id"] == second.run["run_id"] == third.run["run_id"]
    # With this flag `wandb sync` appends to the first run instead of starting a new one.
    assert [entry.run.get("resume", False) for entry in (first, second, third)] == [
        False,
        True,
        True,
    ]
    # The first line of a training with anchors is of step 0.
    assert [line["train/step"] for line in first.history] == [0, 1, 2, 3]
    assert [line["train/step"] for line in second.history] == [4]


def test_consecutive_runs_in_one_process_write_to_their_own_folders(start_run, tracker, tmp_path):
    before = dict(os.environ)
    for name in ("one", "two"):
        finished(start_run(name), tracker)
    assert dict(os.environ) == before
    for name in ("one", "two"):
        (entry,) = offline_runs(tmp_path / "runs" / "demo" / name)
        assert entry.run["display_name"] == name
        assert len(entry.history) == 4
        (artifact,) = entry.of("artifact")
        (table,) = artifact["manifest"]["contents"]
        assert f"/demo/{name}/wandb/" in table["local_path"]


def test_equal_settings_in_two_experiments_are_two_wandb_runs(start_run, tracker, tmp_path):
    run = start_run()
    finished(run, tracker)
    other = Run(tmp_path / "runs" / "a b:c" / run.folder.name)
    other.begin(OmegaConf.create(run.config | {"name": "a b:c"}), {})
    with Record(other) as record:
        record.follow(tracker)
    (one,), (two,) = offline_runs(run.folder), offline_runs(other.folder)
    assert re.fullmatch(f"demo-{run.folder.name}-[0-9a-f]{{8}}", one.run["run_id"])
    assert re.fullmatch(f"a-b-c-{run.folder.name}-[0-9a-f]{{8}}", two.run["run_id"])


def test_a_sweep_logs_a_report_run_with_the_table_of_all_runs(start_run, tracker, tmp_path):
    for name, score in (("one", 0.25), ("two", 0.75)):
        start_run(name).finish(results(score))
    folder = tmp_path / "runs" / "demo"
    compare(folder)
    compare(folder)
    first, again = offline_runs(folder)
    assert first.run["display_name"] == "report"
    assert first.run["run_group"] == "demo"
    assert [row["score"] for row in first.table("runs")] == [0.25, 0.75]
    assert again.run["run_id"] == first.run["run_id"]
    assert re.fullmatch("demo-report-[0-9a-f]{8}", first.run["run_id"])
    assert again.run["resume"]


def test_a_sweep_without_newly_finished_runs_logs_no_report(start_run, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "demo"
    start_run("failed").mark("failed", stage="config", error="x")
    compare(folder)
    start_run("before").finish(results())
    monkeypatch.setattr("emloc.report.tracking.trackers.process_start", lambda: time.time() + 1)
    compare(folder)
    assert not (folder / "wandb").exists()


def test_a_sweep_without_a_tracker_logs_no_report(start_run, tmp_path):
    run = start_run()
    nothing = {"tracker": {"_target_": "emloc.report.tracking.trackers.Nothing"}}
    run.begin(OmegaConf.create(run.config | nothing), {})
    run.finish(results())
    compare(tmp_path / "runs" / "demo")
    assert not (tmp_path / "runs" / "demo" / "wandb").exists()


def online() -> Wandb:
    return Wandb(**SETTINGS | {"mode": "online"})


def test_online_mode_without_an_account_is_refused_without_a_prompt(start_run):
    run = start_run()
    with pytest.raises(ConfigError, match="no W&B account on this machine; run `wandb login`"):
        online().start(run.folder, run.config, 0)
    assert not offline_runs(run.folder)


def test_an_invalid_api_key_is_refused(start_run, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "123")
    run = start_run()
    with pytest.raises(ConfigError, match=r"WANDB_API_KEY invalid.*set tracker.mode=offline"):
        online().start(run.folder, run.config, 0)


def test_a_run_is_logged_offline_if_wandb_cannot_be_reached(start_run, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    run = start_run()
    with caplog.at_level(logging.WARNING), Record(run) as record:
        record.follow(online())
        record.add(training_line(1, {"loss": 1.0}))
        run.mark("failed", stage="train", error="x")
    assert "W&B cannot be reached" in caplog.text
    assert "wandb sync" in caplog.text
    (entry,) = offline_runs(run.folder)
    assert entry.history == lines(run)


def test_a_missing_wandb_package_is_reported_with_the_remedy(start_run, tracker, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = start_run()
    with pytest.raises(ConfigError, match="pip install wandb, or set tracker=none"):
        tracker.start(run.folder, run.config, 0)


@pytest.mark.parametrize("mode", ["disabled", "on"])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(ConfigError, match="one of offline, online; set"):
        Wandb(**SETTINGS | {"mode": mode})
