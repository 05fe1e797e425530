"""Every method in whole runs on two vision-language models, an InternVL and a Gemma."""

import json
from dataclasses import replace

import pytest
import torch
from composed import compose_cached
from pictured import VqaTask
from safetensors.torch import load_file
from staged import curve_of

from emloc.adapters.saved import read_adapter
from emloc.adapters.training_inputs import TrainingInputs
from emloc.config.paths import CONF
from emloc.data import fixed_shapes
from emloc.data.pending import PendingBatch
from emloc.emulators import BuiltEmulator
from emloc.errors import ConfigError, StageError
from emloc.pipeline import run
from emloc.runtime.stage_cache import Artifact
from emloc.stages.evaluation.harness.generated_answers import ANSWERS_FILE
from emloc.stages.run_config import build
from emloc.stages.training import capture
from emloc.stages.training.train import train
from emloc.stages.training.trainer import FiniteTrainer

CPU = torch.device("cpu")
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
# Settings of methods for a model of six blocks with two key/value heads each, and three steps.
ROOM = {
    "offsite": ["emulator.first=1", "emulator.last=1"],
    "loram_stru": ["emulator.first=1", "emulator.last=1"],
    "loram_rand": ["emulator.first=1", "emulator.last=1"],
}
ROOM |= {name: ["anchor.rounds=2", "anchor.places=2"] for name in METHODS if "anchored" in name}
ON_TEXT_ALONE = "svd_llm"  # running text does not reach the vision tower
# One method of each emulator and recovery, and an anchored one: adapters and packed formats see no
# image. All of them run on text.
ON_TEXT = {
    *(ON_TEXT_ALONE, "dora", "rslora", "emloc_uncorrected", "emloc_nf4", "loram_rand"),
    *("emloc_nf4_anchored", "qlora_anchored"),
}
ON_IMAGES = [name for name in METHODS if name not in ON_TEXT]


@pytest.fixture
def run_cached(stages, pictured_run):
    def run_with(*overrides, **own):
        run_config = pictured_run(*overrides, **own)
        if run_config.method == "small_model":
            run_config = replace(
                run_config, model=replace(run_config.model, siblings={"r75": run_config.model})
            )
        return run(run_config, stages, lambda step, values: None)

    return run_with


@pytest.mark.parametrize("method", ON_IMAGES)
def test_every_method_runs_on_images(run_cached, method):
    result = run_cached(f"method={method}", *ROOM.get(method, []))
    scores = result.evaluated.facts["scores"]
    assert 0 < scores["loss"] < 10
    assert {"accuracy", "accuracy/square", "accuracy/wide", "exact_match/wide"} <= set(scores)
    lines = (result.evaluated.folder / ANSWERS_FILE).read_text().splitlines()
    assert {json.loads(line)["id"] for line in lines} == {f"test/{i}" for i in range(6)}
    if result.recovered is not None:
        pairs = read_adapter(result.recovered.folder / "adapter").pairs
        assert all("language_model" in name for name in pairs)


def test_text_alone_cannot_calibrate_a_vision_tower(run_cached):
    with pytest.raises((ConfigError, StageError), match=r"no sample reaches model\.vision_tower"):
        run_cached(f"method={ON_TEXT_ALONE}")


@pytest.mark.parametrize(
    "method", ["zero_shot", "lora", "qlora", "offload", "emloc", "emloc_covariance", "upop"]
)
def test_methods_run_on_a_model_with_its_own_processor(run_cached, method):
    result = run_cached(f"method={method}", model="gemma3_4b")
    assert 0 < result.evaluated.facts["scores"]["loss"] < 10


def test_vision_tower_and_language_model_are_compressed_but_only_the_latter_is_adapted(run_cached):
    result = run_cached("method=emloc")
    layers = json.loads((result.emulated.folder / "layers.json").read_text())
    names = [row["layer"] for row in layers] if isinstance(layers, list) else list(layers)
    assert sum("vision_tower" in name for name in names) == 2 * 6
    assert sum("language_model" in name for name in names) == 6 * 7
    facts = result.statistics.facts
    assert facts["tokens"] > 0


@pytest.mark.parametrize("changed", ["train.lean=false", "emulator.sequential=true"])
def test_other_settings_run_on_images(run_cached, changed):
    assert run_cached("method=emloc", changed).evaluated.facts["scores"]["loss"] < 10


@pytest.mark.parametrize(
    ("model", "reason"),
    [("internvl2_5_2b", ""), ("gemma3_4b", "the model reads more than the vectors of the tokens")],
)
def test_a_training_of_graphs_begins_behind_the_vision_tower(
    run_cached, monkeypatch, caplog, model, reason
):
    """A CPU repeats a graph by calling its step. A Gemma also needs to know which token is what."""
    caplog.set_level("INFO")
    own = ("method=emloc", "seed=9")  # no other test has trained it
    expected = curve_of(run_cached(*own, "train.capture=false", model=model).trained.folder)
    replays = []

    def record(step):
        return lambda: replays.append(step) or step()

    monkeypatch.setattr(fixed_shapes, "LEAST_BATCHES", 1)
    monkeypatch.setattr(capture, "DEVICES", ("cpu",))
    monkeypatch.setattr(capture, "RECORDER", lambda device: record)
    result = run_cached(*own, "train.capture=true", model=model)
    losses = [line["loss"] for line in curve_of(result.trained.folder)]
    assert losses == pytest.approx([line["loss"] for line in expected], rel=1e-4)
    # Three steps, and the vision tower for each of them.
    assert len(replays) == (0 if reason else 3 + 3)
    assert (f"(train.capture): {reason}" in caplog.text) == bool(reason)


def test_the_memory_saving_training_learns_the_same_as_peft(run_cached):
    losses = {}
    for lean in ("true", "false"):
        result = run_cached("method=lora", f"train.lean={lean}", "train.learning_rate=0.02")
        losses[lean] = result.evaluated.facts["scores"]["loss"]
    assert losses["true"] == pytest.approx(losses["false"], abs=2e-4)
    assert losses["true"] < run_cached("method=zero_shot").evaluated.facts["scores"]["loss"] - 0.1


def test_the_image_changes_the_loss(run_cached):
    """The same questions with another image in all rows give another loss."""

    class Black(VqaTask):
        def held_out(self, limit):
            rows = super().held_out(limit)
            images = rows.rows[0].images
            return replace(rows, rows=tuple(replace(row, images=images) for row in rows))

    plain = run_cached("method=zero_shot").evaluated.facts["scores"]["loss"]
    black = run_cached("method=zero_shot", task=Black()).evaluated.facts["scores"]["loss"]
    assert abs(plain - black) > 1e-4


def test_generated_answers_equal_those_of_teacher_forcing(run_cached, monkeypatch):
    """After a long training, greedy decoding gives the answers that the loss pass reports."""
    # The model has to know its rows by heart, which a run refuses.
    monkeypatch.setattr("emloc.pipeline.refuse_overlap", lambda *_: None)

    class Learnt(VqaTask):
        def held_out(self, limit):
            return self.train()

    result = run_cached("method=lora", "train.steps=60", "train.learning_rate=0.03", task=Learnt())
    scores = result.evaluated.facts["scores"]
    assert 0.3 < scores["exact_match"] < 1
    assert scores["accuracy"] == scores["exact_match"]


def test_training_on_evaluation_rows_is_refused_before_any_stage(run_cached):
    class Leaking(VqaTask):
        def held_out(self, limit):
            return self.train().pick([3])

    with pytest.raises(ConfigError, match="1 of 16 training rows are also evaluation rows"):
        run_cached("method=lora", task=Leaking())


def test_a_metric_that_the_scorer_lacks_is_refused_before_any_stage(run_cached):
    class Wrong(VqaTask):
        metric = "anls"

    with pytest.raises(
        ConfigError, match=r"task\.metric=anls: the scores of these rows are accuracy"
    ):
        run_cached("method=lora", task=Wrong())


def test_a_text_model_refuses_images(run_cached, checkpoint):
    with pytest.raises((ConfigError, StageError), match="reads no images"):
        run_cached("method=lora", f"model.source={checkpoint}", model="smollm2_135m")


@pytest.fixture
def train_on(internvl, tmp_path):
    """Return a function that trains in a folder; it returns the losses and the adapter."""

    def train_in(name, steps=4, kill_at=None):
        overrides = [f"model.source={internvl}", "model.dtype=float32", "method=lora", "lora=r4"]
        overrides += [f"train.steps={steps}", "train.batch=2", "train.accumulate=2"]
        overrides += ["train.log_every=1", "train.save_every=2", "tracker=none"]
        run_config = build(compose_cached(["model=internvl2_5_2b", *overrides]))
        source, losses = run_config.model.open(), []
        inputs = TrainingInputs(
            *(run_config.adapter, run_config.lora),
            tuple(run_config.model.adapted_layers(source)),
            VqaTask().train(),
            *(None, run_config.train, run_config.seed),
        )
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "layers.json").write_text("[]")  # the emulator is the original as it is
        built = BuiltEmulator(run_config.emulator, Artifact("emulate", "key", folder), source)

        def report(step, line):
            losses.append(line)
            if step == kill_at:
                raise KeyboardInterrupt

        train(folder, built, inputs, device=CPU, report=report)
        return losses, load_file(folder / "adapter" / "adapter_model.safetensors")

    return train_in


def test_images_that_threads_cut_ahead_change_no_bit(train_on, monkeypatch):
    losses, adapter = train_on("ahead")
    monkeypatch.setattr("emloc.stages.training.train.training_collate", lambda one: one.collate)
    expected_losses, expected = train_on("plain")
    assert [line["loss"] for line in losses] == [line["loss"] for line in expected_losses]
    assert adapter.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter.items())


def test_a_killed_training_with_images_resumes_with_the_same_batches(train_on):
    _, expected = train_on("whole")
    with pytest.raises(KeyboardInterrupt):
        train_on("killed", kill_at=3)
    losses, adapter = train_on("killed")
    assert len(losses) == 2
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter.items())


def test_a_step_begins_before_the_images_of_all_its_passes_are_cut(train_on, monkeypatch):
    events = []
    wait, fetch = PendingBatch._wait, FiniteTrainer.get_batch_samples

    def noting_wait(self):
        if self._finish is not None:
            events.append("wait")
        wait(self)

    def noting_fetch(self, *arguments):
        samples = fetch(self, *arguments)
        events.append("step")
        return samples

    monkeypatch.setattr(PendingBatch, "_wait", noting_wait)
    monkeypatch.setattr(FiniteTrainer, "get_batch_samples", noting_fetch)
    train_on("noted", steps=2)
    assert events == ["step", "wait", "wait"] * 2
