"""One run: check all settings, then run the stages in order, each cached by its inputs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from emloc.adapters import Adapter
from emloc.adapters.training_inputs import TrainingInputs
from emloc.calibration.offload import state_limits
from emloc.calibration.samples import Samples, choose_examples
from emloc.config.compatibility import check_compatible, refuse_training_in_float16
from emloc.cost.plan.solve import solve_auto_compression
from emloc.data.examples import Examples
from emloc.data.reader import Reader
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.runtime.distributed import own_device
from emloc.runtime.manifest import DamagedError, set_aside
from emloc.runtime.memory import limit_device_memory, usable_device_bytes
from emloc.runtime.stage_cache import Artifact, Facts, Store
from emloc.stages import (
    EMULATOR,
    RECOVERED,
    SCORES,
    SCORES_AS_TRAINED,
    STATISTICS,
    TRAINED,
    Context,
)
from emloc.stages.evaluation.evaluate import headline
from emloc.stages.run_config import RunConfig
from emloc.stages.training.callbacks import Report
from emloc.stages.training.kept_trainee import KeptTrainee
from emloc.stages.training.lean_setup import required_override
from emloc.tasks.generic import generic_text
from emloc.tasks.overlap import refuse_overlap

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The artifacts of one run."""

    metric: str  # name of the headline score
    stages: dict[str, Artifact]  # stage -> its artifact, in the order of the stages
    current: dict[str, Artifact]  # kind (see `emloc.stages`) -> the newest artifact of it

    @property
    def statistics(self) -> Artifact | None:
        """Second moments; None if none were stored."""
        return self.current.get(STATISTICS)

    @property
    def emulated(self) -> Artifact:
        """The emulator."""
        return self.current[EMULATOR]

    @property
    def trained(self) -> Artifact | None:
        """The adapter as it was trained; None if the method trains none."""
        return self.current.get(TRAINED)

    @property
    def recovered(self) -> Artifact | None:
        """The adapter for the original model; None if the method trains none."""
        return self.current.get(RECOVERED)

    @property
    def evaluated(self) -> Artifact:
        """Scores of the original model with the recovered adapter, if there is one."""
        return self.current[SCORES]

    @property
    def as_trained(self) -> Artifact | None:
        """Scores of the model as it was trained; None if its weights are in no packed format."""
        return self.current.get(SCORES_AS_TRAINED)

    @property
    def samples(self) -> list[str]:
        """Names of the calibration rows, from the first stage that read them."""
        recorded = (artifact.facts.get("samples") for artifact in self.stages.values())
        return next((names for names in recorded if names), [])


def run(
    run_config: RunConfig, store: Store, report: Report, keeper: KeptTrainee | None = None
) -> Result:
    """Run all stages, and return their artifacts.

    An artifact that turns out to be damaged when it is opened is moved aside and computed again.

    Args:
        run_config: settings of all parts.
        store: cache of the stages.
        report: called with each line of the training log.
        keeper: keeps what a training has loaded for the next run of this process; None: nothing.

    Raises:
        ConfigError: a setting is wrong; raised before any stage begins.
        StageError: a stage failed.
    """
    metric, context = checked(run_config, store, report)
    damaged: set[Path] = set()
    while True:
        try:
            context = _through_stages(
                replace(context, artifacts={}, current={}, keeper=keeper), store
            )
            return Result(metric, context.artifacts, context.current)
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
            context.artifacts[name] = context.current[stage.gives] = artifact
    return context


def checked(run_config: RunConfig, store: Store, report: Report) -> tuple[str, Context]:
    """Check all settings; return the name of the headline score and the inputs of the stages.

    Raises:
        ConfigError: a setting is wrong.
    """
    device = own_device()
    limit_device_memory(device, run_config.budget.gpu_gib)
    emulator, adapter, recovery = run_config.emulator, run_config.adapter, run_config.recovery
    anchor, polish = run_config.anchor, run_config.polish
    check_compatible(emulator, adapter, recovery, anchor, polish, run_config.train)
    refuse_training_in_float16(run_config.model.dtype, adapter)
    run_config = replace(run_config, model=emulator.model(run_config.model, run_config.compression))
    source = run_config.model.open()
    reader = source.reader()  # random weights may have none
    source.require([*source.sizes, *source.buffers])
    layers = run_config.model.compressible_layers(source)
    run_config = solve_auto_compression(run_config, source)
    planned = emulator.plan(source, layers, run_config.compression)
    training_inputs = _fit(run_config, adapter, source) if adapter.trains else None
    metric = headline(run_config.task, run_config.eval, source.objective)
    _refuse_unreadable(store, source, reader, run_config)
    if training_inputs is not None:
        held_out = run_config.task.held_out(run_config.eval.limit)
        refuse_overlap(training_inputs.examples, held_out)
    needs_samples = emulator.reads_samples(run_config.precision) or recovery.statistics
    needs_samples |= any(stage.reads_samples for stage in run_config.stage.values())
    samples = _samples(run_config) if needs_samples else None
    context = Context(
        run_config,
        source,
        layers,
        planned,
        samples,
        training_inputs,
        device,
        state_limits(run_config.budget, usable_device_bytes(device)),
        report,
        store.root,
    )
    for stage in run_config.stage.values():
        stage.check(context)
    return metric, context


def _refuse_unreadable(store: Store, source: Source, reader: Reader, run_config: RunConfig) -> None:
    """Read images before any stage begins, once for all runs.

    All held-out images are read, since evaluation comes last. The first training row shows whether
    the model reads such rows at all. Training itself reads the other rows, after cached stages.

    Raises:
        ConfigError: an image cannot be read.
    """
    first = run_config.task.train().rows[:1] if run_config.adapter.trains else ()
    rows = (*first, *run_config.task.held_out(run_config.eval.limit))
    with_images = Examples(run_config.task.name, tuple(row for row in rows if row.images))
    if with_images.rows:
        store.stage("check", read_all, with_images, source, reader=reader)


def read_all(folder: Path, rows: Examples, source: Source, *, reader: Reader) -> Facts:
    """Decode every image of the rows, as the model reads it, and return the number of rows."""
    for row in rows:
        reader.encode(row)
        for image in row.images:
            image.open()
    return {"rows": len(rows)}


def _fit(run_config: RunConfig, adapter: Adapter, source: Source) -> TrainingInputs:
    """Inputs of the training.

    Raises:
        ConfigError: the rank is above the smallest side of an adapted layer, or
            `train.host_activations` is set in a training that cannot be lean.
    """
    override = required_override(run_config.lora) if run_config.train.host_activations else None
    if override:
        raise ConfigError(
            f"train.host_activations=true needs train.lean=true, and that needs {override}; "
            "set that, or train.host_activations=false"
        )
    layers = run_config.model.adapted_layers(source)
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
        run_config.model.length_limit,
        run_config.train,
        run_config.seed,
    )


def _samples(run_config: RunConfig) -> Samples:
    """The calibration samples, none of which is an evaluation row."""
    calibration = run_config.calibration
    pool = run_config.task.train() if calibration.source == "downstream" else generic_text()
    log.info(
        "calibration: %d samples of the %d rows of %s", calibration.samples, len(pool), pool.name
    )
    samples = choose_examples(pool, calibration.samples, calibration.seed)
    return Samples(samples, run_config.model.length_limit)
