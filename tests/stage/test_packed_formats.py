"""Packed formats work with every emulator in whole runs: one of a plug-in, one with feedback."""

from dataclasses import replace

import pytest
from composed import compose_cached
from packed import FIVE_BITS, INT2, TOY
from tiny import save_checkpoint

from emloc.adapters.saved import read_lora
from emloc.emulators import BuiltEmulator
from emloc.emulators.size import bytes_of
from emloc.errors import ConfigError, StageError
from emloc.models.checkpoint.source import CPU
from emloc.pipeline import run
from emloc.precision import PackedLayer
from emloc.stages.run_config import build
from emloc.tensors.nn.factorized import PackedFactorized

# Emulator -> overrides with a method and a ratio that the model allows.
METHODS = {
    "full": ["method=lora"],
    "svd": ["method=emloc", "emulator.shared=none"],
    "svd, sequential": ["method=emloc", "emulator.shared=none", "emulator.sequential=true"],
    "prune": ["method=upop", "compression=r75"],
    "layer_drop": ["method=offsite", "compression=r75"],
    "offload": ["method=offload"],
}


@pytest.fixture(autouse=True)
def _plugin(monkeypatch):
    monkeypatch.setenv("EMLOC_PLUGINS", str(FIVE_BITS))


@pytest.fixture
def cell_of(tiny, tmp_path):
    def make(*overrides: str, bits: int = TOY.bits):
        last = ("train.learning_rate=0.02", *overrides, f"compression.bits={bits}")
        if "method=offsite" in overrides:  # offsite needs blocks to drop between the outer four
            deep = save_checkpoint(tmp_path / "deep", num_hidden_layers=8)
            last += (f"model.source={deep}",)
        return build(compose_cached([*tiny, *last]))

    return make


@pytest.mark.parametrize("precision", [TOY, INT2], ids=["plug-in", "feedback"])
@pytest.mark.parametrize("emulator", METHODS)
def test_a_packed_run_quantises_trains_and_recovers(cell_of, store, emulator, precision):
    run_config, losses = cell_of(*METHODS[emulator], bits=precision.bits), []
    result = run(run_config, store, lambda step, values: losses.append(values["loss"]))
    assert len(losses) == 5
    assert all(4 < loss < 7 for loss in losses)
    trained = read_lora(result.trained.folder / "adapter").pairs
    assert all(float(pair.b.abs().max()) > 0.01 for pair in trained.values())
    facts = result.emulated.facts
    assert (facts["bits"], facts["precision"]) == (precision.bits, precision.name)
    # The trained model is scored as well, since it differs from the recovered one.
    assert result.as_trained is not None
    assert result.evaluated.facts["scores"] != result.as_trained.facts["scores"]

    source = run_config.model.open()
    built_emulator = BuiltEmulator(
        run_config.emulator, result.emulated, source, run_config.precision
    )
    model = built_emulator.open(CPU)
    packed = {
        name: [layer.v, layer.ut] if isinstance(layer, PackedFactorized) else [layer.matrix]
        for name, layer in model.named_modules()
        if isinstance(layer, PackedLayer | PackedFactorized)
    }
    assert len(packed) == (6 * 7 if emulator == "layer_drop" else 2 * 7)
    # The bytes include the scales of whole groups.
    shapes = [matrix.shape for matrices in packed.values() for matrix in matrices]
    nbytes = sum(matrix.nbytes for matrices in packed.values() for matrix in matrices)
    assert nbytes == bytes_of(shapes, precision, source.dtype)
    assert nbytes >= sum(precision.bits * m * n / 8 + 2 * m * n / 64 for m, n in shapes)
    gone = [name for name in source.sizes if name.removesuffix(".weight") not in packed]
    if emulator != "layer_drop":
        rest = sum(source.sizes[name] for name in gone) * source.dtype.itemsize
        assert facts["bytes"] == nbytes + rest

    # Pruned layers have other shapes, and streamed layers have weights only while they compute.
    if emulator not in ("prune", "offload"):
        for layer in [name for name in packed if name.endswith("layers.0.mlp.up_proj")]:
            residual, weight = built_emulator.residual(layer), source.weight(layer).double()
            emulator_weight = weight - residual
            matrices = [matrix.dequantize().double() for matrix in packed[layer]]
            formed = matrices[1].T @ matrices[0] if len(matrices) == 2 else matrices[0]
            assert float((emulator_weight - formed).abs().max()) < 1e-12


def test_a_run_is_reused_unless_settings_of_the_format_change(cell_of, store):
    run_config = cell_of("method=lora")
    other = replace(run_config, precision=replace(TOY, group=32))
    keys = [
        run(one, store, lambda *_: None).emulated.key for one in (run_config, run_config, other)
    ]
    assert keys[0] == keys[1] != keys[2]


def test_an_adapter_that_reads_weights_is_refused(cell_of, store):
    with pytest.raises((ConfigError, StageError), match="no library reads a weight in five_bits"):
        run(cell_of("method=dora"), store, lambda *_: None)
