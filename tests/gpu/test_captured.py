"""Trainings whose passes are CUDA graphs are those without, up to rounding.

Run by `make test-gpu`.
"""

import logging
from functools import partial

import anchored
import pytest
import torch
from safetensors.torch import load_file
from staged import curve_of
from tiny import save_checkpoint

from emloc.anchors.blocks import Blocks
from emloc.anchors.logits import Logits
from emloc.data import fixed_shapes
from emloc.emulators.full import Full
from emloc.emulators.offload import Offload
from emloc.emulators.svd import Svd
from emloc.models.checkpoint.source import Source
from emloc.runtime.kept_memory import KEPT_MEMORY
from emloc.runtime.memory import MemoryPeak
from emloc.runtime.work_meter import metered
from emloc.stages.training.kept_trainee import KeptTrainee
from emloc.stages.training.train import train
from emloc.tensors.lean import activations
from emloc.tensors.lean.step_graphs import CudaRecorder, StepGraphs
from emloc.tensors.nn.streamed import StreamedBlocks

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
SVD = Svd(algorithm="eigen", aware=True, multiple=1)
COMMON = {"rounds": 2, "dtype": "float32", "guard": 2}


@pytest.fixture(autouse=True)
def rare_lengths_have_graphs(monkeypatch):
    monkeypatch.setattr(fixed_shapes, "LEAST_BATCHES", 1)


@pytest.fixture
def replays(monkeypatch):
    """The number of graphs at each pass."""
    counts: list[int] = []
    run = StepGraphs.run

    def count(self, inputs):
        counts.append(len(self))
        return run(self, inputs)

    monkeypatch.setattr(StepGraphs, "run", count)
    return counts


def built_of(made_once, folder, emulator, bits, dtype=torch.float32, **config):
    make = lambda target: save_checkpoint(target, num_hidden_layers=2, **config)  # noqa: E731
    name = "-".join(["captured", *map(str, config.values())])
    folder.mkdir()
    return anchored.build_emulator(
        folder, Source(made_once(name, make), "tiny", "0", dtype), emulator, bits
    )


def trained(folder, built, keeper=None, **recipe):
    folder.mkdir()
    inputs = anchored.training_inputs(built, **recipe)
    train(folder, built, inputs, device=CUDA, report=lambda *_: None, keeper=keeper)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    return [line["loss"] for line in curve_of(folder)], adapter


BITS = {"nf4": 4, "int2": 2}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", ["svd", "full", "nf4", "svd-nf4", "svd-int2", "untied"])
def test_a_training_of_graphs_is_the_same_training(
    tmp_path, made_once, replays, kind, checkpointing, caplog
):
    caplog.set_level(logging.INFO)
    emulator = SVD if kind.startswith("svd") or kind == "untied" else Full()
    config = {"tie_word_embeddings": False} if kind == "untied" else {}
    built = built_of(
        made_once, tmp_path / "emulator", emulator, BITS.get(kind.split("-")[-1], 16), **config
    )
    recipe = {"checkpointing": checkpointing, "accumulate": 2, "host_activations": checkpointing}
    expected = trained(tmp_path / "plain", built, **recipe)
    assert replays == []
    losses, adapter = trained(tmp_path / "graphs", built, **recipe, capture=True)
    assert "without CUDA graphs" not in caplog.text
    assert len(replays) == 12
    assert min(replays) >= 1
    assert losses == pytest.approx(expected[0], rel=1e-4)
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, expected[1][name], rtol=1e-2, atol=1e-3)


def test_blocks_in_host_memory_are_copied_inside_graphs(tmp_path, made_once, replays, caplog):
    caplog.set_level(logging.INFO)
    make = partial(save_checkpoint, num_hidden_layers=5)
    source = Source(made_once("captured-blocks", make), "tiny", "0", torch.float32)
    (tmp_path / "emulator").mkdir()
    built = anchored.build_emulator(tmp_path / "emulator", source, Offload(), 16)
    with metered() as plain:
        expected = trained(tmp_path / "plain", built)
    with metered() as graphs:
        losses, adapter = trained(tmp_path / "graphs", built, capture=True)
    assert "without CUDA graphs" not in caplog.text
    assert min(replays) >= 1
    assert losses == pytest.approx(expected[0], rel=1e-4)
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, expected[1][name], rtol=1e-2, atol=1e-3)
    # The graphs copy the first two blocks anew, and recording takes a few passes.
    assert plain.weight_bytes < graphs.weight_bytes < 4 * plain.weight_bytes


def test_a_graph_ends_with_the_copies_that_it_began():
    """The last block of a graph has begun to copy the next one, which is not of the graph."""
    blocks = [{"weight": torch.empty(1 << 20, device="meta")} for _ in range(5)]
    streamed = StreamedBlocks(blocks, CUDA)
    for index in range(5):
        streamed.views(index)["weight"].fill_(index)
        streamed.store(index)
    sums = torch.zeros(5, device=CUDA)

    def step():
        for index in (4, 3, 2):
            streamed.enter(index)
            sums[index].add_(streamed.views(index)["weight"].mean())

    replay = CudaRecorder(CUDA)(step)
    sums.zero_()
    for _ in range(3):
        replay()
    assert sums.tolist() == [0, 0, 6, 9, 12]
    streamed.enter(1)
    assert streamed.views(1)["weight"].mean() == 1


@pytest.mark.parametrize(
    "anchor", [Blocks(places=2, **COMMON), Logits(**COMMON)], ids=["blocks", "logits"]
)
def test_anchored_rounds_train_the_same(tmp_path, made_once, replays, anchor, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(anchored, "CPU", CUDA)
    built = built_of(made_once, tmp_path / "emulator", SVD, 16)
    curves = []
    for on in (False, True):
        training = anchored.rounds(tmp_path / str(on), built, anchor, capture=on)
        training.run()
        curves.append([line["loss"] for line in curve_of(training.folder)])
    assert len(replays) == 6
    assert min(replays) >= 1
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert "graphs are used again" in caplog.text


def test_a_later_job_uses_graphs_again_and_other_stages_do_not_count_them(
    tmp_path, made_once, replays, caplog
):
    caplog.set_level(logging.INFO)
    built = built_of(made_once, tmp_path / "emulator", SVD, 16)
    kept = KeptTrainee()
    peaks, curves = {}, {}
    recipes = {"first": 0.03, "again": 0.01, "alone": 0.01}
    for name, rate in recipes.items():
        if name == "alone":
            KEPT_MEMORY.give_back()
        keeper = None if name == "alone" else kept
        with MemoryPeak() as peak:
            curves[name], _ = trained(
                tmp_path / name, built, keeper, capture=True, learning_rate=rate
            )
        peaks[name] = peak.bytes
        with MemoryPeak() as other:
            torch.empty(1 << 22, device=CUDA)
        peaks[f"behind {name}"] = other.bytes
    assert caplog.text.count("is still loaded and is used again") == 1
    assert caplog.text.count("train: recorded") == 2
    assert curves["again"] == pytest.approx(curves["alone"], rel=1e-5)
    # A workspace of cuBLAS is either in the memory of the graphs or beside it.
    assert peaks["again"] == pytest.approx(peaks["alone"], abs=2**26)
    assert peaks["behind first"] == pytest.approx(peaks["behind alone"], abs=2**22)
    assert not KEPT_MEMORY.is_kept


@pytest.mark.parametrize("host_activations", [False, True])
def test_graphs_take_no_more_memory(tmp_path, made_once, replays, host_activations, monkeypatch):
    monkeypatch.setattr(activations, "MIN_BYTES", 1)
    config = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    built = built_of(made_once, tmp_path / "emulator", SVD, 16, torch.bfloat16, **config)
    peaks = []
    for on in (False, True):
        with MemoryPeak() as peak:
            trained(
                tmp_path / str(on), built, batch=8, host_activations=host_activations, capture=on
            )
        peaks.append(peak.gib)
    assert min(replays) >= 1
    assert peaks[1] <= 1.05 * peaks[0]
