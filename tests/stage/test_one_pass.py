"""Second moments taken on the way and never written make the emulator that written ones make."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from packed import precision_of
from safetensors import safe_open
from tiny import save_checkpoint

from emloc.calibration.calibrate import calibrate
from emloc.config.compose import compose
from emloc.config.settings import Compression
from emloc.emulators import BuildInputs
from emloc.emulators.svd import Svd
from emloc.models.checkpoint.source import Source
from emloc.pipeline import run
from emloc.runtime.stage_cache import Artifact, Store
from emloc.stages.run_config import build

CPU = torch.device("cpu")
RATIO = 0.25
BLOCKS = [f"model.layers.{index}" for index in range(3)]


class Rows:
    """Calibration samples in two batches, one of them padded on the left."""

    ids = ("train/3", "train/1")

    def batches(self, source):
        made = []
        for seed, lengths in enumerate(([30, 30, 30], [24, 17])):
            longest = max(lengths)
            mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
            draw = torch.Generator().manual_seed(seed)
            ids = torch.randint(5, 261, mask.shape, generator=draw) * mask
            made.append({"input_ids": ids, "attention_mask": mask})
        return made


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    # A key and value twice as narrow as their input: some layers are known by their outputs.
    folder = save_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=3)
    return Source(folder, "tiny", "0", torch.float32)


def layers_of(source) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in source.linears.items() if name.endswith("_proj")}


def svd(algorithm: str) -> Svd:
    return Svd(algorithm=algorithm, aware=True, multiple=1, sequential=False, allocation="uniform")


def build_in(folder: Path, source, emulator: Svd, bits: int, statistics=None) -> dict:
    """One pass, or two where there are statistics; the facts."""
    ranks = emulator.plan(source, layers_of(source), Compression(RATIO, "linears", bits))
    folder.mkdir(exist_ok=True)
    return emulator.build(
        folder, source, BuildInputs(ranks, statistics, Rows(), precision_of(bits)), device=CPU
    )


@pytest.fixture(scope="module", params=["subspace", "eigen", "whiten"])
def both(request, source, tmp_path_factory):
    """An algorithm, and the statistics it reads."""
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
    monkeypatch.setattr(
        "emloc.tensors.linalg.subspace.SMALL", 16
    )  # or no layer here would be iterated on
    emulator, statistics = both
    once, twice = tmp_path / "once", tmp_path / "twice"
    facts = build_in(once, source, emulator, bits)
    known = build_in(twice, source, emulator, bits, statistics)
    assert facts == known
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


@pytest.mark.parametrize("done", [1, 2])
@pytest.mark.parametrize(("algorithm", "bits"), [("subspace", 16), ("subspace", 4), ("whiten", 16)])
def test_a_killed_build_goes_on_with_the_next_block_and_ends_the_same(
    tmp_path, source, monkeypatch, algorithm, bits, done
):
    import emloc.emulators.svd as home

    emulator, saved = svd(algorithm), []
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    build_in(whole, source, emulator, bits)
    save = home.save_factors

    def until(found, path):
        if len(saved) == done:
            raise KeyboardInterrupt
        saved.append(path.stem)
        save(found, path)

    monkeypatch.setattr(home, "save_factors", until)
    with pytest.raises(KeyboardInterrupt):
        build_in(killed, source, emulator, bits)
    assert saved == BLOCKS[:done]
    stamps = {name: (killed / f"{name}.safetensors").stat().st_mtime_ns for name in saved}
    # A kill leaves what it was writing, and takes what it had not written yet.
    shutil.copy(killed / f"{BLOCKS[0]}.safetensors", killed / f"{BLOCKS[done]}.draft")
    with (killed / "journal.jsonl").open("a") as file:
        file.write('{"block": "model.la')
    looked = watch_looks(monkeypatch)
    done = len(BLOCKS)
    facts = build_in(killed, source, emulator, bits)
    assert saved == BLOCKS
    assert looked == [name for name in BLOCKS if name not in stamps]
    assert facts["samples"] == Rows.ids
    lines = (killed / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["block"] for line in lines] == BLOCKS
    for name in BLOCKS:
        file = f"{name}.safetensors"
        ours, theirs = tensors_of(killed / file), tensors_of(whole / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[part]) for part, tensor in ours.items())
    assert {name: (killed / f"{name}.safetensors").stat().st_mtime_ns for name in stamps} == stamps


def watch_looks(monkeypatch) -> list[str]:
    """The blocks whose second moments are taken, as they are."""
    import emloc.emulators.svd as home

    looked, observe = [], home.record_moments

    def noted(block, *rest, **named):
        looked.append(block.name)
        return observe(block, *rest, **named)

    monkeypatch.setattr(home, "observe", noted)
    return looked


# Whole runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["emloc", "emloc_nf4"])
def test_with_no_room_for_statistics_a_run_has_no_stage_for_them(tiny, tmp_path, method):
    def run_cached(home, *overrides):
        run_config = build(compose([*tiny, f"method={method}", *overrides]))
        return run(run_config, Store(tmp_path / home), lambda step, values: None)

    once, twice = run_cached("one", "budget.statistics_gib=0"), run_cached("two")
    assert once.statistics is None
    assert list(once.stages)[:4] == ["emulate", "train", "recover", "evaluate"]
    assert list(twice.stages) == ["calibrate", *once.stages]
    assert once.emulated.facts["samples"] == twice.statistics.facts["samples"]
    assert len(once.emulated.facts["samples"]) == 6
    # Of the same numbers the same adapter is learnt.
    scores = [one.evaluated.facts["scores"]["loss"] for one in (once, twice)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert run_cached("one", "budget.statistics_gib=0") == once
    # An emulator is the same either way, and names its samples either way.
    found = run_cached("two", "budget.statistics_gib=0")
    assert (found.statistics, found.emulated) == (None, twice.emulated)
    assert found.emulated.facts["samples"] == once.emulated.facts["samples"]


def test_the_record_of_such_a_run_names_the_samples(emloc, tiny, one_run):
    ran = emloc(*tiny, "method=emloc", "budget.statistics_gib=0", "name=once")
    assert ran.code == 0, ran.said
    metrics = json.loads((one_run("once") / "metrics.json").read_text())
    assert list(metrics["stages"]) == ["emulate", "train", "recover", "evaluate"]
    assert metrics["seconds"].keys() == metrics["stages"].keys()
    assert len(metrics["calibration"]) == len(set(metrics["calibration"])) == 6
    assert all(name.startswith("train/") for name in metrics["calibration"])
    assert "samples" not in metrics["emulator"]
