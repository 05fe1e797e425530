"""Model families of plug-ins, with their own objectives and heads, in whole runs."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from composed import compose_cached
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import ViTModel

from emloc.calibration.samples import Samples
from emloc.cost.plan.gpus import find_gpu
from emloc.cost.plan.layout import StepShape
from emloc.cost.plan.table import plan
from emloc.emulators.prune.unit_scores import importance
from emloc.emulators.prune.units import Units
from emloc.errors import ConfigError
from emloc.pipeline import run
from emloc.stages.run_config import build
from emloc.tensors.linalg.prune import MLP

CPU = torch.device("cpu")
EXTENSIONS = Path(__file__).parents[1] / "extensions"
ROOM = {"offsite": ("emulator.first=1", "emulator.last=1", "compression.ratio=0.8")}


@pytest.fixture(autouse=True)
def _plugins(monkeypatch):
    folders = [str(EXTENSIONS / name) for name in ("classifier", "regression")]
    monkeypatch.setenv("EMLOC_PLUGINS", os.pathsep.join(folders))


@pytest.fixture
def run_cached(store, monkeypatch, roberta, vit, texts, images):
    """Function that runs the pipeline with a plug-in's model; `run_config` returns the settings."""
    for plugin in ("classifier", "regression"):
        monkeypatch.syspath_prepend(EXTENSIONS / plugin)

    def load(group: str, name: str):
        [file] = EXTENSIONS.glob(f"*/conf/{group}/{name}.yaml")
        return OmegaConf.load(file)

    def run_config(model: str, *overrides: str, **changed):
        tiny = [
            *("calibration.samples=8", "lora=r4", "train.batch=8", "train.log_every=1"),
            *("train.steps=30", "train.learning_rate=0.01", "train.schedule=constant"),
            *("compression=r50", "eval=quick", "tracker=none"),
        ]
        cfg = compose_cached([*tiny, *overrides])
        reads_images = model == "tiny_vit"
        own = {"source": str(vit if reads_images else roberta), "dtype": "float32"}
        cfg.model = OmegaConf.merge(load("model", model), own | changed)
        task = {"path": str(images if reads_images else texts)}
        if model == "tiny_flow":
            task |= {"target": "{{vector}}", "metric": "error"}
        name = "labelled_images" if reads_images else "labelled_texts"
        cfg.task = OmegaConf.merge(load("task", name), task)
        return build(cfg)

    def run_with(model: str, *overrides: str, **changed):
        return run(run_config(model, *overrides, **changed), store, lambda step, values: None)

    run_with.run_config = run_config
    return run_with


def answers_of(result) -> list[dict]:
    lines = (result.evaluated.folder / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("method", ["emloc", "emloc_covariance", "lora", "offsite"])
@pytest.mark.parametrize("model", ["tiny_roberta", "tiny_vit"])
def test_a_classifier_learns_its_classes(run_cached, model, method):
    """A new head and an adapter are trained with each emulator except pruning."""
    before = run_cached(model, "method=zero_shot").evaluated.facts["scores"]
    result = run_cached(model, f"method={method}", *ROOM.get(method, ()))
    scores = result.evaluated.facts["scores"]
    assert result.metric == "accuracy"
    assert scores["accuracy"] > 0.9 > before["accuracy"]
    assert scores["loss"] < 0.5 * before["loss"]
    answers = answers_of(result)
    assert [one["id"].rpartition("/")[2] for one in answers] == [str(i) for i in range(12)]
    assert sum(one["right"] for one in answers) / 12 == scores["accuracy"]


@pytest.mark.parametrize("method", ["emloc", "lora"])
def test_a_family_with_continuous_targets_reduces_its_error(run_cached, method):
    before = run_cached("tiny_flow", "method=zero_shot").evaluated.facts["scores"]
    result = run_cached("tiny_flow", f"method={method}")
    assert result.metric == "error"
    assert result.evaluated.facts["scores"]["error"] < 0.1 * before["error"]


def test_units_are_pruned_by_the_objective_of_the_family(run_cached):
    """Uses gradients of the class loss, with an untrained head."""
    ends = ("emulator.first=1", "emulator.last=1", "compression=r75")
    result = run_cached("tiny_vit", "method=upop", *ends)
    scores = load_file(result.emulated.folder / "scores.safetensors")
    assert sorted(scores) == [f"vit.layers.{i}.mlp" for i in (1, 2, 3)]
    assert all(float(one.abs().sum()) > 0 for one in scores.values())
    assert result.evaluated.facts["scores"]["accuracy"] == 1


def test_unit_scores_of_a_random_objective_are_reproducible(run_cached):
    """Unit scores are cached, so that noise must not change them for equal inputs."""
    source = run_cached.run_config("tiny_flow").model.open()
    layer = "roberta.encoder.layer.0"
    rows, columns = {f"{layer}.intermediate.dense": 1}, {f"{layer}.output.dense": 1}
    units = {layer: Units(MLP, 48, 64, rows, columns)}
    run_config = run_cached.run_config("tiny_flow")
    batches = Samples(run_config.task.train(), run_config.model.length_limit).training_batches(
        source
    )
    scores = [
        importance(source.load(CPU), batches, units, "upop", source.objective)[layer]
        for _ in range(2)
    ]
    assert torch.equal(*scores)


def test_a_new_head_is_saved_with_the_adapter_and_kept_by_the_recovery(run_cached):
    result = run_cached("tiny_roberta", "method=emloc")
    trained, recovered = (
        load_file(one.folder / "adapter" / "adapter_model.safetensors")
        for one in (result.trained, result.recovered)
    )
    heads = {name for name in trained if ".classifier." in name}
    assert heads == {
        f"base_model.model.classifier.{part}.{kind}"
        for part in ("dense", "out_proj")
        for kind in ("weight", "bias")
    }
    assert all(torch.equal(trained[name], recovered[name]) for name in heads)
    source = run_cached.run_config("tiny_roberta").model.open()
    start = dict(source.load(CPU).named_parameters())
    for name in heads:
        assert not torch.equal(trained[name], start[name.removeprefix("base_model.model.")])


def test_a_new_head_depends_only_on_the_seed(run_cached):
    source = run_cached.run_config("tiny_roberta").model.open()
    first, second = source.load(CPU), source.load(CPU)
    name = "classifier.out_proj.weight"
    assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    source.redraw_fresh_modules(first, 1)
    source.redraw_fresh_modules(second, 2)
    assert not torch.equal(first.get_parameter(name), second.get_parameter(name))
    assert float(first.get_parameter(name).std()) == pytest.approx(0.02, rel=0.5)


def test_a_new_head_computes_in_float32_in_a_16_bit_model(run_cached):
    source = run_cached.run_config("tiny_roberta", dtype="bfloat16").model.open()
    model = source.load(CPU)
    assert model.get_parameter("classifier.dense.weight").dtype == torch.float32
    assert (
        model.get_submodule("roberta.encoder.layer.0.output.dense").weight.dtype == torch.bfloat16
    )
    ids = torch.arange(6, 16)[None]
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.dtype == torch.float32
    scores = run_cached("tiny_roberta", "method=emloc", dtype="bfloat16").evaluated.facts["scores"]
    assert scores["accuracy"] == 1


def test_the_loss_of_a_step_does_not_depend_on_the_number_of_passes(run_cached):
    curves = []
    for size, passes in ((8, 1), (2, 4)):
        counts = (f"train.batch={size}", f"train.accumulate={passes}", "train.steps=3")
        trained = run_cached("tiny_roberta", "method=lora", *counts).trained
        lines = (trained.folder / "curve.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    assert len(curves[0]) == 3
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_a_bare_encoder_checkpoint_is_read_without_the_prefix(run_cached, vit):
    source = run_cached.run_config("tiny_vit").model.open()
    stored = ViTModel.from_pretrained(vit).state_dict()
    model = source.load(CPU)
    own = model.vit.state_dict()
    assert len(own) > 5 * 16
    assert all(torch.equal(own[name], stored[name]) for name in own)


def test_the_keys_of_all_stages_contain_the_classes(run_cached):
    keys = {
        str(run_cached.run_config("tiny_roberta", classes=classes).model.open().key)
        for classes in (["even", "odd"], ["odd", "even"], ["even", "odd", "none"])
    }
    assert len(keys) == 3


def test_a_reader_is_created_once(run_cached):
    source = run_cached.run_config("tiny_roberta").model.open()
    assert source.reader() is source.reader()


NOT = {
    "a score that the family does not give": (
        ("task.metric=exact_match",),
        "task.metric=exact_match: the scores of this kind of model are accuracy, loss; "
        "set task.metric=accuracy",
    ),
    "a size that is to be solved for": (
        ("compression=auto", "budget.gpu_gib=24"),
        "only the training of models that write text is planned, and model=tiny_roberta sorts "
        "into classes; set compression=r50",
    ),
}


@pytest.mark.parametrize("what", NOT)
def test_unsupported_commands_are_refused_with_the_reason_of_the_family(run_cached, what):
    overrides, message = NOT[what]
    run_config = run_cached.run_config(
        "tiny_roberta", *(one for one in overrides if not one.startswith("task."))
    )
    if overrides[0].startswith("task."):
        run_config = replace(run_config, task=replace(run_config.task, metric="exact_match"))
    with pytest.raises(ConfigError) as caught:
        run(run_config, None, lambda step, values: None)
    assert str(caught.value) == message


def test_no_plan_is_made_for_a_family_that_generates_no_text(run_cached):
    run_config = run_cached.run_config("tiny_roberta")
    work = StepShape.of(run_config.train, 64, 8)
    message = "model=tiny_roberta sorts into classes; set model=smollm2_135m"
    with pytest.raises(ConfigError, match=message):
        plan(run_config, work, find_gpu("rtx4090"))


def test_a_target_that_is_no_class_is_refused_with_its_row(run_cached):
    message = "train/1: 'odd' is none of the classes even, none; set model.classes, or task.target"
    with pytest.raises(ConfigError, match=message):
        run_cached("tiny_roberta", "method=lora", classes=["even", "none"])
