"""The arithmetic of each stage and the weights that it reads, from a run to its row in a table."""

import json
from functools import partial

import pytest
import torch
from composed import compose_cached
from tiny import save_checkpoint

from emloc.emulators import BuiltEmulator
from emloc.emulators.operations import block_operations, operations_share
from emloc.runtime.stage_cache import Artifact
from emloc.stages.counted_work import work_of_stages
from emloc.stages.run_config import build

ROWS = 5 * 4  # steps x batch
SAMPLES = 6


@pytest.fixture(scope="session")
def deep(made_once):
    """Folder with a model of five blocks."""
    return made_once("deep", partial(save_checkpoint, num_hidden_layers=5))


@pytest.fixture
def work(tiny, run_cached):
    """Function that runs the pipeline and returns the work of its stages, as results store it."""

    def work_of(*overrides: str):
        run_config = build(compose_cached([*tiny, *overrides]))
        return work_of_stages(run_config, run_cached(*overrides).stages)

    return work_of


@pytest.fixture
def source(tiny):
    return build(compose_cached(tiny)).model.open()


def nbytes(source, *excluded: str) -> int:
    """Bytes of all parameters in float32, without those with these words in their names."""
    sizes = source.sizes.items()
    return 4 * sum(size for name, size in sizes if not any(word in name for word in excluded))


@pytest.mark.parametrize(("recomputes", "forwards"), [("true", 3.0), ("false", 2.0)])
def test_lora_takes_three_forwards_a_row_with_recomputation_and_two_without(
    work, source, recomputes, forwards
):
    of_lora = work("method=lora", f"train.checkpointing={recomputes}")
    assert of_lora["trained_rows"] == ROWS
    assert of_lora["row_forwards"] == {"train": ROWS * forwards}
    assert of_lora["weights_read"] == {"emulate": 0, "train": nbytes(source), "recover": 0}


def test_the_stages_of_emloc_count_for_themselves(work, run_cached, source):
    cell = ("method=emloc", "compression=r50", "emulator.shared=none")
    result, counted = run_cached(*cell), work(*cell)
    emulator = build(compose_cached(["method=emloc"])).emulator
    emulated = BuiltEmulator(emulator, result.stages["emulate"], source).open(torch.device("cpu"))
    share = operations_share(emulated, source)
    assert 0.4 < share <= 0.5
    forwards = counted["row_forwards"]
    assert forwards["calibrate"] == SAMPLES
    assert forwards["emulate"] == SAMPLES  # factors of layers with output moments are fitted again
    assert forwards["train"] == pytest.approx(ROWS * 2 * share)
    assert {*forwards} == {"calibrate", "emulate", "train"}
    read = counted["weights_read"]
    assert read["calibrate"] == nbytes(source, "lm_head")
    assert read["train"] == result.stages["emulate"].facts["bytes"]
    # Original and factors of each compressed layer.
    linears = 4 * block_operations(source)
    assert read["recover"] == pytest.approx(linears * (1 + share))


def test_nothing_is_counted_that_a_run_does_not_do(work, run_cached):
    assert work("method=zero_shot") == {"row_forwards": {}, "weights_read": {"emulate": 0}}
    facts = run_cached("method=zero_shot").evaluated.facts
    assert not {"row_forwards", "weights_read"} & {*facts}


def test_offload_reads_each_block_forward_and_backward(work, tiny, deep):
    overrides = ("method=offload", f"model.source={deep}", "train.steps=2", "train.accumulate=2")
    of_offload = work(*overrides)
    source = build(compose_cached([*tiny, *overrides])).model.open()
    block = sum(
        -(-4 * size // 256) * 256  # each tensor begins at a multiple of 256 bytes
        for name, size in source.sizes.items()
        if name.startswith("model.layers.0.")
    )
    # The last two blocks forward are the first two backward, and the last two backward the next
    # two forward. The training path runs one forward before the first, and each of both copies all.
    copies = 5 + (5 + 3) + 3 * (3 + 3)
    assert of_offload["weights_read"]["train"] == nbytes(source) + copies * block
    assert of_offload["row_forwards"] == {"train": 16 * 3.0}


def test_forwards_of_a_smaller_checkpoint_are_counted_in_those_of_the_original(tmp_path):
    """The stages know the smaller checkpoint alone."""
    run_config = build(
        compose_cached(["model=tiny_internvl", "method=small_model", "compression=r50"])
    )
    facts = {"seconds": 1.0, "peak_gib": 1.0, "row_forwards": 60.0, "trained_rows": 20}
    (tmp_path / "stage.json").write_text(json.dumps(facts | {"weights_read": 7}))
    counted = work_of_stages(run_config, {"train": Artifact("train", "0", tmp_path)})
    sibling = run_config.model.siblings["r50"]
    sizes = [block_operations(model.shape_source()) for model in (sibling, run_config.model)]
    assert 0 < sizes[0] < sizes[1]
    assert counted["row_forwards"] == {"train": pytest.approx(60 * sizes[0] / sizes[1])}
    assert (counted["weights_read"], counted["trained_rows"]) == ({"train": 7}, 20)
