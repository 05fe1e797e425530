"""Sequential fitting: the target of each layer, and the gain of the whole emulator."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import precision_of
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import image_batch, tiny_internvl, tiny_llama, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForImageTextToText

from emloc.calibration.blockwise import by_block, iterate_checkpoint
from emloc.calibration.calibrate import calibrate
from emloc.calibration.offload import StateLimits
from emloc.config.settings import Compression
from emloc.emulators import BuildInputs
from emloc.emulators.svd import Svd
from emloc.emulators.svd.factor_writer import FactorWriter
from emloc.emulators.svd.sequential import lock_step
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.runtime.stage_cache import Artifact
from emloc.tensors.linalg.factorize import eigen
from emloc.tensors.linalg.regression import RIDGE, regress_weight

CPU = torch.device("cpu")
F64 = torch.float64
SEEDS = range(5)


def checkpoint(folder, seed: int) -> Source:
    """Write a random Llama of three blocks whose embeddings have a few strong directions."""
    tokenizer = tiny_tokenizer(True)
    model = tiny_llama(tokenizer, num_hidden_layers=3)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=draw)
        model.get_input_embeddings().weight.mul_(10 * torch.arange(1, 33) ** -0.7)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Source(folder, "tiny", "0", torch.float32)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Source]:
    return [checkpoint(tmp_path_factory.mktemp("model"), seed) for seed in SEEDS]


@pytest.fixture
def source(sources) -> Source:
    return sources[0]


class Rows:
    """Random token batches of eight rows, padded on the left."""

    ids = ("train/3", "train/1")

    def __init__(self, count: int = 4) -> None:
        self.count = count

    def batches(self, source, device=None):
        batches, generator = [], torch.Generator().manual_seed(1)
        for _ in range(self.count):
            mask = torch.ones(8, 30, dtype=torch.long)
            mask[1, :9] = 0
            ids = torch.randint(5, 261, mask.shape, generator=generator) * mask
            batches.append({"input_ids": ids, "attention_mask": mask})
        return batches


def layers_of(source) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in source.linears.items() if name.endswith("_proj")}


def svd(**settings) -> Svd:
    plain = {"algorithm": "eigen", "aware": True, "multiple": 1}
    return Svd(**(plain | {"sequential": True, "allocation": "uniform"} | settings))


def build_inputs_of(
    emulator: Svd, source, bits: int = 16, statistics=None, rows=None
) -> BuildInputs:
    ranks = emulator.plan(source, layers_of(source), Compression(0.4, "linears", bits))
    return BuildInputs(ranks, statistics, rows or Rows(), precision_of(bits))


def build_in(folder, source, emulator: Svd, bits: int = 16, **given_settings) -> dict:
    folder.mkdir(exist_ok=True)
    build_inputs = build_inputs_of(emulator, source, bits, **given_settings)
    return emulator.build(folder, source, build_inputs, device=CPU)


def tensors_of(path) -> dict[str, Tensor]:
    return load_file(path)


def same_files(one, other) -> bool:
    names = [path.name for path in sorted(one.glob("*.safetensors"))]
    assert names == [path.name for path in sorted(other.glob("*.safetensors"))]
    for name in names:
        a, b = tensors_of(one / name), tensors_of(other / name)
        assert a.keys() == b.keys()
        if not all(torch.equal(tensor, b[key]) for key, tensor in a.items()):
            return False
    return True


# What a layer is fitted to -----------------------------------------------------------------------


def inputs(seed: int, tokens: int, n: int, drift: float) -> tuple[Tensor, Tensor]:
    """Return inputs of the original and of the compressed model, each (tokens, n) float64."""
    draw = torch.Generator().manual_seed(seed)
    x, gap = (torch.randn(tokens, n, generator=draw, dtype=F64) for _ in range(2))
    return x, x + drift * gap


def moments(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.T @ rows, (x - rows).T @ rows


@given(
    seed=st.integers(0, 2**31),
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    tokens=st.integers(0, 40),
    drift=st.floats(0, 2),
)
@settings(max_examples=100)
def test_the_target_solves_least_squares_with_a_ridge_towards_the_weight(seed, m, n, tokens, drift):
    """Holds also for fewer tokens than inputs.

    The reference solution writes the ridge as n further tokens that are equal in both models.
    """
    x, rows = inputs(seed, tokens, n, drift)
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed + 1), dtype=F64)
    input_gram, change = moments(x, rows)
    target = regress_weight(weight, input_gram, change)
    pull = (RIDGE * input_gram.diagonal().mean()).sqrt() * torch.eye(n, dtype=F64)
    if not tokens:
        assert torch.equal(target, weight)
        return
    outputs = torch.cat([x, pull]) @ weight.T
    expected = torch.linalg.lstsq(torch.cat([rows, pull]), outputs).solution.T
    torch.testing.assert_close(target, expected, atol=1e-8, rtol=1e-8)


def test_directions_without_data_keep_the_weight():
    x, rows = inputs(0, 6, 20, 0.5)
    weight = torch.randn(8, 20, dtype=F64)
    change = regress_weight(weight, *moments(x, rows)) - weight
    spare = torch.linalg.svd(rows, full_matrices=True).Vh[6:]
    assert float((change @ spare.T).abs().max()) < 1e-8
    assert float((change @ rows.T).norm()) > 0.1


def test_a_gram_that_rounding_made_indefinite_is_accepted():
    """For example a float32 sum with one direction far stronger than all others."""
    x, rows = inputs(0, 400, 20, 0.1)
    weight = torch.randn(8, 20, generator=torch.Generator().manual_seed(2), dtype=F64)
    for tokens in (x, rows):
        tokens[:, 0] *= 1e4
        tokens[:, 19] = 0
    input_gram, change = moments(x, rows)
    exact = regress_weight(weight, input_gram, change)
    input_gram[19, 19] = -3 * RIDGE * float(input_gram.diagonal().mean())
    torch.testing.assert_close(
        regress_weight(weight, input_gram, change), exact, atol=1e-3, rtol=1e-3
    )
    assert float((exact - weight).norm()) > 0.01


def test_without_drift_the_target_is_the_weight():
    x, _ = inputs(0, 30, 20, 0.0)
    weight = torch.randn(8, 20, dtype=torch.bfloat16)
    assert torch.equal(regress_weight(weight, *moments(x, x)), weight.double())


def test_the_target_brings_the_new_inputs_nearer_to_the_original_outputs():
    x, rows = inputs(0, 400, 20, 0.5)
    weight = torch.randn(8, 20, dtype=F64)
    before, after = (
        float((x @ weight.T - rows @ one.T).square().sum())
        for one in (weight, regress_weight(weight, *moments(x, rows)))
    )
    assert after < 0.9 * before


@pytest.mark.parametrize("broken", ["input_gram", "drift", "weight"])
def test_numbers_that_are_not_finite_are_refused(broken):
    parts = {"weight": torch.ones(3, 4), "input_gram": torch.eye(4), "drift": torch.eye(4)}
    parts[broken] = parts[broken] * torch.nan
    with pytest.raises(ValueError, match="not finite"):
        regress_weight(**parts)


def test_grams_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 4\), \(3, 3\), \(4, 4\)"):
        regress_weight(torch.ones(3, 4), torch.eye(3), torch.eye(4))


# One block ---------------------------------------------------------------------------------------


def distances(one, other, layers) -> dict[str, float]:
    """Layer -> relative difference between the products of its factors in two folders."""
    distances_by_layer = {}
    for block, members in by_block(layers).items():
        files = [tensors_of(folder / f"{block}.safetensors") for folder in (one, other)]
        for layer in members:
            a, b = (file[f"{layer}.u"].double() @ file[f"{layer}.v"].double() for file in files)
            distances_by_layer[layer] = float((a - b).norm() / b.norm())
    return distances_by_layer


def test_layers_after_an_exact_prefix_do_not_depend_on_sequential_fitting(tmp_path, source):
    """Only query, key and value of the first block have an exact prefix."""
    build_in(tmp_path / "after", source, svd())
    build_in(tmp_path / "each", source, svd(sequential=False))
    differences = distances(tmp_path / "after", tmp_path / "each", layers_of(source))
    near = {layer for layer, distance in differences.items() if distance < 1e-4}
    assert near == {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    assert min(distance for layer, distance in differences.items() if layer not in near) > 0.02


def test_each_layer_is_the_regression_of_its_original_outputs(tmp_path, source):
    """Computed with the inputs of the finished emulator and of the original."""
    emulator = svd()
    build_in(tmp_path, source, emulator)
    models = source.load(CPU), emulator.open(tmp_path, source, CPU)
    ranks = build_inputs_of(emulator, source).plan
    for layer in ("model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        x, rows = (inputs_of(model, layer) for model in models)
        weight = source.weight(layer)
        target = regress_weight(weight, *moments(x, rows))
        expected = eigen(target, ranks[layer], input_gram=rows.T @ rows, dtype=F64)
        stored_weight = source.weight(layer).double() - emulator.residual(tmp_path, source, layer)
        product = expected.u @ expected.v
        assert float((stored_weight - product).norm() / product.norm()) < 1e-3
        assert float((stored_weight - weight.double()).norm()) > 0.1 * float(weight.norm())


def inputs_of(model, layer: str) -> Tensor:
    recorded = []
    handle = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: recorded.append(args[0])
    )
    with torch.no_grad():
        for batch in Rows().batches(None):
            model(**batch)
            recorded[-1] = recorded[-1][batch["attention_mask"].bool()]
    handle.remove()
    return torch.cat(recorded).double()


@pytest.mark.parametrize("host_bytes", [None, 0])
def test_each_model_passes_its_own_outputs_to_the_next_block(tmp_path, source, host_bytes):
    emulator, blocks = svd(), by_block(layers_of(source))
    build_in(tmp_path, source, emulator)
    original, emulated = source.load(CPU), emulator.open(tmp_path, source, CPU)
    layer = "self_attn.q_proj"
    batches = Rows().batches(source)
    steps = lock_step(
        source,
        batches,
        blocks,
        lambda name: tmp_path / f"{name}.safetensors",
        None,
        CPU,
        StateLimits(host=host_bytes),
        tmp_path,
    )
    visited = []
    for name, both in steps:
        recorded = {}
        for kind, block in (("original", both.original), ("compressed", both.compressed)):
            # The module of the block holds the original weights for both models.
            weight = block.module.get_submodule(layer).weight
            assert torch.equal(weight, source.weight(f"{name}.{layer}"))
            rows: list[Tensor] = []
            handle = block.module.get_submodule(layer).register_forward_pre_hook(
                lambda _, args, rows=rows: rows.append(args[0].clone())
            )
            masks = []
            block.peek(masks.append)
            handle.remove()
            recorded[kind] = torch.cat(
                [r[m.is_real] for r, m in zip(rows, masks, strict=True)]
            ).double()
        torch.testing.assert_close(recorded["original"], inputs_of(original, f"{name}.{layer}"))
        torch.testing.assert_close(recorded["compressed"], inputs_of(emulated, f"{name}.{layer}"))
        visited.append(name)
    assert visited == list(blocks)


# The whole emulator ------------------------------------------------------------------------------


def final(model, rows) -> Tensor:
    """Final hidden states of all tokens but padding, (N, n) float64."""
    states = []
    with torch.no_grad():
        for batch in rows.batches(None):
            states.append(model.model(**batch).last_hidden_state[batch["attention_mask"].bool()])
    return torch.cat(states).double()


@pytest.mark.parametrize("bits", [16, 4])
def test_sequential_fitting_brings_the_final_states_closer_to_the_original(tmp_path, sources, bits):
    """Compares squared errors on the calibration tokens, at low rank, for five seeds."""
    gains = []
    for seed, source in enumerate(sources):
        expected = final(source.load(CPU), Rows())
        errors = []
        for way in (True, False):
            emulator, folder = svd(sequential=way), tmp_path / f"{seed}-{way}"
            build_in(folder, source, emulator, bits)
            model = emulator.open(folder, source, CPU, precision=precision_of(bits))
            actual = final(model, Rows())
            errors.append(float((actual - expected).square().sum()))
        gains.append(errors[0] / errors[1])
    assert max(gains) < 0.9, gains
    assert sum(gains) / len(gains) < 0.85, gains


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
def test_a_killed_build_resumes_with_the_same_result(
    tmp_path, source, monkeypatch, bits, allocation
):
    import emloc.emulators.svd as home

    emulator, saved = svd(allocation=allocation), []
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    facts = build_in(whole, source, emulator, bits)
    write = FactorWriter.write

    def once(self, block, factors):
        if saved:
            raise KeyboardInterrupt
        saved.append(block)
        return write(self, block, factors)

    monkeypatch.setattr(FactorWriter, "write", once)
    with pytest.raises(KeyboardInterrupt):
        build_in(killed, source, emulator, bits)
    files = sorted(killed.glob("*.safetensors"))
    assert len(files) == (2 if allocation == "greedy" else 1)
    stamps = [path.stat().st_mtime_ns for path in files]
    monkeypatch.setattr(FactorWriter, "write", write)
    monkeypatch.setattr(home, "spectra", None)  # the spectra exist and must not be computed again
    assert build_in(killed, source, emulator, bits) == facts
    assert [path.stat().st_mtime_ns for path in files] == stamps
    assert same_files(whole, killed)
    assert (whole / "layers.json").stat().st_size > 0


def test_the_facts_name_the_samples_and_the_size(tmp_path, source):
    emulator = svd()
    facts = build_in(tmp_path, source, emulator)
    plain = build_in(tmp_path / "plain", source, svd(sequential=False))
    assert facts == plain
    assert facts["samples"] == Rows.ids
    assert 0.35 < facts["share_of_linears"] <= 0.4
    table = json.loads((tmp_path / "layers.json").read_text())
    assert list(table) == sorted(layers_of(source))
    ranks = build_inputs_of(emulator, source).plan
    assert {layer: one["rank"] for layer, one in table.items()} == ranks
    assert all(0 < one["kept"] <= 1 for one in table.values())
    written = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert written == {
        "journal.jsonl",
        "layers.json",
        *(f"model.layers.{index}.safetensors" for index in range(3)),
    }


def test_vision_tower_and_language_model_are_fitted(tmp_path):
    tiny_internvl().save_pretrained(tmp_path / "model")
    source = Source(
        tmp_path / "model", "tiny", "0", torch.float32, auto=AutoModelForImageTextToText
    )

    class Images(Rows):
        def batches(self, source, device=None):
            return [image_batch()]

    layers = {
        name: shape
        for name, shape in source.linears.items()
        if ".layers." in name or ".layer." in name
    }
    for way in (True, False):
        emulator, folder = svd(sequential=way), tmp_path / str(way)
        folder.mkdir()
        ranks = emulator.plan(source, layers, Compression(0.4, "linears", 16))
        emulator.build(folder, source, BuildInputs(ranks, None, Images(), None), device=CPU)
    blocks = list(by_block(layers))
    assert len(blocks) == 4
    assert ["vision_tower" in block for block in blocks] == [True, True, False, False]
    differences = distances(tmp_path / "True", tmp_path / "False", layers)
    near = {layer for layer, distance in differences.items() if distance < 1e-4}
    assert near == {f"{blocks[0]}.attention.{name}_proj" for name in "qkv"}


# A layer that nothing runs through ---------------------------------------------------------------


def test_a_layer_that_no_sample_reaches_is_refused(tmp_path):
    tiny_internvl().save_pretrained(tmp_path / "model")
    source = Source(
        tmp_path / "model", "tiny", "0", torch.float32, auto=AutoModelForImageTextToText
    )
    layers = {name: shape for name, shape in source.linears.items() if ".attention.q_proj" in name}
    emulator = svd()
    ranks = emulator.plan(source, layers, Compression(0.4, "linears", 16))
    with pytest.raises(ConfigError) as refused:
        emulator.build(tmp_path, source, BuildInputs(ranks, None, Rows(), None), device=CPU)
    assert str(refused.value).startswith(
        f"{next(iter(layers))}: no calibration sample runs it, so there is nothing to fit it to; "
        "set "
    )


# Greedy ranks ------------------------------------------------------------------------------------


def statistics_of(folder, source, whole: bool) -> Artifact:
    folder.mkdir()
    facts = calibrate(folder, source, layers_of(source), Rows(), whole, device=CPU)
    (folder / "stage.json").write_text(json.dumps(facts))
    return Artifact("calibrate", "0", folder)


def spent(ranks, source) -> int:
    return sum(rank * sum(source.linears[layer]) for layer, rank in ranks.items())


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"sequential": False},
        {"sequential": False, "algorithm": "whiten"},
        {"sequential": False, "aware": False},
        {"sequential": True, "multiple": 2},
    ],
    ids=["eigen", "whiten", "plain", "sequential"],
)
def test_greedy_ranks_stay_in_the_budget_and_lose_less_energy(tmp_path, source, settings, written):
    emulator = svd(allocation="greedy", **settings)
    statistics = None
    if written and emulator.statistics:
        statistics = statistics_of(tmp_path / "known", source, emulator.statistics == "input")
    facts = build_in(tmp_path / "built", source, emulator, statistics=statistics)
    table = json.loads((tmp_path / "built" / "layers.json").read_text())
    uniform = build_inputs_of(emulator, source).plan
    ranks = {layer: table[layer]["rank"] for layer in uniform}
    assert ranks != uniform
    assert all(rank % emulator.multiple == 0 for rank in ranks.values())
    unspent = spent(uniform, source) - spent(ranks, source)
    assert (
        0 <= unspent < emulator.multiple * max(sum(shape) for shape in layers_of(source).values())
    )
    before = sum(rows * columns for rows, columns in layers_of(source).values())
    assert facts["share_of_linears"] == round(spent(ranks, source) / before, 4)
    assert facts["share_of_linears"] <= 0.4
    spectra = tensors_of(tmp_path / "built" / "spectra.safetensors")
    tails = [
        sum(float(one[kept[layer] :].sum() / one.sum()) for layer, one in spectra.items())
        for kept in (ranks, uniform)
    ]
    assert tails[0] < 0.98 * tails[1]
    model = emulator.open(tmp_path / "built", source, CPU)
    assert {layer: model.get_submodule(layer).rank for layer in ranks} == ranks


@pytest.mark.parametrize("algorithm", ["eigen", "whiten"])
def test_greedy_ranks_do_not_depend_on_stored_statistics(tmp_path, source, algorithm):
    emulator = svd(allocation="greedy", sequential=False, algorithm=algorithm)
    statistics = statistics_of(tmp_path / "known", source, emulator.statistics == "input")
    rank_tables = []
    for name, stored_statistics in (("once", None), ("twice", statistics)):
        build_in(tmp_path / name, source, emulator, statistics=stored_statistics)
        table = json.loads((tmp_path / name / "layers.json").read_text())
        rank_tables.append({layer: one["rank"] for layer, one in table.items()})
    assert rank_tables[0] == rank_tables[1]
    for layer in layers_of(source):
        a, b = (emulator.residual(tmp_path / name, source, layer) for name in ("once", "twice"))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_plan_of_greedy_ranks_is_the_uniform_one(source):
    plans = [build_inputs_of(svd(allocation=one), source).plan for one in ("uniform", "greedy")]
    assert plans[0] == plans[1]


# What is read, and what is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "statistics", "samples"),
    [
        ({}, None, True),
        ({"allocation": "greedy"}, "smaller", True),
        ({"sequential": False, "allocation": "greedy"}, "smaller", True),
        ({"sequential": False, "allocation": "greedy", "aware": False}, None, False),
        ({"sequential": False, "allocation": "greedy", "algorithm": "whiten"}, "input", True),
    ],
)
def test_required_statistics_and_samples(settings, statistics, samples):
    emulator = svd(**settings)
    assert (emulator.statistics, emulator.samples) == (statistics, samples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"algorithm": "whiten"},
            "emulator.algorithm=whiten cannot be combined with emulator.sequential=true; "
            "set emulator.algorithm=eigen, or emulator.sequential=false",
        ),
        (
            {"aware": False},
            "emulator.sequential=true needs calibration activations, which emulator.aware=false "
            "does not use; "
            "set emulator.sequential=false",
        ),
        (
            {"allocation": "best"},
            "emulator.allocation=best is none of uniform, greedy; set emulator.allocation=uniform",
        ),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ConfigError) as refused:
        svd(**settings)
    assert str(refused.value) == message


# The walk ----------------------------------------------------------------------------------------


def test_both_models_process_a_batch_before_the_next_batch(source):
    blocks = list(by_block(layers_of(source)))
    walks = [iterate_checkpoint(source, Rows().batches(source), blocks, CPU) for _ in range(2)]
    order = []
    for pair in zip(*walks, strict=True):
        for index, block in enumerate(pair):
            block.module.register_forward_pre_hook(
                lambda _, args, index=index: order.append((index, len(order)))
            )
        order.clear()
        masks = list(zip(*(block.peek_batches() for block in pair), strict=True))
        assert [index for index, _ in order] == [0, 1] * 4
        assert all(int(mask.is_real.sum()) == 8 * 30 - 9 for both in masks for mask in both)
    with safe_open(source.folder / "model.safetensors", "pt") as file:
        assert len(blocks) == sum(name.endswith("q_proj.weight") for name in file.keys())  # noqa: SIM118
