"""calibrate -> emulate -> train -> recover -> evaluate, every stage cached by content."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from emloc.calibrate import calibrate
from emloc.config import Cell
from emloc.emulators import Built, Given
from emloc.errors import ConfigError
from emloc.evaluate import evaluate, headline
from emloc.samples import Samples, choose
from emloc.source import Source
from emloc.store import Artifact, Store
from emloc.tasks.generic import generic_text
from emloc.train import Fit, Report, train

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The artifacts of one run; `trained` and `carried` are None where nothing was trained."""

    metric: str
    emulated: Artifact
    statistics: Artifact | None
    trained: Artifact | None
    carried: Artifact | None
    evaluated: Artifact

    @property
    def stages(self) -> dict[str, Artifact]:
        """The stages that were needed, in order."""
        every = (self.statistics, self.emulated, self.trained, self.carried, self.evaluated)
        return {one.stage: one for one in every if one is not None}


def run(cell: Cell, store: Store, report: Report) -> Result:
    """One run from settings to scores.

    Raises:
        ConfigError: something cannot be right; raised before any weight is read.
        StageError: a stage failed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    emulator, adapter, recovery = cell.emulator, cell.adapter, cell.recovery
    source = cell.model.open()
    layers = cell.model.compressed(source)
    ranks = emulator.plan(source, layers, cell.compression)
    fit = _fit(cell, source) if adapter.trains else None
    # What cannot be scored is found out now, not behind the training.
    cell.task.held_out(cell.eval.limit)
    metric = headline(cell.task, cell.eval)
    samples = _samples(cell) if emulator.statistics or recovery.statistics else None

    statistics = trained = carried = None
    if emulator.statistics:
        statistics = store.stage(
            "calibrate",
            calibrate,
            source,
            layers,
            samples,
            emulator.statistics == "input",
            device=device,
        )
    given = Given(ranks, statistics, samples if emulator.statistics else None)
    emulated = store.stage("emulate", emulator.build, source, given, device=device)
    if fit is not None:
        built = Built(emulator, emulated, source)
        trained = store.stage("train", train, built, fit, device=device, report=report)
        seen = samples if recovery.statistics else None
        carried = store.stage("recover", recovery.carry, trained, built, seen, device=device)
    length = cell.model.max_length
    evaluated = store.stage(
        "evaluate", evaluate, source, carried, cell.task, length, cell.eval, device=device
    )
    return Result(metric, emulated, statistics, trained, carried, evaluated)


def _fit(cell: Cell, source: Source) -> Fit:
    """What the adapter is fitted to.

    Raises:
        ConfigError: the rank is above what the smallest adapted layer can hold.
    """
    name, shape = min(cell.model.adapted(source).items(), key=lambda item: min(item[1]))
    if cell.lora.rank > min(shape):
        raise ConfigError(
            f"lora.rank={cell.lora.rank} is above the {shape[0]} x {shape[1]} of {name}; "
            f"set lora.rank={min(shape)} or less"
        )
    return Fit(
        cell.adapter,
        cell.lora,
        cell.model.lora_targets,
        cell.task.train(),
        cell.model.max_length,
        cell.train,
        cell.seed,
    )


def _samples(cell: Cell) -> Samples:
    """The calibration samples: never an evaluation row."""
    chosen = cell.calibration
    pool = cell.task.train() if chosen.source == "downstream" else generic_text()
    log.info("calibration: %d of %d rows of %s", chosen.samples, len(pool), pool.name)
    return Samples(choose(pool, chosen.samples, chosen.seed), cell.model.max_length)
