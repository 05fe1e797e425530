"""What is offered after a run: only what applies."""

import json

import pytest

from emloc.console.next_steps import next_steps

ADAPTER = "adapter/adapter_config.json"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Make a run folder in the current one."""
    monkeypatch.chdir(tmp_path)

    def make(name: str = "one", *, state: str = "done", files=(), weights: str = "checkpoint"):
        folder = tmp_path / "runs/demo" / name
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(f"model: {{weights: {weights}}}\n")
        (folder / "status.json").write_text(json.dumps({"state": state, "time": 0}))
        return folder

    return make


def commands(text: str) -> list[str]:
    return [line[2:].split("  ")[-1].strip() for line in text.splitlines()[1:]]


def test_a_run_with_an_adapter_is_reported_merged_and_loaded(run):
    assert commands(next_steps(run(files=[ADAPTER]))) == [
        "emloc report runs/demo",
        "writes runs/demo/report/report.html",
        "emloc merge runs/demo/one",
        'PeftModel.from_pretrained(model, "runs/demo/one/adapter")',
    ]


def test_without_an_adapter_or_with_one_of_another_kind_it_is_reported_alone(run):
    assert len(commands(next_steps(run()))) == 2
    assert len(commands(next_steps(run(files=["adapter/own.safetensors"])))) == 2


def test_random_weights_are_not_merged_into(run):
    offered = commands(next_steps(run(files=[ADAPTER], weights="random")))
    assert not [one for one in offered if "merge" in one]
    assert len(offered) == 3


def test_an_adapter_that_fits_no_server_is_merged_first(run):
    folder = run(files=[ADAPTER])
    (folder / "metrics.json").write_text(json.dumps({"authors_format": "internvl_chat"}))
    lines = [line.split("  ") for line in next_steps(folder).splitlines()[3:]]
    reason = "PEFT and vLLM cannot put the adapter on the authors' layers of this checkpoint"
    assert [(line[1], line[-1].strip()) for line in lines] == [
        ("a checkpoint to serve", "emloc merge runs/demo/one"),
        ("", reason),
    ]


def test_a_sweep_is_reported_if_one_of_its_runs_is_done(run):
    folder = run("one", state="failed").parent
    assert next_steps(folder) == ""
    run("two", files=[ADAPTER])
    assert len(commands(next_steps(folder))) == 2


def test_a_folder_elsewhere_has_its_whole_path(run, tmp_path, monkeypatch):
    folder = run("a run", files=[ADAPTER])
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert f"emloc merge '{folder}'" in commands(next_steps(folder))
