"""Run six plug-ins that live outside the package, each one module and its YAML files."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.torch import load_file

from emloc.runtime.journal import Journal
from emloc.stages.training.trainer import FiniteTrainer

HERE = Path(__file__).parent


class Killed(BaseException):
    """Ends a run as a signal would: no code of the package handles this exception."""


@dataclass(frozen=True)
class Plugin:
    """A plug-in under test: how it is used, in which stage it is killed, and what it refuses."""

    folder: str
    overrides: tuple[str, ...]
    refused: tuple[str, ...]
    reason: str  # part of the error for the overrides `refused`
    merged: str = ""  # part of the error of a refused merge; empty: the merge works
    killed: str = "train"  # stage in which the run is killed
    data: str = "tiny"
    columns: tuple[str, ...] = field(default=())  # further columns of the report


LABELLED = ("train.steps=12", "train.learning_rate=0.01", "compression=r50")
PLUGINS = {
    "gated adapter with an auxiliary loss": Plugin(
        "gated",
        ("method=lora", "adapter=gated"),
        ("method=emloc", "adapter=gated"),
        "adapter=gated weighs its experts by the input",
        merged="weighs its experts by the input",
    ),
    "classifier of texts": Plugin(
        "classifier",
        ("method=emloc", "model=tiny_roberta", "task=labelled_texts", *LABELLED),
        ("model=tiny_roberta", "task=labelled_texts", "task.metric=error"),
        "task.metric=error",
        data="texts",
    ),
    "classifier of images": Plugin(
        "classifier",
        ("method=emloc", "model=tiny_vit", "task=labelled_images", *LABELLED),
        ("model=tiny_vit", "task=labelled_images", "task.metric=anls"),
        "task.metric=anls",
        data="images",
    ),
    "format of five bits": Plugin(
        "five_bits",
        ("method=emloc", "compression.bits=5"),
        ("method=emloc", "precision=five_bits"),
        "precision=five_bits is a format of 5 bits, and compression.bits=16",
    ),
    "stage between emulate and train": Plugin(
        "healed",
        ("method=emloc", "stage=[standard,heal]"),
        ("method=lora", "stage=[standard,heal]"),
        "stage=heal steps on the factors of an SVD emulator",
        killed="heal",
        columns=("heal s",),
    ),
    "recovery that trains": Plugin(
        "exact_steps",
        ("method=emloc", "recovery=exact_steps"),
        ("method=emloc", "recovery=exact_steps", "recovery.steps=0"),
        "recovery.steps must be at least 1, got 0",
        killed="recover",
    ),
    "family with continuous targets": Plugin(
        "regression",
        (
            *("method=emloc", "model=tiny_flow", "task=labelled_texts", "task.metric=error"),
            *("task.target='{{vector}}'", *LABELLED),
        ),
        ("model=tiny_flow", "task=labelled_texts", "task.metric=accuracy"),
        "task.metric=accuracy",
        data="texts",
    ),
}


@pytest.fixture(params=PLUGINS.values(), ids=PLUGINS.keys())
def plugin(request, monkeypatch):
    # The plug-in `regression` uses the task of the plug-in `classifier`.
    folders = [HERE / request.param.folder, HERE / "classifier"]
    monkeypatch.setenv("EMLOC_PLUGINS", os.pathsep.join(map(str, folders)))
    return request.param


@pytest.fixture
def settings(plugin, tiny, roberta, vit, texts, images):
    """Overrides of a tiny run with the model and the rows of the plug-in."""
    if plugin.data == "tiny":
        return [*tiny, "train.save_every=1", "task.limit=16"]
    rows, model = {"texts": (texts, roberta), "images": (images, vit)}[plugin.data]
    return [
        *("calibration.samples=8", "lora=r4", "train.batch=8", "train.log_every=1"),
        *("train.save_every=1", "eval=quick", "tracker=none"),
        *(f"task.path={rows}", f"model.source={model}"),
    ]


def ordered(settings, words):
    """Put choices of groups before the values of their settings, as Hydra requires."""
    return [*words, *settings]


def adapter_of(run: Path) -> dict:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_a_plugin_runs_up_to_the_report_resumes_after_a_kill_and_is_merged(
    plugin, settings, emloc, one_run, tmp_path, monkeypatch, only_svg
):
    words = ordered(settings, plugin.overrides)
    straight = emloc(*words)
    assert straight.code == 0, straight.output
    run = one_run()
    expected, metrics = adapter_of(run), json.loads((run / "metrics.json").read_text())
    assert json.loads((run / "status.json").read_text())["state"] == "done"

    report = emloc("report", str(run.parent))
    assert report.code == 0
    for word in ("emulate s", *plugin.columns):
        assert word in report.out
    assert run.name.split("-")[0] in report.out

    shutil.rmtree(tmp_path / "runs")
    for folder in (tmp_path / "cache").iterdir():  # the emulator is no other one
        if folder.name not in ("calibrate", "emulate"):
            shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        kill_in(plugin.killed, patch)
        with pytest.raises(Killed):
            emloc(*words)
    stage = plugin.killed
    assert list((tmp_path / "cache" / stage).glob("*.partial"))
    resumed = emloc(*words)
    assert resumed.code == 0, resumed.output
    again = json.loads((one_run() / "metrics.json").read_text())
    assert again["stages"] == metrics["stages"]
    assert again["scores"] == pytest.approx(metrics["scores"], rel=1e-4)
    for name, tensor in adapter_of(one_run()).items():
        assert tensor.allclose(expected[name], atol=1e-5, rtol=1e-4), name

    merged = emloc("merge", str(one_run()))
    if plugin.merged:
        assert merged.code == 2
        assert plugin.merged in merged.err
    else:
        assert merged.code == 0, merged.output
        assert list((one_run() / "merged").glob("*.safetensors"))


def kill_in(stage: str, patch) -> None:
    """Kill the run in this stage, after the stage has written its first result."""
    if stage == "heal":
        patch.setattr(Journal, "add", killed_if(Journal.add, condition=_has_healed_a_block))
        return
    training_step = FiniteTrainer.training_step

    def step(self, *rest):
        of_stage = f"/{stage}/" in str(self.args.output_dir)
        if of_stage and self.state.global_step == 2:
            raise Killed
        return training_step(self, *rest)

    patch.setattr(FiniteTrainer, "training_step", step)


def _has_healed_a_block(journal: Journal) -> bool:
    return "/heal/" in str(journal._folder) and bool(journal.lines)


def killed_if(method, condition):
    """Return `method`, changed to kill the run if the condition holds for its object."""

    def changed(self, *rest, **facts):
        if condition(self):
            raise Killed
        return method(self, *rest, **facts)

    return changed


def test_a_plugin_refuses_settings_with_its_own_message(plugin, settings, emloc):
    ran = emloc(*ordered(settings, plugin.refused))
    assert ran.code == 2
    assert plugin.reason in ran.output
    assert "Traceback" not in ran.output


def test_plan_and_help_find_plugins(emloc, monkeypatch):
    monkeypatch.setenv("EMLOC_PLUGINS", str(HERE / "gated"))
    assert "gated" in emloc("--help").out
    assert emloc("--cfg", "job", "adapter=gated").out.count("_target_: gated.Gated") == 1
    planned = emloc("plan", "adapter=gated", "method=lora")
    assert planned.code == 0, planned.output


@pytest.mark.parametrize("launcher", ["joblib", "local"])
def test_workers_of_a_launcher_find_plugins(emloc, tiny, one_run, launcher):
    folders = os.pathsep.join(str(HERE / name) for name in ("gated", "healed"))
    ran = emloc.fork(
        *("-m", f"hydra/launcher={launcher}", "name=swept", "method=emloc", "recovery=none"),
        *("adapter=gated", "stage=[standard,heal]", *tiny, "eval.harness=false"),
        EMLOC_PLUGINS=folders,
    )
    assert ran.code == 0, ran.output
    metrics = json.loads((one_run("swept") / "metrics.json").read_text())
    assert list(metrics["seconds"])[1:4] == ["emulate", "heal", "train"]
    assert 0 < metrics["facts"]["heal"]["error_left"] < 1


def test_a_missing_plugin_folder_is_refused(emloc, monkeypatch, tmp_path):
    monkeypatch.setenv("EMLOC_PLUGINS", str(tmp_path / "nowhere"))
    ran = emloc("method=lora")
    assert ran.code == 2
    assert f"EMLOC_PLUGINS: no folder {tmp_path / 'nowhere'}" in ran.err
