"""From settings to scores: everything is checked, then stage follows stage, cached by content."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from emloc.adapters import Adapter
from emloc.adapters.fit import Fit
from emloc.calibration.samples import Samples, choose
from emloc.cost.plan.solve import solved
from emloc.data.examples import Examples
from emloc.data.reader import Reader
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.runtime.distributed import own_device
from emloc.runtime.manifest import DamagedError, set_aside
from emloc.runtime.memory import GIB, stay_within
from emloc.runtime.stage_cache import Artifact, Facts, Store
from emloc.stages import (
    CARRIED,
    EMULATOR,
    SCORES,
    SCORES_AS_TRAINED,
    STATISTICS,
    TRAINED,
    Context,
)
from emloc.stages.compatibility import fit_together
from emloc.stages.evaluation.evaluate import headline
from emloc.stages.run_config import Cell
from emloc.stages.training.callbacks import Report
from emloc.stages.training.lean_setup import obstacle
from emloc.tasks.generic import generic_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The artifacts of one run.

    `stages`: by the stage that made it, in order. `current`: by what it is (see `emloc.stages`), of
    several the newest.
    """

    metric: str
    stages: dict[str, Artifact]
    current: dict[str, Artifact]

    @property
    def statistics(self) -> Artifact | None:
        """Second moments; None where they were not kept."""
        return self.current.get(STATISTICS)

    @property
    def emulated(self) -> Artifact:
        """The emulator."""
        return self.current[EMULATOR]

    @property
    def trained(self) -> Artifact | None:
        """The adapter as it was trained; None where nothing was."""
        return self.current.get(TRAINED)

    @property
    def carried(self) -> Artifact | None:
        """The adapter for the original model."""
        return self.current.get(CARRIED)

    @property
    def evaluated(self) -> Artifact:
        """Scores of the original model with it."""
        return self.current[SCORES]

    @property
    def as_trained(self) -> Artifact | None:
        """Scores of the model that was trained, where its numbers are packed."""
        return self.current.get(SCORES_AS_TRAINED)

    @property
    def samples(self) -> list[str]:
        """Names of the calibration rows, whichever stage read them first."""
        named = (one.facts.get("samples") for one in self.stages.values())
        return next((names for names in named if names), [])


def run(cell: Cell, store: Store, report: Report) -> Result:
    """One run from settings to scores.

    An artifact that turns out to be damaged when it is opened is moved aside, and made again.

    Raises:
        ConfigError: something cannot be right; raised before any stage begins.
        StageError: a stage failed.
    """
    metric, context = checked(cell, store, report)
    damaged: set[Path] = set()
    while True:
        try:
            context = _through_stages(replace(context, made={}, current={}), store)
            return Result(metric, context.made, context.current)
        except DamagedError as error:
            if error.folder in damaged:
                raise
            damaged.add(error.folder)
            aside = set_aside(error.folder)
            log.warning("%s; moved to %s and computed again", error, aside.name)


def _through_stages(context: Context, store: Store) -> Context:
    for name, stage in context.cell.stage.items():
        if stage.needed(context):
            artifact = store.stage(
                name,
                stage.enter,
                *stage.inputs(context),
                version=stage.version,
                together=stage.together(context),
                context=context,
            )
            context.made[name] = context.current[stage.gives] = artifact
    return context


def checked(cell: Cell, store: Store, report: Report) -> tuple[str, Context]:
    """The name of the headline score, and what the stages read, once all of it has been checked.

    Raises:
        ConfigError: something cannot be right.
    """
    device, host = own_device(), int(cell.budget.host_gib * GIB)
    stay_within(device, cell.budget.gpu_gib)
    emulator, adapter, recovery = cell.emulator, cell.adapter, cell.recovery
    fit_together(emulator, adapter, recovery, cell.train)
    cell = replace(cell, model=emulator.model(cell.model, cell.compression))
    source = cell.model.open()
    reader = source.reader()  # random weights may have none
    source.require(list(source.sizes))
    layers = cell.model.compressed(source)
    cell = solved(cell, source)
    planned = emulator.plan(source, layers, cell.compression)
    fit = _fit(cell, adapter, source) if adapter.trains else None
    metric = headline(cell.task, cell.eval, source.objective)
    _refuse_unreadable(store, source, reader, cell)
    read = emulator.samples or recovery.statistics
    read = read or any(stage.reads_samples for stage in cell.stage.values())
    samples = _samples(cell) if read else None
    context = Context(cell, source, layers, planned, samples, fit, device, host, report)
    for stage in cell.stage.values():
        stage.check(context)
    return metric, context


def _refuse_unreadable(store: Store, source: Source, reader: Reader, cell: Cell) -> None:
    """Read images as they will be read, before there is anything to lose; once for all runs.

    All that are held out, as they come last. Of the training rows the first: whether the model
    reads such rows at all. The others are read when training begins, behind stages that are kept.

    Raises:
        ConfigError: one of them cannot be read.
    """
    first = cell.task.train().rows[:1] if cell.adapter.trains else ()
    rows = (*first, *cell.task.held_out(cell.eval.limit))
    pictured = Examples(cell.task.name, tuple(row for row in rows if row.images))
    if pictured.rows:
        store.stage("check", read_all, pictured, source, reader=reader)


def read_all(folder: Path, rows: Examples, source: Source, *, reader: Reader) -> Facts:
    """Decode every image of these rows, as the model reads it."""
    for row in rows:
        reader.encode(row)
        for image in row.images:
            image.open()
    return {"rows": len(rows)}


def _fit(cell: Cell, adapter: Adapter, source: Source) -> Fit:
    """What the adapter is fitted to.

    Raises:
        ConfigError: the rank is above what the smallest adapted layer can hold, or activations are
            to wait on the host in a training that is not lean.
    """
    wanted = obstacle(cell.lora, source.dtype) if cell.train.host_activations else None
    if wanted:
        raise ConfigError(
            f"train.host_activations=true is of the lean training, which needs {wanted}; "
            "set that, or train.host_activations=false"
        )
    layers = cell.model.adapted(source)
    name, shape = min(layers.items(), key=lambda item: min(item[1]))
    if cell.lora.rank > min(shape):
        raise ConfigError(
            f"lora.rank={cell.lora.rank} is above the {shape[0]} x {shape[1]} of {name}; "
            f"set lora.rank={min(shape)} or less"
        )
    return Fit(
        adapter,
        cell.lora,
        tuple(layers),
        cell.task.train(),
        cell.model.longest,
        cell.train,
        cell.seed,
    )


def _samples(cell: Cell) -> Samples:
    """The calibration samples: never an evaluation row."""
    chosen = cell.calibration
    pool = cell.task.train() if chosen.source == "downstream" else generic_text()
    log.info("calibration: %d samples of the %d rows of %s", chosen.samples, len(pool), pool.name)
    return Samples(choose(pool, chosen.samples, chosen.seed), cell.model.longest)
