"""Emulators: stored files, sizes, residuals, and builds that resume."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from packed import NF4, precision_of
from safetensors import safe_open
from tiny import save_checkpoint
from torch import nn

from emloc.calibration.blockwise import block_of
from emloc.calibration.calibrate import calibrate
from emloc.calibration.moments import Statistics
from emloc.config.settings import Compression
from emloc.emulators import BuildInputs, BuiltEmulator
from emloc.emulators.full import Full
from emloc.emulators.size import size_facts, stored_shapes, uniform_ranks
from emloc.emulators.svd import Svd
from emloc.emulators.svd.factor_file import read_facts
from emloc.emulators.svd.factor_writer import FactorWriter
from emloc.emulators.svd.factors import factorize, spectrum_record
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.precision.nf4 import Nf4Linear
from emloc.runtime.stage_cache import Artifact
from emloc.tensors.linalg.correct import LoraPair, correct_identity
from emloc.tensors.linalg.factorize import eigen, lost_energy
from emloc.tensors.nn.factorized import Factorized, PackedFactorized

CPU = torch.device("cpu")
IDS = torch.arange(120).reshape(4, 30) + 5
DEFAULTS = {
    "algorithm": "subspace",
    "aware": True,
    "multiple": 1,
    "sequential": False,
    "allocation": "uniform",
}


class Rows:
    """Calibration samples with a fixed text, in place of `Samples`."""

    ids = ("0",)

    def batches(self, source, device=None):
        return [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def source(request, tmp_path_factory):
    return Source(save_checkpoint(tmp_path_factory.mktemp("model")), "tiny", "0", request.param)


@pytest.fixture(scope="module")
def statistics(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    facts = calibrate(folder, source, layers_of(source), Rows(), False, device=CPU)
    (folder / "stage.json").write_text(json.dumps(facts))
    return Artifact("calibrate", "0", folder)


def layers_of(source) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in source.linears.items() if name.endswith("_proj")}


def budget(bits: int | None = 4, ratio: float | None = 0.5) -> Compression:
    return Compression(ratio, "linears", bits)


def svd(**settings) -> Svd:
    return Svd(**(DEFAULTS | settings))


def built_emulator(folder, source, emulator, bits, statistics=None) -> BuiltEmulator:
    ranks = emulator.plan(source, layers_of(source), budget(bits))
    build_inputs = BuildInputs(
        ranks, statistics, Rows() if statistics else None, precision_of(bits)
    )
    facts = emulator.build(folder, source, build_inputs, device=CPU)
    (folder / "stage.json").write_text(json.dumps(facts))
    return BuiltEmulator(emulator, Artifact("emulate", "0", folder), source, precision_of(bits))


# What it multiplies by ---------------------------------------------------------------------------


def test_refitting_u_to_the_nf4_v_loses_less_than_quantising_both_factors():
    """Compares lost shares of the output energy on correlated inputs, with u quantised in both."""
    gains = []
    for seed in range(8):
        torch.manual_seed(seed)
        mix = torch.randn(80, 80, dtype=torch.float64) * torch.arange(1, 81) ** -0.7
        x = torch.randn(2000, 80, dtype=torch.float64) @ mix.T
        gram, weight = x.T @ x, torch.randn(96, 80).bfloat16()
        statistics = Statistics(sites={"one": "one"}, inputs={"one": gram}, tokens=2000)
        plain = eigen(weight, 24, input_gram=gram, dtype=torch.bfloat16)
        solved = factorize({"one": weight}, {"one": 24}, statistics, "eigen", NF4)["one"].factors
        assert torch.equal(solved.v, NF4.quantize(plain.v).dequantize())
        quantised = [
            replace(one, u=NF4.quantize(one.u.T).dequantize().T, v=solved.v)
            for one in (plain, solved)
        ]
        naive, again = (lost_energy(weight, one, gram) for one in quantised)
        # The refitted u makes up for almost all of the error of v.
        assert lost_energy(weight, solved, gram) < 1.02 * lost_energy(weight, plain, gram)
        gains.append(again / naive)
    assert max(gains) < 1
    assert sum(gains) / len(gains) < 0.95


@pytest.mark.parametrize("aware", [True, False])
def test_u_is_refitted_to_the_stored_v_with_one_or_two_passes(tmp_path, source, statistics, aware):
    """With input Grams, with output Grams and a second pass, and without Grams."""
    exact = tmp_path / "exact"
    exact.mkdir()
    calibrate(exact, source, layers_of(source), Rows(), True, device=CPU)
    four = built_emulator(tmp_path, source, svd(aware=aware), 4, statistics if aware else None)
    kinds = set()
    for layer, rank in uniform_ranks(source, layers_of(source), budget(), 1).items():
        file = f"{block_of(layer)}.safetensors"
        build_inputs = Statistics.load(statistics.folder / file).of(layer) if aware else {}
        kinds |= set(build_inputs)
        weight = source.weight(layer)
        plain = eigen(weight, rank, **build_inputs, dtype=source.dtype)
        u, v = (NF4.quantize(one).dequantize().double() for one in (plain.u.T, plain.v))
        gaps = [four.residual(layer), weight.double() - u.T @ v]
        gram = (
            Statistics.load(exact / file).of(layer)["input_gram"] if aware else torch.eye(len(v.T))
        )
        errors = [float((gap @ gram.double() * gap).sum()) for gap in gaps]
        assert errors[0] < errors[1], layer
    assert kinds == ({"input_gram", "output_gram"} if aware else set())


@pytest.mark.parametrize(
    ("emulator", "bits", "kind"),
    [(svd(), 16, Factorized), (svd(), 4, PackedFactorized), (Full(), 4, Nf4Linear)],
)
def test_the_residual_is_the_weight_minus_the_emulator_weight(
    tmp_path, source, statistics, emulator, bits, kind
):
    statistics_used = statistics if isinstance(emulator, Svd) else None
    one = built_emulator(tmp_path, source, emulator, bits, statistics_used)
    model = one.open(CPU)
    for layer, shape in layers_of(source).items():
        module = model.get_submodule(layer)
        assert type(module) is kind
        identity = torch.eye(shape[1], dtype=source.dtype)
        multiplied = module(identity).double().T
        gap = one.residual(layer, CPU)
        assert gap.dtype == torch.float64
        width = 1e-6 if source.dtype == torch.float32 else 8e-3
        torch.testing.assert_close(
            source.weight(layer).double() - gap, multiplied, atol=width, rtol=width
        )
        assert float(gap.norm()) > 0.05 * float(source.weight(layer).double().norm())
    assert type(model.get_submodule("lm_head")) is nn.Linear
    assert one.residual("lm_head") is None
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("emulator", [svd(aware=False), Full()], ids=["svd", "full"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_correction_is_exact_on_the_row_space_also_in_four_bits(
    tmp_path, source, emulator, scale
):
    """W x + s B'A' x = W_e x + s B A x for x in the rows of A, W_e from its four bits."""
    one = built_emulator(tmp_path, source, emulator, 4)
    model = one.open(CPU)
    for layer, (rows, columns) in layers_of(source).items():
        torch.manual_seed(0)
        a, b = torch.randn(4, columns).double(), torch.randn(rows, 4).double()
        old = LoraPair(a, b, scale)
        new, change = correct_identity(old, one.residual(layer), clamp=None)
        module = model.get_submodule(layer)
        whole = isinstance(module, Nf4Linear)
        emulator_weight = module.matrix.dequantize().double() if whole else module.product()
        corrected_outputs = (source.weight(layer).double() + new.delta) @ a.T
        torch.testing.assert_close(
            corrected_outputs, (emulator_weight + old.delta) @ a.T, atol=1e-9, rtol=1e-9
        )
        assert change.removed > 0


# Size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 4])
def test_bytes_are_those_of_the_stored_tensors(tmp_path, source, bits):
    one = built_emulator(tmp_path, source, svd(aware=False), bits)
    facts = one.artifact.facts
    stored = 0
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    before = sum(rows * columns for rows, columns in layers_of(source).values())
    rest = sum(source.sizes.values()) - before
    assert facts["bytes"] == stored + rest * source.dtype.itemsize
    assert facts["bits"] == bits
    assert 0.45 < facts["share_of_linears"] <= 0.5
    model = one.open(CPU)
    # Rotary frequencies and other buffers that the model computes are not counted.
    own = (Factorized, PackedFactorized)
    buffers = [m.buffers(recurse=False) for m in model.modules() if isinstance(m, own)]
    nbytes = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for x in buffers for b in x)
    assert nbytes == facts["bytes"]


def test_bytes_of_a_full_model_in_nf4(tmp_path, source):
    one = built_emulator(tmp_path, source, Full(), 4)
    model = one.open(CPU)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["layers.json", "stage.json"]
    quantised = [m.matrix.nbytes for m in model.modules() if isinstance(m, Nf4Linear)]
    rest = [p.nbytes for p in model.parameters() if p.dtype != torch.uint8]
    facts = one.artifact.facts
    assert len(quantised) == 14
    assert facts["bytes"] == sum(quantised) + sum(rest)
    assert (facts["parameters"], facts["share_of_linears"]) == (sum(source.sizes.values()), 1.0)


def test_the_full_emulator_at_sixteen_bits_is_the_original(tmp_path, source):
    one = built_emulator(tmp_path, source, Full(), 16)
    assert {path.name for path in tmp_path.iterdir()} == {"stage.json", "layers.json"}
    assert json.loads((tmp_path / "layers.json").read_text()) == {}
    assert not any(isinstance(module, Nf4Linear) for module in one.open(CPU).modules())
    assert one.residual("model.layers.0.mlp.up_proj") is None
    total = sum(source.sizes.values())
    assert one.artifact.facts == size_facts(source, {}, None)
    assert one.artifact.facts["bytes"] == total * source.dtype.itemsize


def test_packed_factors_are_counted_in_their_stored_transposed_shape(source):
    layer = "model.layers.0.mlp.up_proj"
    assert stored_shapes(source, {layer: 3}) == {layer: [(3, 64), (3, 32)]}


@pytest.mark.parametrize("emulator", [svd(), Full()], ids=["svd", "full"])
def test_a_budget_without_a_ratio_is_refused(source, emulator):
    with pytest.raises(ConfigError) as refused:
        emulator.plan(source, layers_of(source), budget(None, None))
    assert str(refused.value) == "compression=auto needs budget.gpu_gib; set budget.gpu_gib=24"


# Building ----------------------------------------------------------------------------------------


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def test_the_journal_has_one_line_per_block(tmp_path, source, statistics):
    built_emulator(tmp_path, source, svd(), 4, statistics)
    lines = lines_of(tmp_path)
    assert [line["block"] for line in lines] == ["model.layers.0", "model.layers.1"]
    table = json.loads((tmp_path / "layers.json").read_text())
    assert [layer for line in lines for layer in line["layers"]] == list(table)
    for line in lines:
        path = tmp_path / f"{line['block']}.safetensors"
        assert line["bytes"] == path.stat().st_size
        spent = sum(table[layer]["seconds"] for layer in line["layers"])
        assert line["seconds"] == pytest.approx(spent, abs=1e-4)
    one = table["model.layers.0.mlp.up_proj"]
    assert set(one) == {"rank", "kept", "seen", "solver", "steps", "seconds", "spectrum"}
    assert one["solver"] == "eigen"  # the layer is too small for the subspace iteration


def test_the_spectrum_of_each_layer_is_recorded(tmp_path, source, statistics):
    built_emulator(tmp_path, source, svd(), 16, statistics)
    table = json.loads((tmp_path / "layers.json").read_text())
    assert len((tmp_path / "layers.json").read_text().splitlines()) == len(table) + 2
    for layer, one in table.items():
        spectrum = one["spectrum"]
        assert spectrum["directions"] == min(source.linears[layer])
        assert spectrum["index"][0] == 1
        assert spectrum["index"][-1] == spectrum["directions"]
        assert spectrum["energy"] == sorted(spectrum["energy"], reverse=True)
        leading = zip(spectrum["index"], spectrum["energy"], strict=True)
        kept_energy = sum(energy for index, energy in leading if index <= one["rank"])
        assert kept_energy <= one["kept"] * spectrum["total"] * 1.0001


def test_a_spectrum_is_recorded_at_few_indices_with_its_energies():
    layer = torch.diag(torch.arange(1000, 0, -1.0).sqrt())
    one = eigen(layer, 100, dtype=torch.float32)
    full_record = spectrum_record(one)
    assert len(full_record["index"]) == len(full_record["energy"]) <= 64
    assert full_record["index"][:9] == list(range(1, 10))
    assert full_record["index"][-1] == full_record["directions"] == 1000
    assert full_record["energy"] == [
        pytest.approx(1001 - index, rel=1e-4) for index in full_record["index"]
    ]
    assert full_record["total"] == 500_500
    # A spectrum of the leading directions alone gives the same record.
    leading_record = spectrum_record(replace(one, spectrum=one.spectrum[:100]))
    assert leading_record["index"][-1] == 100
    assert (leading_record["total"], leading_record["directions"]) == (500_500, 1000)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_killed_build_resumes_and_gives_the_same_files(
    tmp_path, source, statistics, monkeypatch, bits
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    built_emulator(whole, source, svd(), bits, statistics)
    write, blocks = FactorWriter.write, []

    def once(self, block, factors):
        if blocks:
            raise KeyboardInterrupt
        blocks.append(block)
        return write(self, block, factors)

    monkeypatch.setattr(FactorWriter, "write", once)
    with pytest.raises(KeyboardInterrupt):
        built_emulator(killed, source, svd(), bits, statistics)
    assert [line["block"] for line in lines_of(killed)] == ["model.layers.0"]
    first = killed / "model.layers.0.safetensors"
    stamp = first.stat().st_mtime_ns
    with (killed / "journal.jsonl").open("a") as file:
        file.write('{"block": "model.la')  # the kill happened in the middle of a line
    monkeypatch.setattr(FactorWriter, "write", write)
    built_emulator(killed, source, svd(), bits, statistics)
    assert first.stat().st_mtime_ns == stamp
    assert [line["block"] for line in lines_of(killed)] == ["model.layers.0", "model.layers.1"]
    for path in whole.glob("*.safetensors"):
        with safe_open(path, "pt") as a, safe_open(killed / path.name, "pt") as b:
            assert set(a.keys()) == set(b.keys())
            assert all(torch.equal(a.get_tensor(n), b.get_tensor(n)) for n in a.keys())  # noqa: SIM118


def test_a_missing_journal_line_is_rebuilt_from_the_file_of_its_block(tmp_path, source):
    built_emulator(tmp_path, source, svd(aware=False), 4)
    journal, before = tmp_path / "journal.jsonl", lines_of(tmp_path)
    journal.write_text(json.dumps(before[0]) + "\n")
    path = tmp_path / "model.layers.1.safetensors"
    stamp = path.stat().st_mtime_ns
    built_emulator(tmp_path, source, svd(aware=False), 4)
    built_emulator(tmp_path, source, svd(aware=False), 4)
    assert lines_of(tmp_path) == before
    assert path.stat().st_mtime_ns == stamp
    assert list(read_facts(path)) == before[1]["layers"]


@pytest.mark.parametrize(
    ("emulator", "most"), [(svd(aware=False), 7), (Full(), 1)], ids=["svd", "full"]
)
def test_at_most_one_block_or_one_layer_of_weights_is_in_memory(
    tmp_path, source, monkeypatch, emulator, most
):
    read, alive, counts = Source.weight, [], []

    def watched(self, module, device=CPU):
        gc.collect()
        weight = read(self, module, device)
        alive.append(weakref.ref(weight))
        counts.append(sum(one() is not None for one in alive))
        return weight

    monkeypatch.setattr(Source, "weight", watched)
    built_emulator(tmp_path, source, emulator, 4).open(CPU)
    assert len(counts) == 14
    assert max(counts) == most
