"""Whole runs with pruned models: upop, loram_stru and loram_rand on the tiny model."""

import json
import shutil
from functools import partial

import pytest
import torch
from composed import compose_cached
from packed import precision_of
from peft import PeftModel
from safetensors.torch import load_file
from staged import losses_of
from transformers import AutoModelForCausalLM

from emloc.adapters.lora import Lora
from emloc.adapters.saved import read_lora
from emloc.emulators import BuiltEmulator
from emloc.errors import ConfigError
from emloc.precision.nf4 import Nf4Linear
from emloc.stages.run_config import build

CPU = torch.device("cpu")
METHODS = ["upop", "loram_stru", "loram_rand"]
IDS = torch.arange(60).reshape(2, 30) + 5


@pytest.fixture
def run_cached(run_cached):
    """Function that runs the pipeline on the tiny model with both its blocks pruned."""
    return partial(run_cached, *WHOLE)


WHOLE = ["emulator.first=0", "emulator.last=0"]
LEARNING = ["train.learning_rate=0.05", "train.schedule=constant"]


def built_of(result, tiny, method) -> BuiltEmulator:
    run_config = build(compose_cached([*tiny, f"method={method}", *WHOLE]))
    precision = precision_of(result.emulated.facts["bits"])
    return BuiltEmulator(run_config.emulator, result.emulated, run_config.model.open(), precision)


def tables(result) -> dict[str, dict]:
    return json.loads((result.emulated.folder / "layers.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_pruned_trained_scattered_and_scored(run_cached, method):
    result = run_cached(f"method={method}", *LEARNING)
    losses = losses_of(result)
    assert result.evaluated.facts["rows"] == 6
    assert 0 < result.evaluated.facts["scores"]["loss"] < 10
    assert losses[-1] < losses[0] - 0.2
    facts = result.emulated.facts
    assert 0.45 < facts["share_of_linears"] <= 0.5
    assert facts["whole"] == {}
    assert ("samples" in facts) == (method != "loram_rand")
    assert result.statistics is None
    assert result.recovered.facts["enlarged_layers"] == 14


@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_the_recovered_adapter_on_the_original_model(
    run_cached, tiny, checkpoint, tmp_path, method
):
    """Compares with the original weights plus the trained product at kept rows and columns."""
    result = run_cached(f"method={method}", *LEARNING, "lora.alpha=8")
    folder = shutil.copytree(result.recovered.folder / "adapter", tmp_path / "elsewhere")
    built_emulator = built_of(result, tiny, method)
    ours = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for layer, pair in read_lora(result.trained.folder / "adapter").pairs.items():
        rows, columns = built_emulator.emulator.kept_indices(result.emulated.folder, layer)
        weight = ours.get_submodule(layer).weight.data
        rows = torch.arange(weight.shape[0]) if rows is None else rows
        columns = torch.arange(weight.shape[1]) if columns is None else columns
        weight[rows[:, None], columns] += pair.delta
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        before = plain(input_ids=IDS).logits
        after = PeftModel.from_pretrained(plain, folder).eval()(input_ids=IDS).logits
        torch.testing.assert_close(after, ours(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    assert float((after - before).norm()) > 0.01 * float(before.norm())
    assert json.loads((folder / "carried.json").read_text()) == {"by": "scatter"}


def test_the_pruned_model_is_trained(run_cached, tiny):
    result = run_cached("method=upop", *LEARNING)
    built_emulator = built_of(result, tiny, "upop")
    model = built_emulator.open(CPU)
    for layer, line in tables(result).items():
        module = model.get_submodule(layer)
        assert [module.out_features, module.in_features] == line["shape"]
    assert sum(one.numel() for one in model.parameters()) == result.emulated.facts["parameters"]
    # Fits, since the shapes are those of the pruned model.
    Lora().load(model, result.trained.folder / "adapter")


def test_the_seed_decides_only_the_random_units(run_cached):
    first, again, other = (
        run_cached("method=loram_rand", *more) for more in ([], ["seed=1"], ["emulator.seed=1"])
    )
    assert first.emulated == again.emulated != other.emulated
    kept_units, others = (
        load_file(one.emulated.folder / "kept.safetensors") for one in (first, other)
    )
    assert {name: one.shape for name, one in kept_units.items()} == {
        name: one.shape for name, one in others.items()
    }
    assert any(not torch.equal(kept_units[name], others[name]) for name in kept_units)


def test_a_pruned_model_in_four_bits_is_trained_and_scattered(run_cached):
    recipe = ["method=upop", *LEARNING]
    result = run_cached(*recipe, "compression.bits=4")
    losses = losses_of(result)
    wide = run_cached(*recipe)
    assert losses[-1] < losses[0] - 0.2
    four, sixteen = result.emulated.facts, wide.emulated.facts
    assert four["parameters"] == sixteen["parameters"]
    assert four["bytes"] < sixteen["bytes"]
    recovered = read_lora(result.recovered.folder / "adapter").pairs
    assert {pair.a.shape[1] for pair in recovered.values()} == {32, 64}


def test_blocks_that_are_not_pruned_are_in_four_bits_too(run_cached, tiny):
    result = run_cached(
        "method=loram_stru", "compression.bits=4", "compression.ratio=0.7", "emulator.first=1"
    )
    model = built_of(result, tiny, "loram_stru").open(CPU)
    lines = tables(result)
    assert len(lines) == 14
    for layer, line in lines.items():
        assert type(model.get_submodule(layer)) is Nf4Linear
        assert ("unit" in line) == layer.startswith("model.layers.1.")
    assert result.emulated.facts["whole"] == {
        f"model.layers.*.{name}_proj": 1
        for name in (
            *("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"),
            *("mlp.gate", "mlp.up", "mlp.down"),
        )
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["method=loram_stru"],
            "emulator.first=4 and emulator.last=2 leave no block of HuggingFaceTB/"
            "SmolLM2-135M-Instruct to prune; set emulator.first=0 emulator.last=0",
        ),
        (
            ["method=upop", "recovery=none"],
            "emulator=prune trains layers smaller than the original's, and recovery=none does not "
            "enlarge them; set recovery=scatter",
        ),
        (
            ["method=upop", r"model.emulator_targets='.*\.q_proj'"],
            "has no MLP (gate_proj, up_proj, down_proj; fc1, fc2) or decoder attention",
        ),
    ],
)
def test_models_that_cannot_be_pruned_are_refused_in_one_line(
    run_uncached, store, settings, message
):
    with pytest.raises(ConfigError) as caught:
        run_uncached(*settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not store.root.exists()
