"""One job: from a composed configuration to a run folder with settings, status and results."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from emloc.config.run_folder import Run
from emloc.errors import ConfigError, SaidError, StageError, one_line
from emloc.report.tracking.metrics_log import Record, stage_line, training_line
from emloc.runtime.distributed import (
    is_first,
    is_sharded,
    rank,
    silence_other_processes,
    world_size,
)
from emloc.runtime.failures import reason_of, refusal_of
from emloc.runtime.interrupts import noticed_interrupts
from emloc.runtime.quiet_libraries import quiet
from emloc.sweeps.named_lines import name_console_lines

if TYPE_CHECKING:
    from emloc.pipeline import Result
    from emloc.runtime.stage_cache import Artifact
    from emloc.stages.run_config import RunConfig
    from emloc.stages.training.callbacks import Report
    from emloc.stages.training.kept_trainee import KeptTrainee

log = logging.getLogger("emloc")

# Stages whose facts the results store under names of their own.
_NAMED_STAGES = ("calibrate", "emulate", "train", "recover", "evaluate", "evaluate_as_trained")

# When another process fails, the first one has so many seconds to fail, too, and to record it.
RECORD_SECONDS = 10

# Stand in status.json in place of the stage of an error: of a refusal, and of an error between
# stages, such as in a file of the model.
CONFIG, START = "config", "start"


def run_job(cfg: DictConfig) -> float | None:
    """Return the headline score of one run; None if it failed, which its status.json explains.

    A run that is done is skipped, so a repeated sweep is a resumed one. Of several processes only
    the first writes into the run's folder.

    Raises:
        SystemExit: a training of several processes failed in this one. The failure is recorded.
            The other processes may hang in the training, so this launch has to end.
    """
    silence_other_processes()
    run = Run(Path(HydraConfig.get().runtime.output_dir))
    name_console_lines(run.folder.name)
    try:
        return _run(cfg, run)
    except Exception as error:  # why: each failure is said, and the other jobs of a sweep go on
        _failed(run, error)
        return None


def _run(cfg: DictConfig, run: Run) -> float | None:
    """Skip the run, take part in it, or lead it."""
    if run.done and _still_holds(cfg, run):
        log.info("%s: done before, skipped", run.folder.name)
        return float(run.metrics["score"])
    if not is_first():
        return _follow(cfg, run)
    start = time.time()
    with run.exclusive():
        if run.done and run.status["time"] >= start:  # by another process, while this one waited
            return float(run.metrics["score"])
        begin(run, cfg, HydraConfig.get().runtime.choices)
        log.info("%s: started", run.folder.name)
        with Record(run) as record:
            return _lead(cfg, run, record)


def _still_holds(cfg: DictConfig, run: Run) -> bool:
    """Whether data and model are those that a finished run recorded; log those that differ.

    A run that recorded neither still holds. So does a run whose data or model cannot be found any
    more, since it could not be repeated.
    """
    recorded = run.metrics
    try:
        present = identities(_build(cfg))
    except ConfigError as error:
        name = run.folder.name
        log.warning("%s: done before; its data and model cannot be compared: %s", name, error)
        return True
    changed = [
        name for name, value in present.items() if name in recorded and recorded[name] != value
    ]
    for name in changed:
        log.info("%s: done before, but its %s has changed since; done again", run.folder.name, name)
    return not changed


def identities(run_config: RunConfig) -> dict[str, Any]:
    """Keys of the data and of the model, and the model's format if it is the authors' own.

    Raises:
        ConfigError: data or model cannot be found.
    """
    source = run_config.emulator.model(run_config.model, run_config.compression).open()
    authors_format = {"authors_format": source.authors_format} if source.authors_format else {}
    return {"data": run_config.task.key, "model": source.key, **authors_format}


def begin(run: Run, cfg: DictConfig, choices: Mapping[str, str | None]) -> None:
    """Record the start of the run, its settings and the choice of each group."""
    ours = {group: choice for group, choice in choices.items() if not group.startswith("hydra")}
    run.begin(cfg, {group: choice for group, choice in ours.items() if choice})


def _lead(cfg: DictConfig, run: Run, record: Record) -> float | None:
    """Run all stages in the first process, and record how the run ended."""
    with noticed_interrupts() as is_interrupted:
        try:
            metrics = _work(cfg, run, record)
        except KeyboardInterrupt:
            run.mark("interrupted")
            raise
        except Exception as error:  # why: the record has to know of it before it is closed
            if is_interrupted():
                run.mark("interrupted")
                raise KeyboardInterrupt from error
            _failed(run, error)
            return None
    run.finish(metrics)
    log.info("%s: done", run.folder.name)
    return float(metrics["score"])


def _follow(cfg: DictConfig, run: Run) -> float | None:
    """Take part in a run that the first process records, and end as that process does."""
    try:
        _pipeline(_build(cfg), lambda step, values: None)
    except (ConfigError, StageError) as error:
        _failed(run, error)
        return None
    except Exception as error:  # why: as in the first process
        is_common = _recorded(run)
        _failed(run, error)
        if not is_common:  # the other processes may wait for this one
            raise SystemExit(1) from error
        return None
    run.wait_until_ended(within=math.inf)
    return float(run.metrics["score"]) if run.done else None


def _failed(run: Run, error: Exception) -> None:
    """Log and record the error, unless another process did.

    Raises:
        SaidError: the error is logged, but it cannot be recorded in the run's folder.
        SystemExit: see `run_job`.
    """
    ending = _ending(run, refusal_of(error) or error)
    if not _recorded(run):
        log.error("%s", one_line(ending.error))
        try:
            _record_ending(run, ending, error)
        except OSError as unwritable:
            log.error("%s: not recorded: %s", run.folder.name, reason_of(unwritable))
            raise SaidError(2 if ending.stage == CONFIG else 1) from error
    if _out_of_step(error):
        message = "emloc: ended, since the other processes may hang in the failed training"
        raise SystemExit(message if is_first() else 1) from error


@dataclass(frozen=True)
class _Ending:
    """How a run ended without results, as status.json has it."""

    state: str
    stage: str
    error: str


def _ending(run: Run, error: Exception) -> _Ending:
    """The state, the stage and the line of an error."""
    if isinstance(error, ConfigError):
        return _Ending("failed", CONFIG, f"{_process()}{error}")
    more = f"(more in {run.folder / 'run.log'})"
    if isinstance(error, StageError):
        state = "oom" if _out_of_memory(error) else "failed"
        return _Ending(state, error.stage, f"{_process()}{error} {more}")
    return _Ending("failed", START, f"{_process()}{reason_of(error)} {more}")


def _record_ending(run: Run, ending: _Ending, error: Exception) -> None:
    """Write the traceback of anything but a refusal into run.log, then status.json."""
    if ending.stage != CONFIG:
        with (run.folder / "run.log").open("a") as file:
            traceback.print_exception(error, file=file)
    run.mark(ending.state, stage=ending.stage, error=ending.error)


def _recorded(run: Run) -> bool:
    """Whether the end of the run is recorded. An error of one process also occurs in the first
    one, which records it, or makes that process wait: then the other process records the error.
    """
    try:
        return run.wait_until_ended(within=0 if is_first() else RECORD_SECONDS)
    except ConfigError:  # status.json is damaged, and is now written again
        return False


def _process() -> str:
    return "" if is_first() else f"process {rank()}: "


def _out_of_step(error: Exception) -> bool:
    from emloc.runtime.stage_cache import OutOfStepError

    return isinstance(error, OutOfStepError)


def _out_of_memory(error: StageError) -> bool:
    """Whether memory ran out: of the device, of Python, or of torch on a CPU (a RuntimeError)."""
    words = ("OutOfMemory", "MemoryError", "can't allocate memory")
    return any(word in str(error) for word in words)


def _build(cfg: DictConfig) -> RunConfig:
    quiet()
    from emloc.stages.run_config import build  # imports torch, so it comes after all quick checks

    return build(cfg)


def _work(cfg: DictConfig, run: Run, record: Record) -> dict[str, Any]:
    """Run the stages; return the results and collect the files of the run's folder."""
    run_config = _build(cfg)
    record.follow(run_config.tracker)
    result = _pipeline(run_config, lambda step, values: record.add(training_line(step, values)))
    metrics = _metrics(run_config, result)
    _collect(run_config, result, run.folder)
    for line in _lines(
        run_config, result, record.last, (run.folder / "config.yaml").stat().st_mtime
    ):
        record.add(line)
    return metrics


def _lines(
    run_config: RunConfig, result: Result, last: int, begun: float
) -> Iterator[dict[str, float]]:
    """Lines to record: of the training those after step `last`, then one of each stage.

    A stage that finished before this run began (`begun`, in seconds since 1970) is `cached`.
    """
    if result.trained:
        for step, values in _training_values(result.trained.folder):
            if step > last:
                yield training_line(step, values)
    for name, artifact in result.stages.items():
        called = run_config.stage[name].logged_as or name
        yield stage_line(called, {**artifact.facts, "cached": artifact.finished < begun})


def _training_values(folder: Path) -> Iterator[tuple[int, Mapping[str, float]]]:
    """Yield step and numbers of each line of a training's log, and of each pass of its anchors."""
    from emloc.stages.training.rounds import ROUNDS_FILE, pass_values

    passes = folder / ROUNDS_FILE
    for text in passes.read_text().splitlines() if passes.exists() else ():
        line = json.loads(text)
        if values := pass_values(line):
            yield line["step"], values
    for text in (folder / "curve.jsonl").read_text().splitlines():
        values = json.loads(text)
        yield values["step"], values


def _pipeline(run_config: RunConfig, report: Report) -> Result:
    from emloc.pipeline import run
    from emloc.runtime.stage_cache import open_store
    from emloc.sweeps.own_gpu import run_on_own_gpu

    is_sharded()  # refuses wrong settings now, before the emulator is built
    store = open_store()
    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    keeper = _kept_trainee() if in_sweep else None
    return run_on_own_gpu(
        run_config, store.root / "devices", lambda: run(run_config, store, report, keeper)
    )


@cache
def _kept_trainee() -> KeptTrainee:
    """What one job of this process has loaded for the next one."""
    from emloc.stages.training.kept_trainee import KeptTrainee

    return KeptTrainee()


def _metrics(run_config: RunConfig, result: Result) -> dict[str, Any]:
    from emloc.runtime.provenance import provenance
    from emloc.stages.counted_work import work_of_stages

    scores = result.evaluated.facts["scores"]
    if result.metric not in scores:
        names = ", ".join(scores)
        raise ConfigError(f"task.metric={result.metric} is no score of this run; there is {names}")
    stages, trained = result.stages, result.trained
    return {
        "method": run_config.method,
        "metric": result.metric,
        "score": scores[result.metric],
        "scores": scores,
        **_as_trained(result),
        "emulator": _own(stages["emulate"]),
        **identities(run_config),
        "processes": world_size(),
        "trainable": trained.facts["trainable"] if trained else 0,
        "step_seconds": trained.facts["step_seconds"] if trained else None,
        "recovery": _own(stages["recover"]) if "recover" in stages else {},
        "facts": {
            **{name: _own(one) for name, one in stages.items() if name not in _NAMED_STAGES},
            **_facts_of_rounds(trained),
        },
        "seconds": {name: stage.facts["seconds"] for name, stage in stages.items()},
        "peak_gib": {name: stage.facts["peak_gib"] for name, stage in stages.items()},
        **work_of_stages(run_config, stages),
        "stages": {name: stage.key for name, stage in stages.items()},
        "calibration": result.samples,
        "provenance": provenance(),
    }


def _own(stage: Artifact) -> dict[str, Any]:
    """Facts that this stage alone reports; the results store common ones elsewhere."""
    common = ("seconds", "peak_gib", "samples", "row_forwards", "weights_read")
    return {name: value for name, value in stage.facts.items() if name not in common}


def _facts_of_rounds(trained: Artifact | None) -> dict[str, Any]:
    """Facts of an anchored training: passes of the original, and rounds that were rejected."""
    names = ("passes", "rejected_rounds")
    facts = {n: trained.facts[n] for n in names if n in trained.facts} if trained else {}
    return {"train": facts} if facts else {}


def _as_trained(result: Result) -> dict[str, Any]:
    """Scores of the model as it was trained, where its weights are in a packed format."""
    return {"scores_as_trained": result.as_trained.facts["scores"]} if result.as_trained else {}


def _collect(run_config: RunConfig, result: Result, folder: Path) -> None:
    """Copy adapters, and the files that each stage names, from the store to the run's folder.

    Runs share an adapter in the store if their models have the same content. The copies name the
    model that this run has read, for PEFT and other libraries.
    """
    from emloc.adapters.saved import copy_adapter, name_base

    if result.trained and result.recovered:
        source = run_config.emulator.model(run_config.model, run_config.compression).open()
        for artifact, name in ((result.trained, "adapter_trained"), (result.recovered, "adapter")):
            copy_adapter(artifact.folder / "adapter", folder / name)
            name_base(folder / name, source.base or source.name, source.base_revision)
    for stage, artifact in result.stages.items():
        for file, target in run_config.stage[stage].collected.items():
            if (artifact.folder / file).exists():
                shutil.copyfile(artifact.folder / file, folder / target)
