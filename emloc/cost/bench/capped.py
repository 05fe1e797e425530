"""The claim: build, train, correct and save on a device of a given size."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from math import nan
from pathlib import Path

import torch

from emloc.adapters.fit import Fit
from emloc.cost.bench.rows import Row, row
from emloc.cost.bench.setting import RandomSamples, Setting, fresh, out_of_memory
from emloc.emulators import Built, Given
from emloc.errors import StageError
from emloc.recovery import Recovery, RecoveryInputs
from emloc.runtime.memory import GIB, HostPeak, stay_within
from emloc.runtime.stage_cache import Artifact, Store
from emloc.stages.training.callbacks import Report
from emloc.stages.training.train import fit_rows

STEPS = 20
# Calibration samples. Their number decides the time of the build, and nothing of the device memory.
SAMPLES = 8


def capped(work: str, model: str, ratio: float, method: str, gb: float) -> Iterator[Row]:
    """Run the stages as `emloc` runs them, the process refused all device memory above `gb`.

    One that is refused memory ends the work with one row: the stage it was in.
    """
    setting = Setting(
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
    with tempfile.TemporaryDirectory() as folder, HostPeak() as host:
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


def stages_of(setting: Setting, store: Store) -> list[Artifact]:
    """Build, train and correct, each as `emloc` does it."""
    cell, source, device = setting.cell, setting.source, setting.device
    ranks = cell.emulator.plan(source, cell.model.compressed(source), cell.compression)
    samples = RandomSamples(setting, SAMPLES if setting.full else 2)
    given = Given(ranks, None, samples, cell.precision)  # type: ignore[arg-type]
    host = int(cell.budget.host_gib * GIB)
    emulated = store.stage(
        "emulate", cell.emulator.build, source, given, device=device, host_bytes=host
    )
    built = Built(cell.emulator, emulated, source, cell.precision)
    trained = store.stage("train", fit_random, built, setting.fit, setting=setting, report=_unheard)
    carried = store.stage("recover", recover, cell.recovery, trained, built, device=device)
    return [emulated, trained, carried]


def recover(
    folder: Path, recovery: Recovery, trained: Artifact, built: Built, *, device: torch.device
) -> dict[str, object]:
    """The recovery stage, without calibration samples."""
    inputs = RecoveryInputs(trained=trained, built=built, samples=None, fit=None, device=device)
    return recovery.carry(folder, inputs)


def fit_random(
    folder: Path, built: Built, fit: Fit, *, setting: Setting, report: Report
) -> dict[str, object]:
    """The training stage, on samples made for the occasion."""
    return fit_rows(
        folder,
        built,
        fit,
        setting.rows(),
        lambda some: setting.learnt(some[0].seed),
        device=setting.device,
        report=report,
    )


def _unheard(step: int, values: dict[str, float]) -> None:
    """Nobody follows this curve."""
