"""Layers that read the same input are factorised together: one v, and a u for each layer."""

import json

import pytest
import torch
from packed import precision_of
from safetensors import safe_open
from test_emulators import Rows, budget, layers_of, svd
from tiny import save_checkpoint

from emloc.calibration.calibrate import calibrate
from emloc.calibration.moments import Statistics
from emloc.emulators import BuildInputs, BuiltEmulator
from emloc.emulators.size import ranks_at, size_facts, stored_shapes
from emloc.emulators.svd.factors import factorize
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.models.shared_inputs import names_by_input, names_by_stored_tensor
from emloc.runtime.stage_cache import Artifact
from emloc.tensors.linalg.factorize import eigen
from emloc.tensors.nn.factorized import Factorized, PackedFactorized
from emloc.tensors.nn.operations import linear_operations

CPU = torch.device("cpu")
ATTENTION = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
MLP = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Source(save_checkpoint(tmp_path_factory.mktemp("model")), "tiny", "0", torch.float32)


@pytest.fixture(scope="module")
def statistics(source, tmp_path_factory):
    folder, layers = tmp_path_factory.mktemp("statistics"), layers_of(source)
    joint = svd(shared="inputs").joint(source, layers)
    facts = calibrate(folder, source, layers, Rows(), False, device=CPU, joint=joint)
    (folder / "stage.json").write_text(json.dumps(facts))
    return Artifact("calibrate", "0", folder)


def test_the_factors_are_those_of_the_weights_below_each_other():
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": 9, "k": 4, "v": 4}
    weights = {n: torch.randn(m, 12, generator=generator).double() for n, m in sizes.items()}
    x = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    statistics = Statistics(dict.fromkeys("qkv", "q"), {"q": x.T @ x}, tokens=50)
    ranks = dict.fromkeys("qkv", 5)
    layers = factorize(weights, ranks, statistics, "eigen", groups=[["q", "k", "v"]])
    whole = eigen(torch.cat([*weights.values()]), 5, input_gram=x.T @ x, dtype=torch.float64)
    product = torch.cat([layers[name].factors.u @ layers[name].factors.v for name in "qkv"])
    torch.testing.assert_close(product, whole.u @ whole.v)
    assert len({id(layers[name].factors.v) for name in "qkv"}) == 1
    facts = layers["k"].facts
    assert facts["group"] == ["q", "k", "v"]
    assert facts["kept"] == pytest.approx(whole.kept_share)
    assert facts["spectrum"]["directions"] == 12
    alone = factorize(weights, dict.fromkeys("qkv", 3), statistics, "eigen")
    assert "group" not in alone["k"].facts


def test_what_the_loss_depends_on_counts_for_each_layer():
    """With a gradient for one of two layers, that one is approximated better, the other worse."""
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(6, 8, generator=generator).double() for n in "gu"}
    x = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    statistics = Statistics(dict.fromkeys("gu", "g"), {"g": x.T @ x}, tokens=50)
    errors = []
    for gradients in ({}, {"g": 10 * torch.randn(40, 6, generator=generator) * torch.arange(6)}):
        layers = factorize(
            *(weights, {"g": 4, "u": 4}, statistics, "eigen"),
            gradients=gradients,
            groups=[["g", "u"]],
        )
        residuals = {n: weights[n] - one.factors.u @ one.factors.v for n, one in layers.items()}
        errors.append({n: (x @ residual.T).square().sum(0) for n, residual in residuals.items()})
    assert errors[1]["g"][-1] < errors[0]["g"][-1]  # the output that matters most
    assert errors[1]["g"].sum() + errors[1]["u"].sum() > errors[0]["g"].sum() + errors[0]["u"].sum()


def test_layers_of_different_inputs_are_refused():
    weights = {"k": torch.randn(4, 6), "q": torch.randn(4, 6)}
    grams = {name: torch.eye(6).double() for name in "qk"}
    statistics = Statistics({"q": "q", "k": "k"}, grams, tokens=6)
    with pytest.raises(ConfigError, match=r"k: reads another input than q.*emulator\.shared=none"):
        factorize(weights, {"q": 2, "k": 2}, statistics, "eigen", groups=[["q", "k"]])


def test_layers_that_share_an_input_get_its_gram_where_their_outputs_are_smaller():
    rows, narrow = torch.randn(20, 6), torch.randn(2, 6)
    inputs, weights = {"q": rows, "k": rows}, {"q": narrow, "k": narrow}
    alone, together = Statistics(), Statistics()
    alone.add(inputs, weights, inputs_only=False)
    together.add(inputs, weights, inputs_only=False, joint={"q", "k"})
    assert (set(alone.outputs), set(alone.inputs)) == ({"q", "k"}, set())
    assert (set(together.outputs), set(together.inputs)) == (set(), {"q"})


def test_ranks_and_sizes_count_v_once(source):
    layers = layers_of(source)
    groups = names_by_input(layers)
    ranks = ranks_at(0.5, layers, 1, groups)
    assert [*ranks] == [*layers]
    alone = ranks_at(0.5, layers, 1)
    for names in groups:
        rows, columns = sum(layers[name][0] for name in names), layers[names[0]][1]
        (rank,) = {ranks[name] for name in names}
        assert rank * (rows + columns) <= 0.5 * rows * columns < (rank + 1) * (rows + columns)
        assert len(names) == 1 or all(rank > alone[name] for name in names)
    facts = size_facts(source, stored_shapes(source, ranks, groups), None)
    assert 0.4 < facts["share_of_linears"] <= 0.5


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"algorithm": "eigen", "allocation": "greedy"},
        {"algorithm": "whiten"},
        {"sequential": True},
        {"aware": False},
    ],
    ids=str,
)
def test_an_emulator_has_one_v_for_each_input(tmp_path, source, statistics, settings, bits):
    emulator = svd(shared="inputs", **settings)
    cached = statistics if emulator.statistics == "smaller" else None
    inputs = BuildInputs(
        emulator.plan(source, layers_of(source), budget(bits)),
        cached,
        Rows() if emulator.aware else None,
        precision_of(bits),
    )
    facts = emulator.build(tmp_path, source, inputs, device=CPU)
    artifact = Artifact("emulate", "0", tmp_path)
    built = BuiltEmulator(emulator, artifact, source, precision_of(bits))
    model = built.open(CPU)
    for names in (ATTENTION, MLP):
        modules = [model.get_submodule(name) for name in names]
        assert {type(one) for one in modules} == {Factorized if bits == 16 else PackedFactorized}
        assert len({one.v_id for one in modules}) == 1
        for name, module in zip(names, modules, strict=True):
            residual = source.weight(name).double() - module.product()
            torch.testing.assert_close(built.residual(name), residual)
    with safe_open(tmp_path / "model.layers.0.safetensors", "pt") as file:
        stored_vs = {key.partition("_proj")[0] for key in file.keys() if "_proj.v" in key}  # noqa: SIM118
    groups = names_by_input(layers_of(source))
    owners = {names[0].removesuffix("_proj") for names in groups if "layers.0." in names[0]}
    assert stored_vs == owners
    stored = sum(p.numel() for p in model.parameters()) if bits == 16 else facts["parameters"]
    assert stored == facts["parameters"]
    plain = svd(**settings)
    ranks = plain.plan(source, layers_of(source), budget(bits))
    assert linear_operations(model.model.layers) <= 1.02 * sum(
        rank * sum(source.linears[layer]) for layer, rank in ranks.items()
    )


def test_a_model_without_a_checkpoint_shares_nothing_by_the_checkpoint(source):
    layers = layers_of(source)
    assert names_by_stored_tensor(source, layers) == [[name] for name in layers]
    shape = source.config.to_dict()
    drawn = Source(None, "tiny", "0", torch.float32, source.auto, shape, seed=0)
    assert svd(shared="checkpoint").groups(drawn, layers) == [[name] for name in layers]
