"""What is stored, how large it is, what it multiplies by, and that a build goes on where it was."""

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
from emloc.emulators.size import factors_of, size_facts, uniform_ranks
from emloc.emulators.svd import Svd
from emloc.emulators.svd.factor_file import facts_of
from emloc.emulators.svd.factors import factorize, recorded
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.precision.nf4 import Nf4Linear
from emloc.runtime.stage_cache import Artifact
from emloc.tensors.linalg.correct import LoraPair, correct_identity
from emloc.tensors.linalg.factorize import eigen, lost
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
    """Calibration samples of a fixed text, as `Samples` gives them."""

    ids = ("0",)

    def batches(self, source):
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


def test_u_solved_again_for_v_in_nf4_loses_less_than_both_factors_quantised():
    """On correlated inputs; the share of output energy lost, u quantised in both cases."""
    gains = []
    for seed in range(8):
        torch.manual_seed(seed)
        mix = torch.randn(80, 80, dtype=torch.float64) * torch.arange(1, 81) ** -0.7
        x = torch.randn(2000, 80, dtype=torch.float64) @ mix.T
        gram, weight = x.T @ x, torch.randn(96, 80).bfloat16()
        known = Statistics(sites={"one": "one"}, inputs={"one": gram}, tokens=2000)
        plain = eigen(weight, 24, input_gram=gram, dtype=torch.bfloat16)
        solved = factorize({"one": weight}, {"one": 24}, known, "eigen", NF4)["one"].factors
        assert torch.equal(solved.v, NF4.quantize(plain.v).dequantize())
        quantised = [
            replace(one, u=NF4.quantize(one.u.T).dequantize().T, v=solved.v)
            for one in (plain, solved)
        ]
        naive, again = (lost(weight, one, gram) for one in quantised)
        # Of u alone next to nothing is lost to the error of v.
        assert lost(weight, solved, gram) < 1.02 * lost(weight, plain, gram)
        gains.append(again / naive)
    assert max(gains) < 1
    assert sum(gains) / len(gains) < 0.95


@pytest.mark.parametrize("aware", [True, False])
def test_both_passes_solve_u_for_the_v_that_is_stored(tmp_path, source, statistics, aware):
    """Input Grams, output Grams with a second pass, and none: all better than quantising both."""
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
        left = [float((gap @ gram.double() * gap).sum()) for gap in gaps]
        assert left[0] < left[1], layer
    assert kinds == ({"input_gram", "output_gram"} if aware else set())


@pytest.mark.parametrize(
    ("emulator", "bits", "kind"),
    [(svd(), 16, Factorized), (svd(), 4, PackedFactorized), (Full(), 4, Nf4Linear)],
)
def test_the_residual_is_the_weight_less_what_the_model_multiplies_by(
    tmp_path, source, statistics, emulator, bits, kind
):
    known = statistics if isinstance(emulator, Svd) else None
    one = built_emulator(tmp_path, source, emulator, bits, known)
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
def test_the_correction_is_exact_on_the_row_space_in_four_bits_too(
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
        held = module.matrix.dequantize().double() if whole else module.product()
        left = (source.weight(layer).double() + new.delta) @ a.T
        torch.testing.assert_close(left, (held + old.delta) @ a.T, atol=1e-9, rtol=1e-9)
        assert change.removed > 0


# Size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 4])
def test_the_bytes_are_those_of_the_stored_tensors(tmp_path, source, bits):
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
    # Rotary frequencies and whatever else a model computes for itself are not counted.
    own = (Factorized, PackedFactorized)
    buffers = [m.buffers(recurse=False) for m in model.modules() if isinstance(m, own)]
    held = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for x in buffers for b in x)
    assert held == facts["bytes"]


def test_the_bytes_of_a_whole_model_in_nf4(tmp_path, source):
    one = built_emulator(tmp_path, source, Full(), 4)
    model = one.open(CPU)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["layers.json", "stage.json"]
    quantised = [m.matrix.nbytes for m in model.modules() if isinstance(m, Nf4Linear)]
    rest = [p.nbytes for p in model.parameters() if p.dtype != torch.uint8]
    facts = one.artifact.facts
    assert len(quantised) == 14
    assert facts["bytes"] == sum(quantised) + sum(rest)
    assert (facts["parameters"], facts["share_of_linears"]) == (sum(source.sizes.values()), 1.0)


def test_at_sixteen_bits_the_original_is_the_original(tmp_path, source):
    one = built_emulator(tmp_path, source, Full(), 16)
    assert {path.name for path in tmp_path.iterdir()} == {"stage.json", "layers.json"}
    assert json.loads((tmp_path / "layers.json").read_text()) == {}
    assert not any(isinstance(module, Nf4Linear) for module in one.open(CPU).modules())
    assert one.residual("model.layers.0.mlp.up_proj") is None
    total = sum(source.sizes.values())
    assert one.artifact.facts == size_facts(source, {}, None)
    assert one.artifact.facts["bytes"] == total * source.dtype.itemsize


def test_factors_are_counted_turned_as_they_are_stored(source):
    layer = "model.layers.0.mlp.up_proj"
    assert factors_of(source, {layer: 3}) == {layer: [(3, 64), (3, 32)]}


@pytest.mark.parametrize("emulator", [svd(), Full()], ids=["svd", "full"])
def test_a_budget_that_nobody_solved_is_refused(source, emulator):
    with pytest.raises(ConfigError) as refused:
        emulator.plan(source, layers_of(source), budget(None, None))
    assert str(refused.value) == "compression=auto needs budget.gpu_gib; set budget.gpu_gib=24"


# Building ----------------------------------------------------------------------------------------


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def test_the_journal_has_one_line_for_each_block(tmp_path, source, statistics):
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
    assert one["solver"] == "eigen"  # too small for the iteration


def test_of_each_layer_the_spectrum_is_recorded(tmp_path, source, statistics):
    built_emulator(tmp_path, source, svd(), 16, statistics)
    table = json.loads((tmp_path / "layers.json").read_text())
    assert len((tmp_path / "layers.json").read_text().splitlines()) == len(table) + 2
    for layer, one in table.items():
        found = one["spectrum"]
        assert found["directions"] == min(source.linears[layer])
        assert found["index"][0] == 1
        assert found["index"][-1] == found["directions"]
        assert found["energy"] == sorted(found["energy"], reverse=True)
        leading = zip(found["index"], found["energy"], strict=True)
        known = sum(energy for index, energy in leading if index <= one["rank"])
        assert known <= one["kept"] * found["total"] * 1.0001


def test_a_spectrum_is_recorded_in_few_numbers_that_hold_its_shares():
    layer = torch.diag(torch.arange(1000, 0, -1.0).sqrt())
    one = eigen(layer, 100, dtype=torch.float32)
    found = recorded(one)
    assert len(found["index"]) == len(found["energy"]) <= 64
    assert found["index"][:9] == list(range(1, 10))
    assert found["index"][-1] == found["directions"] == 1000
    assert found["energy"] == [pytest.approx(1001 - index, rel=1e-4) for index in found["index"]]
    assert found["total"] == 500_500
    # What is known of the directions taken alone says as much of the whole.
    taken = recorded(replace(one, spectrum=one.spectrum[:100]))
    assert taken["index"][-1] == 100
    assert (taken["total"], taken["directions"]) == (500_500, 1000)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_killed_build_goes_on_and_ends_as_one_that_was_not(
    tmp_path, source, statistics, monkeypatch, bits
):
    import emloc.emulators.svd as home

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    built_emulator(whole, source, svd(), bits, statistics)
    save, saved = home.save_factors, []

    def once(found, path):
        if saved:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(found, path)

    monkeypatch.setattr(home, "save_factors", once)
    with pytest.raises(KeyboardInterrupt):
        built_emulator(killed, source, svd(), bits, statistics)
    assert [line["block"] for line in lines_of(killed)] == ["model.layers.0"]
    first = killed / "model.layers.0.safetensors"
    stamp = first.stat().st_mtime_ns
    with (killed / "journal.jsonl").open("a") as file:
        file.write('{"block": "model.la')  # the kill came in the middle of a line
    monkeypatch.setattr(home, "save_factors", save)
    built_emulator(killed, source, svd(), bits, statistics)
    assert first.stat().st_mtime_ns == stamp
    assert [line["block"] for line in lines_of(killed)] == ["model.layers.0", "model.layers.1"]
    for path in whole.glob("*.safetensors"):
        with safe_open(path, "pt") as a, safe_open(killed / path.name, "pt") as b:
            assert set(a.keys()) == set(b.keys())
            assert all(torch.equal(a.get_tensor(n), b.get_tensor(n)) for n in a.keys())  # noqa: SIM118


def test_a_block_whose_line_was_never_written_gets_the_line_it_would_have_had(tmp_path, source):
    built_emulator(tmp_path, source, svd(aware=False), 4)
    journal, before = tmp_path / "journal.jsonl", lines_of(tmp_path)
    journal.write_text(json.dumps(before[0]) + "\n")
    path = tmp_path / "model.layers.1.safetensors"
    stamp = path.stat().st_mtime_ns
    built_emulator(tmp_path, source, svd(aware=False), 4)
    built_emulator(tmp_path, source, svd(aware=False), 4)
    assert lines_of(tmp_path) == before
    assert path.stat().st_mtime_ns == stamp
    assert list(facts_of(path)) == before[1]["layers"]


@pytest.mark.parametrize(
    ("emulator", "most"), [(svd(aware=False), 7), (Full(), 1)], ids=["svd", "full"]
)
def test_no_more_weights_are_held_at_once_than_one_block_or_one_layer(
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
