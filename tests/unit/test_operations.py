"""Arithmetic is counted as torch counts it, and weights are counted where they are read."""

import pytest
import torch
from packed import precision_of
from tiny import image_batch, save_checkpoint, tiny_internvl
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from emloc.adapters.lora import Lora
from emloc.calibration.blockwise import iterate_checkpoint
from emloc.calibration.calibrate import record_moments
from emloc.config.compose import compose
from emloc.config.settings import Compression, LoraSettings
from emloc.emulators import BuildInputs
from emloc.emulators.full import Full
from emloc.emulators.layer_drop import LayerDrop
from emloc.emulators.operations import block_operations, operations_share
from emloc.emulators.prune import Prune
from emloc.emulators.svd import Svd
from emloc.models.checkpoint.source import Source
from emloc.runtime.work_meter import count_operations, count_weights, metered
from emloc.stages.run_config import build as build_settings
from emloc.stages.training.work import rows_of_step, training_work
from emloc.tensors.lean.model import checkpoint_layers

CPU = torch.device("cpu")
IDS = torch.arange(24).reshape(2, 12) + 5
LORA = LoraSettings(4, 8.0, 0.0)
PRUNE = {"spread": "layer", "first": 0, "last": 0, "seed": 0}
SVD = {"multiple": 1, "allocation": "uniform", "sequential": False}
EMULATORS = {
    "full": Full(),
    "svd": Svd(algorithm="eigen", aware=False, **SVD),
    "layer_drop": LayerDrop(first=1, last=1),
    "prune": Prune(importance="random", **PRUNE),
}


class Rows:
    """Four calibration samples in two batches."""

    ids = ("0", "1", "2", "3")

    def batches(self, source, device=None):
        return [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}] * 2

    def training_batches(self, source):
        return [batch | {"labels": IDS} for batch in self.batches(source)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("deep"), num_hidden_layers=5)
    return Source(folder, "tiny", "0", torch.float32)


def layers_of(source) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in source.linears.items() if name.endswith("_proj")}


def build(folder, source, emulator, bits=16, samples=None):
    """Build an emulator in `folder`, and return its facts."""
    ratio = 0.8 if isinstance(emulator, LayerDrop) else 0.6  # it keeps four blocks or more
    plan = emulator.plan(source, layers_of(source), Compression(ratio, "linears", bits))
    build_inputs = BuildInputs(plan, None, samples, precision_of(bits))
    return emulator.build(folder, source, build_inputs, device=CPU)


def products(run) -> float:
    """Multiplications in the matrix products of `run`, without those of attention, for a token."""
    with FlopCounterMode(display=False) as counter:
        run()
    flops = counter.get_flop_counts()["Global"]
    linear = (torch.ops.aten.mm, torch.ops.aten.addmm)  # attention has other kinds
    return sum(flops.get(kind, 0) for kind in linear) / 2 / IDS.numel()


# Operations of a model ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", EMULATORS)
def test_the_share_of_an_emulator_is_that_of_its_matrix_products(tmp_path, source, name, bits):
    emulator = EMULATORS[name]
    build(tmp_path, source, emulator, bits)
    model = emulator.open(tmp_path, source, CPU, precision=precision_of(bits))
    before, after = (products(lambda m=m: m(IDS)) for m in (source.load(CPU).model, model.model))
    assert before == block_operations(source)
    share = operations_share(model, source)
    assert share == pytest.approx(after / before, rel=1e-12)
    assert share == 1 if name == "full" else 0.4 < share <= 0.8


def test_a_lora_adds_nothing_to_the_share(tmp_path, source):
    build(tmp_path, source, EMULATORS["svd"])
    model = EMULATORS["svd"].open(tmp_path, source, CPU)
    share = operations_share(model, source)
    tuned = Lora().attach(model, LORA, list(layers_of(source)))
    assert operations_share(Lora().base(tuned), source) == share


def test_only_the_decoder_of_a_model_with_images_counts(tmp_path):
    tiny_internvl().save_pretrained(tmp_path)
    source = Source(tmp_path, "tiny", "0", torch.float32, AutoModelForImageTextToText)
    names = [name for name in source.linears if "language_model.layers" in name]
    assert block_operations(source) == sum(m * n for m, n in map(source.linears.get, names))
    blocks = [f"model.language_model.layers.{i}" for i in range(2)]
    blocks += [f"model.vision_tower.encoder.layer.{i}" for i in range(2)]
    with metered() as meter:
        for block in iterate_checkpoint(source, [image_batch()], blocks, CPU):
            block.run(lambda _: None)
    assert meter.operations == 2 * block_operations(source)


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_training_takes_two_forwards_of_a_frozen_model_and_one_to_recompute(source, recomputes):
    model = Lora().attach(source.load(CPU), LORA, list(layers_of(source))).train()
    if recomputes:
        checkpoint_layers(model)
    decoder = Lora().base(model).model
    inputs = torch.randn(*IDS.shape, 32, requires_grad=True)  # as behind an adapted layer
    taken = products(lambda: decoder(inputs_embeds=inputs, use_cache=False)[0].sum().backward())
    # Of the LoRA: a forward, gradients of its inputs and of its matrices, and the recomputation.
    of_lora = sum(LORA.rank * (m + n) for m, n in layers_of(source).values()) * (3 + recomputes)
    of_lora -= recomputes * 5 * LORA.rank * 32  # the last product of a block is not recomputed
    work = training_work(24, 0.25, recomputes=recomputes)
    assert work["trained_rows"] == 24
    assert work["row_forwards"] == 24 * 0.25 * (taken - of_lora) / block_operations(source)


@pytest.mark.parametrize(
    ("batch", "accumulate", "processes", "rows"),
    [(4, 1, 1, 4), (4, 3, 1, 12), (4, 3, 2, 24), (4, 15, 1, 40)],
    ids=["one batch", "accumulated", "two processes", "all rows are less than a step"],
)
def test_a_step_takes_the_rows_of_all_its_batches(monkeypatch, batch, accumulate, processes, rows):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    overrides = [f"train.batch={batch}", f"train.accumulate={accumulate}"]
    assert rows_of_step(build_settings(compose(overrides)).train, 40) == rows


# Operations of a stage ---------------------------------------------------------------------------


def test_each_run_of_a_block_over_the_rows_counts(source):
    blocks = [f"model.layers.{i}" for i in range(5)]
    one_row = block_operations(source)
    with metered() as meter:
        for block in iterate_checkpoint(source, Rows().batches(source), blocks, CPU):
            record_moments(block, [f"{block.name}.mlp.up_proj"], False)
    assert meter.operations == 4 * one_row
    with metered() as meter:
        for block in iterate_checkpoint(source, Rows().batches(source), blocks, CPU):
            record_moments(block, [f"{block.name}.mlp.up_proj"], False, peek=True)
    assert meter.operations == 2 * 4 * one_row


@pytest.mark.parametrize(
    ("emulator", "forwards"),
    [
        (Svd(algorithm="eigen", aware=False, **SVD), 0),
        (Svd(algorithm="eigen", aware=True, **SVD), 2),  # moments, then the outputs of the block
        (Svd(algorithm="eigen", aware=True, **(SVD | {"allocation": "greedy"})), 4),
        (Prune(importance="upop", **PRUNE), 3),
        (Prune(importance="taylor", **PRUNE), 4),
    ],
    ids=["plain", "aware", "greedy", "upop", "taylor"],
)
def test_a_build_counts_its_passes_over_the_samples(tmp_path, source, emulator, forwards):
    with metered() as meter:
        build(tmp_path, source, emulator, samples=Rows() if emulator.samples else None)
    assert meter.operations == forwards * 4 * block_operations(source)


def test_a_sequential_build_counts_what_the_compressed_blocks_take(tmp_path, source):
    emulator = Svd(algorithm="eigen", aware=True, **(SVD | {"sequential": True}))
    with metered() as meter:
        build(tmp_path, source, emulator, samples=Rows())
    # Four inputs (of q, o, gate and down) and the outputs: five passes over each of two models.
    share = operations_share(emulator.open(tmp_path, source, CPU), source)
    assert 5 + 5 * share < meter.operations / 4 / block_operations(source) < 10


# Weights -----------------------------------------------------------------------------------------


def test_meters_count_only_while_they_run():
    with metered() as outer:
        count_weights(1)
        with metered() as inner:
            count_weights(2)
            count_operations(4)
        count_operations(8)
    count_weights(16)
    assert (outer.weight_bytes, outer.operations) == (3, 12)
    assert (inner.weight_bytes, inner.operations) == (2, 4)


@pytest.mark.parametrize("bits", [16, 4])
def test_an_opened_emulator_has_read_its_factors_and_the_other_weights(tmp_path, source, bits):
    emulator = EMULATORS["svd"]
    facts = build(tmp_path, source, emulator, bits)
    with metered() as meter:
        emulator.open(tmp_path, source, CPU, precision=precision_of(bits))
    assert meter.weight_bytes == facts["bytes"]


def test_a_packed_model_reads_the_weights_that_it_quantises(tmp_path, source):
    build(tmp_path, source, EMULATORS["full"], 4)
    with metered() as meter:
        EMULATORS["full"].open(tmp_path, source, CPU, precision=precision_of(4))
    assert meter.weight_bytes == 4 * sum(source.sizes.values())
