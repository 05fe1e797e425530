"""A finished run is repeated only if its data or model has changed."""

import json
import shutil

import pytest


@pytest.fixture
def own(tmp_path, sums, checkpoint, tiny):
    """The tiny overrides with copies of data and model, so that a test may change the copies."""
    shutil.copytree(sums, tmp_path / "data")
    shutil.copytree(checkpoint, tmp_path / "model")
    others = [word for word in tiny if not word.startswith(("task.path=", "model.source="))]
    return [*others, f"task.path={tmp_path / 'data'}", f"model.source={tmp_path / 'model'}"]


def test_a_run_is_repeated_after_its_data_has_changed(emloc, own, one_run, tmp_path):
    assert emloc("method=lora", *own).code == 0
    assert "done before" in emloc("method=lora", *own).output
    first = json.loads((one_run() / "metrics.json").read_text())
    rows = (tmp_path / "data" / "test.jsonl").read_text().splitlines()
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    ran = emloc("method=lora", *own)
    assert ran.code == 0
    assert "done before, but its data has changed since; done again" in ran.output
    second = json.loads((one_run() / "metrics.json").read_text())
    assert second["data"] != first["data"]
    assert second["model"] == first["model"]
    assert "data has changed" not in emloc("method=lora", *own).output


def test_a_run_is_repeated_after_its_model_has_changed(emloc, own, tmp_path):
    assert emloc("method=zero_shot", *own).code == 0
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    ran = emloc("method=zero_shot", *own)
    assert "done before, but its model has changed since; done again" in ran.output


def test_a_run_whose_data_was_deleted_keeps_its_results(emloc, own, one_run, tmp_path):
    assert emloc("method=zero_shot", *own).code == 0
    shutil.rmtree(tmp_path / "data")
    ran = emloc("method=zero_shot", *own)
    assert ran.code == 0
    assert "done before; its data and model cannot be compared: task.path: no folder" in ran.output
    assert json.loads((one_run() / "status.json").read_text())["state"] == "done"
