"""From settings to scores: everything is checked, then stage follows stage, cached by content."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from emloc.adapters import Adapter
from emloc.adapters.training_inputs import TrainingInputs
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
from emloc.stages.compatibility import check_compatible
from emloc.stages.evaluation.evaluate import headline
from emloc.stages.run_config import RunConfig
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
    def recovered(self) -> Artifact | None:
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


def run(run_config: RunConfig, store: Store, report: Report) -> Result:
    """One run from settings to scores.

    An artifact that turns out to be damaged when it is opened is moved aside, and made again.

    Raises:
        ConfigError: something cannot be right; raised before any stage begins.
        StageError: a stage failed.
    """
    metric, context = checked(run_config, store, report)
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
    for name, stage in context.run_config.stage.items():
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


def checked(run_config: RunConfig, store: Store, report: Report) -> tuple[str, Context]:
    """The name of the headline score, and what the stages read, once all of it has been checked.

    Raises:
        ConfigError: something cannot be right.
    """
    device, host = own_device(), int(run_config.budget.host_gib * GIB)
    stay_within(device, run_config.budget.gpu_gib)
    emulator, adapter, recovery = run_config.emulator, run_config.adapter, run_config.recovery
    check_compatible(emulator, adapter, recovery, run_config.train)
    run_config = replace(run_config, model=emulator.model(run_config.model, run_config.compression))
    source = run_config.model.open()
    reader = source.reader()  # random weights may have none
    source.require(list(source.sizes))
    layers = run_config.model.compressed(source)
    run_config = solved(run_config, source)
    planned = emulator.plan(source, layers, run_config.compression)
    training_inputs = _fit(run_config, adapter, source) if adapter.trains else None
    metric = headline(run_config.task, run_config.eval, source.objective)
    _refuse_unreadable(store, source, reader, run_config)
    read = emulator.samples or recovery.statistics
    read = read or any(stage.reads_samples for stage in run_config.stage.values())
    samples = _samples(run_config) if read else None
    context = Context(
        run_config, source, layers, planned, samples, training_inputs, device, host, report
    )
    for stage in run_config.stage.values():
        stage.check(context)
    return metric, context


def _refuse_unreadable(store: Store, source: Source, reader: Reader, run_config: RunConfig) -> None:
    """Read images as they will be read, before there is anything to lose; once for all runs.

    All that are held out, as they come last. Of the training rows the first: whether the model
    reads such rows at all. The others are read when training begins, behind stages that are kept.

    Raises:
        ConfigError: one of them cannot be read.
    """
    first = run_config.task.train().rows[:1] if run_config.adapter.trains else ()
    rows = (*first, *run_config.task.held_out(run_config.eval.limit))
    pictured = Examples(run_config.task.name, tuple(row for row in rows if row.images))
    if pictured.rows:
        store.stage("check", read_all, pictured, source, reader=reader)


def read_all(folder: Path, rows: Examples, source: Source, *, reader: Reader) -> Facts:
    """Decode every image of these rows, as the model reads it."""
    for row in rows:
        reader.encode(row)
        for image in row.images:
            image.open()
    return {"rows": len(rows)}


def _fit(run_config: RunConfig, adapter: Adapter, source: Source) -> TrainingInputs:
    """What the adapter is fitted to.

    Raises:
        ConfigError: the rank is above what the smallest adapted layer can hold, or activations are
            to wait on the host in a training that is not lean.
    """
    wanted = obstacle(run_config.lora, source.dtype) if run_config.train.host_activations else None
    if wanted:
        raise ConfigError(
            f"train.host_activations=true is of the lean training, which needs {wanted}; "
            "set that, or train.host_activations=false"
        )
    layers = run_config.model.adapted(source)
    name, shape = min(layers.items(), key=lambda item: min(item[1]))
    if run_config.lora.rank > min(shape):
        raise ConfigError(
            f"lora.rank={run_config.lora.rank} is above the {shape[0]} x {shape[1]} of {name}; "
            f"set lora.rank={min(shape)} or less"
        )
    return TrainingInputs(
        adapter,
        run_config.lora,
        tuple(layers),
        run_config.task.train(),
        run_config.model.longest,
        run_config.train,
        run_config.seed,
    )


def _samples(run_config: RunConfig) -> Samples:
    """The calibration samples: never an evaluation row."""
    chosen = run_config.calibration
    pool = run_config.task.train() if chosen.source == "downstream" else generic_text()
    log.info("calibration: %d samples of the %d rows of %s", chosen.samples, len(pool), pool.name)
    return Samples(choose(pool, chosen.samples, chosen.seed), run_config.model.longest)
