"""The claim: build, train, correct and save on a device of a given size."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from math import nan
from pathlib import Path

import torch

from emloc.adapters.training_inputs import TrainingInputs
from emloc.cost.bench.rows import BenchRow, row
from emloc.cost.bench.setting import BenchSetup, RandomSamples, fresh, out_of_memory
from emloc.emulators import BuildInputs, BuiltEmulator
from emloc.errors import StageError
from emloc.recovery import Recovery, RecoveryInputs
from emloc.runtime.memory import GIB, HostMemoryPeak, stay_within
from emloc.runtime.stage_cache import Artifact, Store
from emloc.stages.training.callbacks import Report
from emloc.stages.training.train import fit_rows

STEPS = 20
# Calibration samples. Their number decides the time of the build, and nothing of the device memory.
SAMPLES = 8


def capped(work: str, model: str, ratio: float, method: str, gb: float) -> Iterator[BenchRow]:
    """Run the stages as `emloc` runs them, the process refused all device memory above `gb`.

    One that is refused memory ends the work with one row: the stage it was in.
    """
    setting = BenchSetup(
        model,
        (
            f"train.steps={STEPS}",
            f"compression.ratio={ratio}",
            f"method={method}",
        ),
    )
    fresh(setting.device)
    stay_within(setting.device, gb * 1e9 / GIB)
    what = f"build, {STEPS} steps, correct, save in {gb:g} GB: peak reserved"
    with tempfile.TemporaryDirectory() as folder, HostMemoryPeak() as host:
        try:
            stages = stages_of(setting, Store(Path(folder)))
        except StageError as error:
            if not out_of_memory(error):
                raise
            yield row(work, what, "GB", f"OOM in {error.stage}", most=gb)
            return
        saved = sum(file.stat().st_size for file in (stages[-1].folder / "adapter").iterdir())
        disk = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        facts = {stage.stage: stage.facts for stage in stages}
    # Without a GPU the stages followed the memory of the host.
    gbs = {at: one["peak_gib"] * GIB / 1e9 if setting.full else nan for at, one in facts.items()}
    yield row(work, what, "GB", max(gbs.values()), most=gb if setting.full else None)
    for stage, one in facts.items():
        yield row(work, f"{stage}: peak reserved", "GB", gbs[stage])
        yield row(work, f"{stage}: time", "s", one["seconds"])
    yield row(work, "host memory, anonymous, at most", "GiB", host.bytes / GIB)
    yield row(work, "disk of all stages", "GB", disk / 1e9)
    yield row(work, "adapter for the original, saved", "MB", saved / 1e6)


def stages_of(setting: BenchSetup, store: Store) -> list[Artifact]:
    """Build, train and correct, each as `emloc` does it."""
    run_config, source, device = setting.run_config, setting.source, setting.device
    ranks = run_config.emulator.plan(
        source, run_config.model.compressed(source), run_config.compression
    )
    samples = RandomSamples(setting, SAMPLES if setting.full else 2)
    build_inputs = BuildInputs(ranks, None, samples, run_config.precision)  # type: ignore[arg-type]
    host = int(run_config.budget.host_gib * GIB)
    emulated = store.stage(
        "emulate", run_config.emulator.build, source, build_inputs, device=device, host_bytes=host
    )
    built_emulator = BuiltEmulator(run_config.emulator, emulated, source, run_config.precision)
    trained = store.stage(
        "train",
        fit_random,
        built_emulator,
        setting.training_inputs,
        setting=setting,
        report=_unheard,
    )
    recovered = store.stage(
        "recover", recover, run_config.recovery, trained, built_emulator, device=device
    )
    return [emulated, trained, recovered]


def recover(
    folder: Path,
    recovery: Recovery,
    trained: Artifact,
    built_emulator: BuiltEmulator,
    *,
    device: torch.device,
) -> dict[str, object]:
    """The recovery stage, without calibration samples."""
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
    setting: BenchSetup,
    report: Report,
) -> dict[str, object]:
    """The training stage, on samples made for the occasion."""
    return fit_rows(
        folder,
        built_emulator,
        training_inputs,
        setting.rows(),
        lambda some: setting.learnt(some[0].seed),
        device=setting.device,
        report=report,
    )


def _unheard(step: int, values: dict[str, float]) -> None:
    """Nobody follows this curve."""
