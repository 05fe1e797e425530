"""Benchmark of the main claim: build, train, correct and save within a given device memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from math import nan
from pathlib import Path

import torch

from emloc.adapters.training_inputs import TrainingInputs
from emloc.cost.bench.rows import BenchRow, row
from emloc.cost.bench.setting import BenchSetup, RandomSamples, reset_memory
from emloc.emulators import BuildInputs, BuiltEmulator
from emloc.errors import StageError
from emloc.models.checkpoint.source import Source
from emloc.recovery import Recovery, RecoveryInputs, ignore_log
from emloc.runtime.memory import GIB, HostMemoryPeak, is_out_of_memory, limit_device_memory
from emloc.runtime.stage_cache import Artifact, Store
from emloc.stages.training.callbacks import Report
from emloc.stages.training.train import fit_rows

STEPS = 20  # optimizer steps
# Number of calibration samples. The time of the build depends on it, the device memory does not.
SAMPLES = 8


def capped(benchmark: str, model: str, ratio: float, method: str, gb: float) -> Iterator[BenchRow]:
    """Run all stages as `emloc` does, with `gb` (10^9 bytes) of device memory at most.

    If a stage needs more, the benchmark ends with one row that names this stage.
    """
    setup = BenchSetup(
        model,
        (
            f"train.steps={STEPS}",
            f"compression.ratio={ratio}",
            f"method={method}",
        ),
    )
    reset_memory(setup.device)
    limit_device_memory(setup.device, gb * 1e9 / GIB)
    what = f"build, {STEPS} steps, correct, save in {gb:g} GB: peak reserved"
    with tempfile.TemporaryDirectory() as folder, HostMemoryPeak() as host:
        try:
            stages = stages_of(setup, Store(Path(folder)))
        except StageError as error:
            if not is_out_of_memory(error):
                raise
            yield row(benchmark, what, "GB", f"OOM in {error.stage}", most=gb)
            return
        saved = sum(file.stat().st_size for file in (stages[-1].folder / "adapter").iterdir())
        disk = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    yield from stage_rows(benchmark, what, setup, stages, gb)
    yield row(benchmark, "host memory, anonymous, at most", "GiB", host.bytes / GIB)
    yield row(benchmark, "disk of all stages", "GB", disk / 1e9)
    yield row(benchmark, "adapter for the original, saved", "MB", saved / 1e6)


def stage_rows(
    benchmark: str, what: str, setup: BenchSetup, stages: Sequence[Artifact], gb: float
) -> Iterator[BenchRow]:
    """Yield the peak of all stages, of which `gb` is the target, and peak and time of each one."""
    # Without a GPU the stages measure host memory instead, which is left out here.
    peak_gbs = [
        stage.facts["peak_gib"] * GIB / 1e9 if setup.is_full_size else nan for stage in stages
    ]
    yield row(benchmark, what, "GB", max(peak_gbs), most=gb if setup.is_full_size else None)
    for stage, peak in zip(stages, peak_gbs, strict=True):
        yield row(benchmark, f"{stage.stage}: peak reserved", "GB", peak)
        yield row(benchmark, f"{stage.stage}: time", "s", stage.facts["seconds"])


def stages_of(setup: BenchSetup, store: Store) -> list[Artifact]:
    """Run the stages that build, train and correct, and return their artifacts."""
    run_config, device = setup.run_config, setup.device
    built_emulator = emulate(setup, setup.source, samples_of(setup), store)
    trained = store.stage(
        "train",
        fit_random,
        built_emulator,
        setup.training_inputs,
        setup=setup,
        report=ignore_log,
    )
    recovered = store.stage(
        "recover", recover, run_config.recovery, trained, built_emulator, device=device
    )
    return [built_emulator.artifact, trained, recovered]


def samples_of(setup: BenchSetup) -> RandomSamples:
    """Return the calibration samples of a build."""
    return RandomSamples(setup, SAMPLES if setup.is_full_size else 2)


def emulate(
    setup: BenchSetup, source: Source, samples: RandomSamples, store: Store
) -> BuiltEmulator:
    """Run the stage that builds the emulator of a model."""
    run_config = setup.run_config
    ranks = run_config.emulator.plan(
        source, run_config.model.compressible_layers(source), run_config.compression
    )
    build_inputs = BuildInputs(ranks, None, samples, run_config.precision)  # type: ignore[arg-type]
    emulated = store.stage(
        "emulate",
        run_config.emulator.build,
        source,
        build_inputs,
        device=setup.device,
        limits=setup.state_limits,
    )
    return BuiltEmulator(run_config.emulator, emulated, source, run_config.precision)


def recover(
    folder: Path,
    recovery: Recovery,
    trained: Artifact,
    built_emulator: BuiltEmulator,
    *,
    device: torch.device,
) -> dict[str, object]:
    """Run the recovery stage without calibration samples, and return its facts."""
    inputs = RecoveryInputs(
        trained=trained,
        built_emulator=built_emulator,
        samples=None,
        training_inputs=None,
        device=device,
    )
    return recovery.recover(folder, inputs)


def fit_random(
    folder: Path,
    built_emulator: BuiltEmulator,
    training_inputs: TrainingInputs,
    *,
    setup: BenchSetup,
    report: Report,
) -> dict[str, object]:
    """Run the training stage on random rows, and return its facts."""
    return fit_rows(
        folder,
        built_emulator,
        training_inputs,
        setup.rows(),
        lambda batch_rows: setup.labelled_batch(batch_rows[0].seed),
        device=setup.device,
        report=report,
    )
