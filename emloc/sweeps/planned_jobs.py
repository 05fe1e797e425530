"""The jobs that a sweep will run, as they are known before they start."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from emloc.config.experiments import split_sweep
from emloc.config.run_folder import Run, find_runs
from emloc.errors import ConfigError
from emloc.runtime.distributed import process_start
from emloc.sweeps.progress import JobKind


@dataclass(frozen=True)
class PlannedJobs:
    """All jobs of a sweep. They are composed when their kinds are asked for, as that takes time."""

    config: DictConfig  # of the sweep

    @cached_property
    def total(self) -> int | None:
        """Number of jobs; None if the sweeper does not say it beforehand."""
        sweeper = self.config.hydra.sweeper
        if "n_trials" in sweeper:
            return int(sweeper.n_trials)
        return None if self._overrides is None else len(self._overrides)

    def kinds(self, started: Collection[int]) -> list[JobKind | None]:
        """Kinds of the jobs that are not `started` (by number) and will not be skipped.

        None is a job that the sweeper has not chosen yet or that cannot be composed.
        """
        if self._overrides is None:
            return [None] * max((self.total or 0) - len(started), 0)
        waiting = [job for number, job in enumerate(self._composed) if number not in started]
        # Jobs that start again because their worker was killed have numbers above all others.
        waiting = waiting[: max(len(self._overrides) - len(started), 0)]
        folder = Path(self.config.hydra.sweep.dir)
        if not any(run.done and run.status["time"] < process_start() for run in find_runs(folder)):
            return [_kind(job) for job in waiting]
        return [_kind(job) for job in waiting if not _is_done(job)]

    @cached_property
    def _overrides(self) -> list[list[str]] | None:
        """The overrides of each job of the basic sweeper, in its order."""
        if not self.config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            return None
        try:
            loader = GlobalHydra.instance().config_loader()
            return split_sweep([*_swept(self.config)], loader)
        except HydraException:  # the sweeper itself refuses this kind of sweep in a moment
            return None

    def composed(self) -> Iterator[DictConfig | None]:
        """Compose one job after the other; None for a job that cannot be composed."""
        for overrides in self._overrides or ():
            yield _compose(self.config, overrides)

    @cached_property
    def _composed(self) -> list[DictConfig | None]:
        return list(self.composed())


def _swept(config: DictConfig) -> Iterator[str]:
    """Overrides that the basic sweeper splits: the experiment's, then the command line's."""
    for key, value in (config.hydra.sweeper.params or {}).items():
        yield f"{key}={value}"
    yield from config.hydra.overrides.task


def _compose(config: DictConfig, overrides: list[str]) -> DictConfig | None:
    try:
        return GlobalHydra.instance().config_loader().load_sweep_config(config, overrides)
    except (HydraException, OmegaConfBaseException):  # the job itself reports it
        return None


def _kind(config: DictConfig | None) -> JobKind | None:
    return None if config is None else JobKind.of(config)


def _is_done(config: DictConfig | None) -> bool:
    """Whether an earlier launch finished the job, so that this one skips it."""
    try:
        return config is not None and _run(config).done
    except (ConfigError, OmegaConfBaseException):  # the job itself reports it
        return False


def _run(config: DictConfig) -> Run:
    return Run(Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir)
