"""Trainings on stored features of images are those that compute the features of the original."""

from functools import partial

import pytest
import torch
from composed import compose_cached
from pictured import VqaTask
from safetensors.torch import load_file
from staged import curve_of

from emloc.data import fixed_shapes
from emloc.data.stored_features import images_key
from emloc.emulators.svd import Svd
from emloc.errors import ConfigError
from emloc.models.image_vectors import features_of
from emloc.pipeline import checked, run
from emloc.stages.feature_files import open_features
from emloc.stages.run_config import build
from emloc.stages.training import capture
from emloc.stages.training import trainee as trainee_module

CPU = torch.device("cpu")
STORED = "train.features=stored"


@pytest.fixture
def settings(pictured_run):
    """Function that returns the settings of a run whose training learns at a high rate."""
    return partial(pictured_run, "train.learning_rate=0.01", "eval.harness=false")


@pytest.fixture
def run_with(stages, settings):
    """Function that runs the pipeline on the store of all tests."""
    return lambda *overrides, **own: run(settings(*overrides, **own), stages, lambda *_: None)


def losses(result):
    return [line["loss"] for line in curve_of(result.trained.folder)]


def adapter(result):
    return load_file(result.trained.folder / "adapter" / "adapter_model.safetensors")


def assert_same_training(one, other, rel=1e-5):
    assert losses(one) == pytest.approx(losses(other), rel=rel)
    theirs = adapter(other)
    for name, tensor in adapter(one).items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("model", ["internvl2_5_2b", "gemma3_4b"])
def test_stored_features_are_those_of_the_original(run_with, settings, model):
    result = run_with("method=lora", STORED, "train.steps=1", model=model)
    files = open_features(result.stages["features"])
    source = settings("method=lora", model=model).model.open()
    original, reader = source.load(CPU), source.reader()
    for example in VqaTask().train():
        row = reader.encode(example)
        with torch.no_grad():
            expected = features_of(original, reader.collate([row])["pixel_values"])
        if images_key(row) not in files.reader:  # no step draws it
            continue
        stored = files.reader.read(images_key(row), 0)["pixel_values"]
        torch.testing.assert_close(stored.flatten(0, -2), expected, atol=1e-5, rtol=1e-4)
    assert result.stages["features"].facts["rows"] == 8


@pytest.mark.parametrize(
    ("model", "lean"),
    [("internvl2_5_2b", "true"), ("internvl2_5_2b", "false"), ("gemma3_4b", "true")],
)
def test_a_training_of_the_original_is_the_same(run_with, model, lean):
    settings = ["method=lora", f"train.lean={lean}"]
    computed = run_with(*settings, model=model)
    assert_same_training(run_with(*settings, STORED, model=model), computed)


def test_the_trained_model_has_no_tower(settings, store, monkeypatch):
    opened = []
    open_trainee = trainee_module.open_trainee

    def note(*args, **kwargs):
        opened.append(open_trainee(*args, **kwargs))
        return opened[-1]

    for module in ("train", "training.train"):
        monkeypatch.setattr(f"emloc.stages.{module}.open_trainee", note)
    run(settings("method=emloc", STORED), store, lambda *_: None)
    (trainee,) = opened
    names = [name for name, _ in trainee.model.named_parameters()]
    assert not [name for name in names if "vision_tower" in name or "projector" in name]
    assert [name for name in names if "language_model" in name]


METHODS = {
    "emloc": [],
    "offload": [],
    "emloc_nf4": [],
    "upop": [],
    "loram_stru": ["emulator.first=1", "emulator.last=1"],
    "emloc_anchored": ["anchor.rounds=2", "anchor.places=2"],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_emulator_is_trained_on_features(run_with, method):
    result = run_with(f"method={method}", STORED, *METHODS[method])
    assert 0 < result.evaluated.facts["scores"]["loss"] < 10
    assert result.stages["features"].facts["rows"] >= 12


def test_an_emulator_of_the_decoder_alone_is_trained_the_same(run_with, settings):
    """Its tower is the original's, so that the two trainings have equal features."""
    decoder = r"model.emulator_targets=model\.language_model\.layers\.\d+\.mlp\.\w+_proj"
    recipe = ["method=emloc", decoder]
    assert_same_training(run_with(*recipe, STORED), run_with(*recipe))


def test_an_anchored_training_is_the_same(run_with):
    """Anchors put even the tokens of images back onto the original, whatever the tower was."""
    recipe = ["method=emloc_anchored", "anchor.rounds=2", "anchor.places=2", "anchor.refit=false"]
    recipe += [
        "anchor.dtype=float32",
        r"model.emulator_targets=model\.language_model\..*mlp\..*_proj",
    ]
    assert_same_training(run_with(*recipe, STORED), run_with(*recipe), rel=1e-4)


def test_the_passes_of_graphs_begin_with_stored_features(run_with, settings, store, monkeypatch):
    replays = []

    def record(step):
        step()

        def replay() -> None:
            replays.append(1)
            step()

        return replay

    expected = run_with("method=emloc", STORED, "train.capture=false")
    monkeypatch.setattr(fixed_shapes, "LEAST_BATCHES", 1)
    monkeypatch.setattr(capture, "DEVICES", ("cpu",))
    monkeypatch.setattr(capture, "RECORDER", lambda device: record)
    actual = run(settings("method=emloc", STORED), store, lambda *_: None)
    assert len(replays) >= 3
    assert_same_training(actual, expected)


def test_other_rates_and_seeds_share_the_features(settings, store):
    """A step draws 4 of 16 rows; the loader reads those of one step more."""
    computed = {}
    for other in ("seed=0", "train.learning_rate=1e-4", "lora=r8", "seed=1", "train.steps=3"):
        words = ("method=lora", STORED, "train.steps=1", other)
        result = run(settings(*words), store, lambda *_: None)
        computed[other] = result.stages["features"].facts["computed_rows"]
    assert computed["seed=0"] == 8
    assert computed["train.learning_rate=1e-4"] == computed["lora=r8"] == 8  # the same artifact
    assert computed["seed=1"] < 8
    assert computed["seed=1"] + computed["train.steps=3"] == 8  # the rest of the rows
    passes = len([*(store.root / "features").glob("*/*/layout.json")])
    assert passes == 1 + (computed["seed=1"] > 0) + (computed["train.steps=3"] > 0)


def test_damaged_features_are_computed_again(settings, store, caplog):
    run(settings("method=lora", STORED), store, lambda *_: None)
    (shard,) = (store.root / "features").glob("*/*/place-000-shard-00000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-7])
    result = run(settings("method=lora", STORED, "seed=3"), store, lambda *_: None)
    assert result.evaluated.facts["scores"]["loss"] > 0
    assert "damaged" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["method=lora", r"model.lora_targets='.*vision_tower.*q_proj'"],
            "lies in the vision tower or its projector, and an adapter there changes the features",
        ),
        (["method=lora", "budget.disk_gib=1e-9"], "the features of 12 rows take"),
    ],
)
def test_a_training_that_cannot_read_features_is_refused(settings, store, overrides, line):
    with pytest.raises(ConfigError, match=line):
        checked(settings(*overrides, STORED), store, lambda *_: None)


def test_an_emulator_of_a_plugin_that_needs_the_tower_is_refused(settings, store, monkeypatch):
    monkeypatch.setattr(Svd, "leaves_out_tower", False)
    with pytest.raises(ConfigError, match="emulator=svd is trained with its own vision tower"):
        checked(settings("method=emloc", STORED), store, lambda *_: None)


def test_a_text_model_has_no_features(tiny, store):
    with pytest.raises(ConfigError, match="has no vision tower whose features stand"):
        checked(build(compose_cached([*tiny, "method=lora", STORED])), store, lambda *_: None)


def test_two_processes_train_on_features(emloc, internvl, one_run):
    """Each process reads the features of its own rows."""
    words = ["method=lora", STORED, "model=internvl2_5_2b", f"model.source={internvl}"]
    words += ["task=easy_vqa", "task.limit=32", "eval.limit=8", "eval.harness=false"]
    words += [
        "model.dtype=float32",
        "lora=r4",
        "train.steps=3",
        "train.log_every=1",
        "tracker=none",
    ]
    two = emloc.two(*words, "train.batch=2", "name=two")
    assert two.code == 0, two.output
    one = emloc.fork(*words, "train.batch=2", "train.accumulate=2", "name=one")
    assert one.code == 0, one.output
    curves = [curve_of(one_run(name)) for name in ("two", "one")]
    for ours, theirs in zip(*curves, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
