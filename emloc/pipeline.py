"""calibrate -> emulate -> train -> recover -> evaluate, every stage cached by content."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from emloc.adapters import Adapter
from emloc.calibrate import calibrate
from emloc.composition import fit_together
from emloc.config import Cell
from emloc.emulators import Built, Given
from emloc.errors import ConfigError
from emloc.evaluate import evaluate, evaluate_as_trained, headline
from emloc.examples import Examples
from emloc.lean.prepare import obstacle
from emloc.memory import GIB, stay_within
from emloc.plan.cost import statistics_bytes
from emloc.plan.solve import solved
from emloc.progress import Report
from emloc.ranks import own_device
from emloc.reading import Reader
from emloc.samples import Samples, choose
from emloc.source import Source
from emloc.store import Artifact, Store
from emloc.tasks.generic import generic_text
from emloc.train import Fit, train

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The artifacts of one run; `trained` and `carried` are None where nothing was trained.

    `as_trained`: the scores of what was trained itself, where that is in four bits and the model it
    is carried to is not.
    """

    metric: str
    emulated: Artifact
    statistics: Artifact | None
    trained: Artifact | None
    carried: Artifact | None
    evaluated: Artifact
    as_trained: Artifact | None = None

    @property
    def stages(self) -> dict[str, Artifact]:
        """The stages that were needed, in order."""
        every = (self.statistics, self.emulated, self.trained, self.carried, self.evaluated)
        found = {one.stage: one for one in every if one is not None}
        return found | ({"evaluate_as_trained": self.as_trained} if self.as_trained else {})

    @property
    def samples(self) -> list[str]:
        """Names of the calibration rows, whichever stage read them first."""
        read = (self.statistics, self.emulated, self.carried)
        named = (one.facts.get("samples") for one in read if one is not None)
        return next((names for names in named if names), [])


def run(cell: Cell, store: Store, report: Report) -> Result:
    """One run from settings to scores.

    Raises:
        ConfigError: something cannot be right; raised before any weight is read.
        StageError: a stage failed.
    """
    device, host = own_device(), int(cell.budget.host_gib * GIB)
    stay_within(device, cell.budget.gpu_gib)
    emulator, adapter, recovery = cell.emulator, cell.adapter, cell.recovery
    fit_together(emulator, adapter, recovery, cell.train)
    cell = replace(cell, model=emulator.model(cell.model, cell.compression))
    source = cell.model.open()
    reader = source.reader()  # random weights may have none: found out now, not behind a stage
    source.require(list(source.sizes))  # what the files lack, likewise
    layers = cell.model.compressed(source)
    compression = solved(cell, source)
    planned = emulator.plan(source, layers, compression)
    fit = _fit(cell, adapter, source) if adapter.trains else None
    # What cannot be scored is found out now, not behind the training.
    held_out = cell.task.held_out(cell.eval.limit)
    metric = headline(cell.task, cell.eval, source.objective)
    _refuse_unreadable(reader, held_out, cell)
    samples = _samples(cell) if emulator.samples or recovery.statistics else None

    statistics = trained = carried = as_trained = None
    whole = emulator.statistics == "input"
    # Of a large model they would be larger than itself: it is then compressed while it is run.
    kept = statistics_bytes(layers, whole) <= cell.budget.statistics_gib * GIB
    if emulator.statistics and kept:
        statistics = store.stage(
            "calibrate",
            calibrate,
            source,
            layers,
            samples,
            whole,
            device=device,
            host_bytes=host,
        )
    assert compression.bits is not None
    given = Given(planned, statistics, samples if emulator.samples else None, compression.bits)
    emulated = store.stage("emulate", emulator.build, source, given, device=device, host_bytes=host)
    built = Built(emulator, emulated, source)
    if fit is not None:
        _refuse_nothing_adapted(cell, built, fit)
        trained = store.stage("train", train, built, fit, device=device, report=report)
        seen = samples if recovery.statistics else None
        carried = store.stage(
            "recover", recovery.carry, trained, built, seen, device=device, host_bytes=host
        )
    length, wanted = cell.model.longest, cell.eval
    evaluated = store.stage(
        "evaluate", evaluate, source, adapter, carried, cell.task, length, wanted, device=device
    )
    if adapter.trains and trained is not None and given.bits == 4:
        work = evaluate_as_trained
        as_trained = store.stage(
            "evaluate", work, built, adapter, trained, cell.task, length, wanted, device=device
        )
    return Result(metric, emulated, statistics, trained, carried, evaluated, as_trained)


def _refuse_unreadable(reader: Reader, held_out: Examples, cell: Cell) -> None:
    """Read images as they will be read, before there is anything to lose.

    All that are held out, as they come last. Of the training rows the first: whether the model
    reads such rows at all. The others are read when training begins, behind stages that are kept.

    Raises:
        ConfigError: one of them cannot be read.
    """
    trained = cell.task.train().rows[:1] if cell.adapter.trains else ()
    for row in (*trained, *held_out):
        if row.images:
            reader.encode(row)
        for image in row.images:
            image.open()


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


def _refuse_nothing_adapted(cell: Cell, built: Built, fit: Fit) -> None:
    """Refuse an emulator that leaves none of the layers to adapt, before it is opened.

    Raises:
        ConfigError: that is so.
    """
    if not built.targets(fit.layers):
        raise ConfigError(
            f"model.lora_targets={cell.model.lora_targets!r} matches none of the layers that "
            "the emulator leaves to adapt; set model.lora_targets, or emulator.first and "
            "emulator.last higher"
        )


def _samples(cell: Cell) -> Samples:
    """The calibration samples: never an evaluation row."""
    chosen = cell.calibration
    pool = cell.task.train() if chosen.source == "downstream" else generic_text()
    log.info("calibration: %d of %d rows of %s", chosen.samples, len(pool), pool.name)
    return Samples(choose(pool, chosen.samples, chosen.seed), cell.model.longest)
