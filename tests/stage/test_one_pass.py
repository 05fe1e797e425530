"""Second moments recorded during the build give the same emulator as stored ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from composed import compose_cached
from packed import precision_of
from safetensors import safe_open
from tiny import save_checkpoint

from emloc.calibration.calibrate import calibrate
from emloc.config.settings import Compression
from emloc.emulators import BuildInputs
from emloc.emulators.svd import Svd
from emloc.emulators.svd.factor_writer import FactorWriter
from emloc.models.checkpoint.source import Source
from emloc.pipeline import run
from emloc.runtime.stage_cache import Artifact, Store
from emloc.stages.run_config import build

CPU = torch.device("cpu")
RATIO = 0.25
BLOCKS = [f"model.layers.{index}" for index in range(3)]


class Rows:
    """Calibration samples in two batches; one batch is padded on the left."""

    ids = ("train/3", "train/1")

    def batches(self, source, device=None):
        made_batches = []
        for seed, lengths in enumerate(([30, 30, 30], [24, 17])):
            longest = max(lengths)
            mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
            draw = torch.Generator().manual_seed(seed)
            ids = torch.randint(5, 261, mask.shape, generator=draw) * mask
            made_batches.append({"input_ids": ids, "attention_mask": mask})
        return made_batches


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    # Keys and values have fewer outputs than inputs: some layers are recorded by their outputs.
    folder = save_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=3)
    return Source(folder, "tiny", "0", torch.float32)


def layers_of(source) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in source.linears.items() if name.endswith("_proj")}


def svd(algorithm: str) -> Svd:
    return Svd(algorithm=algorithm, aware=True, multiple=1, sequential=False, allocation="uniform")


def build_in(folder: Path, source, emulator: Svd, bits: int, statistics=None) -> dict:
    """Build an emulator in one pass, or in two with statistics, and return its facts."""
    ranks = emulator.plan(source, layers_of(source), Compression(RATIO, "linears", bits))
    folder.mkdir(exist_ok=True)
    return emulator.build(
        folder, source, BuildInputs(ranks, statistics, Rows(), precision_of(bits)), device=CPU
    )


@pytest.fixture(scope="module", params=["subspace", "eigen", "whiten"])
def both(request, source, tmp_path_factory):
    """An algorithm, and the statistics that it needs."""
    emulator, folder = svd(request.param), tmp_path_factory.mktemp("statistics")
    whole = emulator.statistics == "input"
    facts = calibrate(folder, source, layers_of(source), Rows(), whole, device=CPU)
    (folder / "stage.json").write_text(json.dumps(facts))
    assert bool(facts["outputs"]) != whole
    return emulator, Artifact("calibrate", "0", folder)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# Factors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 4])
def test_one_pass_and_two_stages_give_the_same_factors(tmp_path, source, both, bits, monkeypatch):
    # Otherwise all these layers are too small for the iteration.
    monkeypatch.setattr("emloc.tensors.linalg.subspace.MIN_SIZE", 16)
    monkeypatch.setattr("emloc.tensors.linalg.subspace.SIZE_PER_COLUMN", 2)
    emulator, statistics = both
    once, twice = tmp_path / "once", tmp_path / "twice"
    facts = build_in(once, source, emulator, bits)
    facts_with_statistics = build_in(twice, source, emulator, bits, statistics)
    assert facts == facts_with_statistics
    assert facts["samples"] == Rows.ids
    tables = [json.loads((folder / "layers.json").read_text()) for folder in (once, twice)]
    assert len(tables[0]) == 21
    assert any(one["solver"] == emulator.algorithm for one in tables[0].values())
    for layer, shape in layers_of(source).items():
        one, other = (table[layer] for table in tables)
        assert (one["rank"], one["solver"]) == (other["rank"], other["solver"])
        assert one["kept"] == pytest.approx(other["kept"], abs=1e-9)
        weight = source.weight(layer).double()
        products = [
            weight - emulator.residual(at, source, layer, precision=precision_of(bits))
            for at in (once, twice)
        ]
        assert products[0].shape == shape
        torch.testing.assert_close(*products, atol=1e-6, rtol=1e-6)
        assert float((weight - products[0]).norm()) > 0.05 * float(weight.norm())


def test_second_moments_are_not_written(tmp_path, source, both):
    emulator, _ = both
    build_in(tmp_path / "once", source, emulator, 16)
    assert sorted(path.name for path in (tmp_path / "once").iterdir()) == [
        "journal.jsonl",
        "layers.json",
        *(f"{name}.safetensors" for name in BLOCKS),
    ]
    names = set().union(*(tensors_of(path) for path in (tmp_path / "once").glob("*.safetensors")))
    assert {name.rsplit(".", 1)[1] for name in names} == {"u", "v"}


# An end in the middle ----------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [1, 2])
@pytest.mark.parametrize(("algorithm", "bits"), [("subspace", 16), ("subspace", 4), ("whiten", 16)])
def test_a_killed_build_resumes_with_the_next_block_and_the_same_result(
    tmp_path, source, monkeypatch, algorithm, bits, finished
):
    emulator, saved = svd(algorithm), []
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    build_in(whole, source, emulator, bits)
    write = FactorWriter.write

    def until(self, block, factors):
        if len(saved) == finished:
            raise KeyboardInterrupt
        saved.append(block)
        return write(self, block, factors)

    monkeypatch.setattr(FactorWriter, "write", until)
    with pytest.raises(KeyboardInterrupt):
        build_in(killed, source, emulator, bits)
    assert saved == BLOCKS[:finished]
    stamps = {name: (killed / f"{name}.safetensors").stat().st_mtime_ns for name in saved}
    # After a kill there is the draft of a file, and the rest of a line is missing.
    shutil.copy(killed / f"{BLOCKS[0]}.safetensors", killed / f"{BLOCKS[finished]}.draft")
    with (killed / "journal.jsonl").open("a") as file:
        file.write('{"block": "model.la')
    recorded_blocks = watch_recorded_blocks(monkeypatch)
    finished = len(BLOCKS)
    facts = build_in(killed, source, emulator, bits)
    assert saved == BLOCKS
    assert recorded_blocks == [name for name in BLOCKS if name not in stamps]
    assert facts["samples"] == Rows.ids
    lines = (killed / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["block"] for line in lines] == BLOCKS
    for name in BLOCKS:
        file = f"{name}.safetensors"
        ours, theirs = tensors_of(killed / file), tensors_of(whole / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[part]) for part, tensor in ours.items())
    assert {name: (killed / f"{name}.safetensors").stat().st_mtime_ns for name in stamps} == stamps


def watch_recorded_blocks(monkeypatch) -> list[str]:
    """The names of the blocks whose second moments are recorded, in order."""
    import emloc.emulators.svd as home

    recorded_blocks, observe = [], home.record_moments

    def recording(block, *rest, **named):
        recorded_blocks.append(block.name)
        return observe(block, *rest, **named)

    monkeypatch.setattr(home, "record_moments", recording)
    return recorded_blocks


# Whole runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["emloc", "emloc_nf4"])
def test_a_run_without_a_budget_for_statistics_has_no_calibrate_stage(tiny, tmp_path, method):
    def run_cached(home, *overrides):
        run_config = build(compose_cached([*tiny, f"method={method}", *overrides]))
        return run(run_config, Store(tmp_path / home), lambda step, values: None)

    once, twice = run_cached("one", "budget.statistics_gib=0"), run_cached("two")
    assert once.statistics is None
    assert list(once.stages)[:4] == ["emulate", "train", "recover", "evaluate"]
    assert list(twice.stages) == ["calibrate", *once.stages]
    assert once.emulated.facts["samples"] == twice.statistics.facts["samples"]
    assert len(once.emulated.facts["samples"]) == 6
    # Equal emulators give equal adapters.
    scores = [one.evaluated.facts["scores"]["loss"] for one in (once, twice)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert run_cached("one", "budget.statistics_gib=0") == once
    # The emulator has the same key with and without stored statistics, and names its samples.
    run_without_statistics = run_cached("two", "budget.statistics_gib=0")
    assert (run_without_statistics.statistics, run_without_statistics.emulated) == (
        None,
        twice.emulated,
    )
    assert run_without_statistics.emulated.facts["samples"] == once.emulated.facts["samples"]


def test_the_metrics_of_a_run_without_statistics_name_the_samples(emloc, tiny, one_run):
    ran = emloc(*tiny, "method=emloc", "budget.statistics_gib=0", "name=once")
    assert ran.code == 0, ran.output
    metrics = json.loads((one_run("once") / "metrics.json").read_text())
    assert list(metrics["stages"]) == ["emulate", "train", "recover", "evaluate"]
    assert metrics["seconds"].keys() == metrics["stages"].keys()
    assert len(metrics["calibration"]) == len(set(metrics["calibration"])) == 6
    assert all(name.startswith("train/") for name in metrics["calibration"])
    assert "samples" not in metrics["emulator"]
