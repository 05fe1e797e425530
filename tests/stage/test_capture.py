"""Trainings whose passes run as graphs are those without, up to rounding.

On a CPU a graph is repeated by calling its step; `tests/gpu/test_captured.py` records real graphs.
"""

import re
from functools import partial

import anchored
import pytest
import torch
from safetensors.torch import load_file
from staged import curve_of
from tiny import save_checkpoint
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from emloc.anchors.blocks import Blocks
from emloc.anchors.logits import Logits
from emloc.anchors.places import Place
from emloc.config.settings import LoraSettings
from emloc.data import fixed_shapes as fixed_shapes_module
from emloc.data.collate import IGNORE
from emloc.data.fixed_shapes import (
    ANSWERS,
    PREDICTING,
    BatchShape,
    answer_count,
    fixed_shapes,
    with_shape,
)
from emloc.emulators.full import Full
from emloc.emulators.offload import Offload
from emloc.emulators.svd import Svd
from emloc.models.checkpoint.source import Source
from emloc.models.objectives.tokens import Tokens
from emloc.runtime.kept_memory import KEPT_MEMORY
from emloc.stages.training import capture, graphed_passes, kept_trainee
from emloc.stages.training.graph_inputs import Trained
from emloc.stages.training.graphed_passes import GraphedPasses
from emloc.stages.training.kept_trainee import KeptTrainee
from emloc.stages.training.train import train
from emloc.tensors.lean.embedding import HostEmbedding

CPU = torch.device("cpu")
SVD = Svd(algorithm="eigen", aware=True, multiple=1)
COMMON = {"rounds": 2, "dtype": "float32", "guard": 2}
BLOCKS = Blocks(places=2, **COMMON)
LOGITS = Logits(**COMMON)


@pytest.fixture
def graphs(monkeypatch):
    """Let a CPU have graphs; return how often each was repeated."""
    replays: list[int] = []

    def record(step):
        step()
        index = len(replays)
        replays.append(0)

        def replay() -> None:
            replays[index] += 1
            step()

        return replay

    monkeypatch.setattr(fixed_shapes_module, "LEAST_BATCHES", 1)
    monkeypatch.setattr(capture, "DEVICES", ("cpu",))
    monkeypatch.setattr(capture, "RECORDER", lambda device: record)
    return replays


@pytest.fixture(scope="module")
def built(made_once, tmp_path_factory):
    source = anchored.tiny_source(made_once, 2)
    return anchored.build_emulator(tmp_path_factory.mktemp("emulator"), source, SVD, 16)


def trained(folder, built, *, keeper=None, **recipe):
    """Return the losses of a training's steps, and the adapter behind the last one."""
    folder.mkdir()
    inputs = anchored.training_inputs(built, **recipe)
    train(folder, built, inputs, device=CPU, report=lambda *_: None, keeper=keeper)
    return [line["loss"] for line in curve_of(folder)], adapter_of(folder)


def adapter_of(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_equal_trainings(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        torch.testing.assert_close(tensor, other[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"accumulate": 2, "checkpointing": False, "clip": 0.01},
        {"batch": 3, "clip": 0.0, "weight_decay": 0.1},
        {"batch": 64},  # a step has all 20 rows
    ],
    ids=["plain", "accumulate", "unclipped", "few-rows"],
)
def test_a_training_of_graphs_is_the_same_training(tmp_path, built, graphs, recipe, caplog):
    caplog.set_level("INFO")
    expected = trained(tmp_path / "plain", built, **recipe)
    assert graphs == []
    actual = trained(tmp_path / "graphs", built, **recipe, capture=True)
    assert sum(graphs) == 6 * recipe.get("accumulate", 1)
    assert f"train: recorded {len(graphs)} graphs in " in caplog.text
    assert_equal_trainings(actual, expected)


@pytest.mark.parametrize("kind", ["full", "nf4", "offload"])
def test_other_weights_train_the_same(tmp_path, made_once, graphs, kind):
    source, bits = anchored.tiny_source(made_once, 2), 4 if kind == "nf4" else 16
    (tmp_path / "emulator").mkdir()
    emulator = Offload() if kind == "offload" else Full()
    built = anchored.build_emulator(tmp_path / "emulator", source, emulator, bits)
    expected = trained(tmp_path / "plain", built)
    assert_equal_trainings(trained(tmp_path / "graphs", built, capture=True), expected)
    assert sum(graphs) == 6


@pytest.mark.parametrize("anchor", [BLOCKS, LOGITS], ids=["blocks", "logits"])
def test_anchored_rounds_train_the_same(tmp_path, built, graphs, anchor, caplog):
    caplog.set_level("INFO")
    runs = {}
    for capture_on in (False, True):
        training = anchored.rounds(tmp_path / str(capture_on), built, anchor, capture=capture_on)
        training.run()
        runs[capture_on] = (
            [line["loss"] for line in curve_of(training.folder)],
            adapter_of(training.folder),
        )
    assert sum(graphs) == 6
    assert_equal_trainings(runs[True], runs[False])
    recorded, again, *more = graph_lines(caplog)
    assert recorded.startswith("train: recorded")
    assert again.endswith("graphs are used again")
    shapes = re.search(r"of (\d+) lengths", caplog.text)
    assert len(graphs) <= int(shapes[1])
    assert len(more) <= 1  # for shapes that only the second round has


def graph_lines(caplog):
    return [line for line in caplog.messages if re.match(r"train: (recorded )?\d+ graphs", line)]


def test_graphs_of_a_round_are_dropped_with_its_model(tmp_path, built, graphs, caplog, monkeypatch):
    caplog.set_level("INFO")
    training = anchored.rounds(tmp_path / "moved", built, BLOCKS, capture=True)
    run = training.steps.run

    def moves_weights(*args):
        result = run(*args)
        for parameter in training.trainee.open().model.parameters():
            parameter.data = parameter.data.clone()
        return result

    monkeypatch.setattr(training.steps, "run", moves_weights)
    training.run()
    assert [line.split()[1] for line in graph_lines(caplog)] == ["recorded"] * 2


@pytest.fixture
def releases(monkeypatch):
    """The graphs that were released, by the number of graphs at that time."""
    counts: list[int] = []
    release = GraphedPasses.release

    def count(self):
        counts.append(len(self._graphs))
        release(self)

    monkeypatch.setattr(GraphedPasses, "release", count)
    return counts


def test_graphs_are_released_behind_a_training(tmp_path, built, graphs, releases):
    trained(tmp_path / "graphs", built, capture=True)
    assert releases == [len(graphs)]


@pytest.fixture
def kept(monkeypatch):
    """What a training keeps for the next one on a device with memory to spare."""
    monkeypatch.setattr(kept_trainee, "_has_memory_to_spare", lambda trainee: True)
    yield KeptTrainee()
    KEPT_MEMORY.give_back()


def opened_anew(caplog):
    """Forget the log so far; return whether a training has opened everything anew."""
    is_anew = "is still loaded and is used again" not in caplog.text
    caplog.clear()
    return is_anew


def test_a_job_with_another_rate_uses_emulator_and_graphs_again(
    tmp_path, built, graphs, kept, caplog, releases
):
    caplog.set_level("INFO")
    trained(tmp_path / "first", built, capture=True, keeper=kept, learning_rate=0.03)
    assert opened_anew(caplog)
    assert KEPT_MEMORY.is_kept
    recorded = len(graphs)
    recipe = {"learning_rate": 0.01, "schedule": "linear", "weight_decay": 0.1, "clip": 0.5}
    again = trained(tmp_path / "again", built, capture=True, **recipe, keeper=kept)
    assert [line.split()[1:] for line in graph_lines(caplog)] == [
        [str(recorded), "graphs", "are", "used", "again"]
    ]
    assert not opened_anew(caplog)
    assert (len(graphs), releases) == (recorded, [])
    anew = trained(tmp_path / "anew", built, capture=True, **recipe)
    assert again[0] == anew[0]
    assert all(torch.equal(tensor, anew[1][name]) for name, tensor in again[1].items())


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"checkpointing": False}, {"lora": LoraSettings(2, 4, 0)}], ids=str
)
def test_a_job_with_other_passes_opens_everything_anew(
    tmp_path, built, graphs, kept, caplog, releases, other
):
    caplog.set_level("INFO")
    trained(tmp_path / "first", built, capture=True, keeper=kept)
    recorded = len(graphs)
    opened_anew(caplog)
    actual = trained(tmp_path / "other", built, capture=True, keeper=kept, **other)
    assert opened_anew(caplog)
    assert releases == [recorded]
    assert_equal_trainings(actual, trained(tmp_path / "anew", built, capture=True, **other))


def test_a_job_whose_batches_have_other_lengths_records_its_own_graphs(
    tmp_path, built, graphs, kept, caplog, releases
):
    caplog.set_level("INFO")
    trained(tmp_path / "first", built, capture=True, keeper=kept, steps=1)
    recorded = len(graphs)
    trained(tmp_path / "more", built, capture=True, keeper=kept, steps=4)
    assert "is still loaded" in caplog.text
    assert releases == [recorded]
    assert [line.split()[1] for line in graph_lines(caplog)] == ["recorded"] * 2


def test_an_anchored_job_uses_emulator_and_graphs_again(tmp_path, built, graphs, kept, caplog):
    caplog.set_level("INFO")
    for name, rate in (("first", 0.03), ("again", 0.01)):
        caplog.clear()
        recipe = {"capture": True, "learning_rate": rate}
        inputs = anchored.training_inputs(built, **recipe)
        with kept.opened(built, inputs, CPU) as opened:
            anchored.rounds(tmp_path / name, built, BLOCKS, opened=opened, **recipe).run()
    assert graph_lines(caplog)[0].endswith("graphs are used again")
    assert not opened_anew(caplog)
    anchored.rounds(tmp_path / "anew", built, BLOCKS, **recipe).run()
    again, anew = (curve_of(tmp_path / name) for name in ("again", "anew"))
    assert [line["loss"] for line in again] == [line["loss"] for line in anew]
    adapters = [adapter_of(tmp_path / name) for name in ("again", "anew")]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


def test_a_failed_job_is_not_kept(tmp_path, built, graphs, kept):
    with pytest.raises(FloatingPointError):
        trained(tmp_path / "failed", built, capture=True, keeper=kept, learning_rate=1e30)
    assert not KEPT_MEMORY.is_kept


def test_nothing_is_kept_on_a_device_without_memory_to_spare(
    tmp_path, built, graphs, kept, releases, monkeypatch
):
    monkeypatch.setattr(kept_trainee, "_has_memory_to_spare", lambda trainee: False)
    trained(tmp_path / "first", built, capture=True, keeper=kept)
    assert releases == [len(graphs)]
    assert not KEPT_MEMORY.is_kept


def test_an_emulator_that_is_fitted_anew_has_graphs_of_its_own(
    tmp_path, built, graphs, releases, caplog
):
    caplog.set_level("INFO")
    samples = anchored.samples()
    anchored.rounds(tmp_path / "refit", built, BLOCKS, capture=True, calibration=samples).run()
    assert [line.split()[1] for line in graph_lines(caplog)] == ["recorded"] * 2
    assert sum(releases) == len(graphs)
    assert len(releases) == 2


def test_graphs_are_not_kept_on_a_full_device(tmp_path, built, graphs, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(graphed_passes, "free_device_bytes", lambda device: -1)
    anchored.rounds(tmp_path / "full", built, BLOCKS, capture=True).run()
    assert [line.split()[1] for line in graph_lines(caplog)] == ["recorded"] * 2


def test_lengths_that_are_rare_have_no_graphs(tmp_path, built, graphs, caplog, monkeypatch):
    caplog.set_level("INFO")
    expected = trained(tmp_path / "plain", built)
    monkeypatch.setattr(fixed_shapes_module, "LEAST_BATCHES", 2)
    assert_equal_trainings(trained(tmp_path / "graphs", built, capture=True), expected)
    assert 0 < sum(graphs) < 6
    assert min(graphs) >= 2
    caplog.clear()
    monkeypatch.setattr(fixed_shapes_module, "LEAST_BATCHES", 7)
    recorded = len(graphs)
    assert_equal_trainings(trained(tmp_path / "none", built, capture=True), expected)
    assert "no length of batches occurs" in caplog.text
    assert len(graphs) == recorded


def test_a_training_of_graphs_is_resumed_to_the_same_bits(tmp_path, built, graphs, monkeypatch):
    expected = trained(tmp_path / "whole", built, capture=True)
    inputs = anchored.training_inputs(built, capture=True)
    (tmp_path / "cut").mkdir()

    def stop(step, _):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", built, inputs, device=CPU, report=stop)
    train(tmp_path / "cut", built, inputs, device=CPU, report=lambda *_: None)
    assert curve_of(tmp_path / "cut")[-1]["loss"] == expected[0][-1]
    for name, tensor in adapter_of(tmp_path / "cut").items():
        assert torch.equal(tensor, expected[1][name])


def test_an_embedding_in_host_memory_is_looked_up_ahead(tmp_path, made_once, graphs, monkeypatch):
    """The table moves there if the output head is another tensor."""
    make = partial(save_checkpoint, tie_word_embeddings=False)
    source = Source(made_once("untied", make), "tiny", "0", torch.float32)
    (tmp_path / "emulator").mkdir()
    built = anchored.build_emulator(tmp_path / "emulator", source, SVD, 16)
    expected = trained(tmp_path / "plain", built)
    read_late = []
    forward = HostEmbedding.forward
    monkeypatch.setattr(
        HostEmbedding, "forward", lambda self, ids: read_late.append(ids) or forward(self, ids)
    )
    assert_equal_trainings(trained(tmp_path / "graphs", built, capture=True), expected)
    # The trials of the output head and of a mask, and the comparison of both ways at the first
    # batch.
    assert len(read_late) == 4


def test_a_loss_that_is_not_finite_ends_a_training_of_graphs(tmp_path, built, graphs):
    with pytest.raises(FloatingPointError, match=r"set train.learning_rate lower"):
        trained(tmp_path / "graphs", built, learning_rate=1e30, capture=True)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"lean": False}, "the loss is the model's own, or train.lean=false"),
        ({"batch": 16, "accumulate": 2}, "there are fewer rows than one step has"),
    ],
)
def test_what_keeps_a_training_from_graphs_is_said(tmp_path, built, graphs, recipe, reason, caplog):
    caplog.set_level("INFO")
    trained(tmp_path / "graphs", built, **recipe, steps=1, capture=True)
    assert f"without CUDA graphs (train.capture): {reason}" in caplog.text
    assert graphs == []


def test_a_cpu_has_no_graphs(tmp_path, built, caplog):
    caplog.set_level("INFO")
    trained(tmp_path / "plain", built, steps=1, capture=True)
    assert "(train.capture): the device is a CPU" in caplog.text


@pytest.mark.parametrize("masked", [True, False])
def test_batches_have_the_answers_of_the_rows(masked):
    """In a batch of a shape, with the index in front of each answer token."""
    rows = [keyed.row for keyed in anchored.rows()[:3]]
    plain = anchored.collate_rows(rows)
    length, answers = plain["input_ids"].shape[1] + 2, 40
    fixed = with_shape(dict(plain), BatchShape(length, answers), masked=masked)
    assert fixed["input_ids"].shape == (3, length)
    real = Place("x").tokens(fixed)
    assert torch.equal(fixed.get("attention_mask", real).bool(), real)
    for row, ids, tokens in zip(rows, fixed["input_ids"], real, strict=True):
        assert ids[tokens].tolist() == list(row.input_ids)
        assert tokens.tolist() == sorted(tokens.tolist(), reverse=not masked)
    assert fixed[ANSWERS].shape == fixed[PREDICTING].shape == (answers,)
    real = fixed[ANSWERS] != IGNORE
    behind = fixed["input_ids"].flatten()[fixed[PREDICTING][real] + 1]
    assert torch.equal(behind, fixed[ANSWERS][real])
    expected = torch.cat([torch.tensor(row.input_ids[row.answer_start :]) for row in rows])
    assert torch.equal(fixed[ANSWERS][real], expected)
    assert answer_count(fixed) == Tokens().items(plain)


def test_only_models_that_need_a_mask_have_one(tmp_path, built, graphs, monkeypatch):
    masks = []
    compute = Trained.anchored_loss

    def note(self, batch, *others):
        masks.append("attention_mask" in batch)
        return compute(self, batch, *others)

    monkeypatch.setattr(Trained, "anchored_loss", note)
    causal = trained(tmp_path / "causal", built, capture=True)
    assert set(masks) == {False}
    masks.clear()
    monkeypatch.setattr(capture, "is_causal", lambda decoder: False)
    assert_equal_trainings(trained(tmp_path / "masked", built, capture=True), causal)
    assert set(masks) == {True}


def test_a_model_whose_loss_changes_without_a_mask_keeps_it(tmp_path, built, graphs, monkeypatch):
    """Here tokens see those behind them, whatever the attention modules say."""
    forward = sdpa_attention.sdpa_attention_forward

    def sees_all(*args, **options):
        return forward(*args, **options | {"is_causal": False})

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", sees_all)
    shapes = []
    monkeypatch.setattr(
        capture,
        "fixed_shapes",
        lambda *args, masked: shapes.append(masked) or fixed_shapes(*args, masked=masked),
    )
    trained(tmp_path / "graphs", built, steps=1, capture=True)
    assert shapes == [True]
