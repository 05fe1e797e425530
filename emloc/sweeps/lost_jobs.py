"""How a sweep goes on when the process of a job is killed: by the system for want of memory, by a
scheduler, or because it crashed in a library.

Launchers of Hydra would end the whole sweep, and the status of the job would stay `running`.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from emloc.config.run_folder import RUNNING, Run
from emloc.sweeps.job import begin

log = logging.getLogger("emloc")

Overrides = Sequence[str]

# Stands in place of the stage, which only the run's log tells.
KILLED = "killed"


class Launcher(Protocol):
    """A launcher of Hydra that is set up."""

    config: DictConfig | None
    hydra_context: HydraContext | None

    def launch(self, job_overrides: Sequence[Overrides], initial_job_idx: int) -> Any:
        """Run the jobs, numbered from `initial_job_idx`, and wait for all of them."""


@dataclass
class LostJob(JobReturn):
    """Placeholder for the result of a job whose process was killed."""

    reason: str = ""  # a predicate: "was killed (SIGKILL)"
    out_of_memory: bool = False


@dataclass(frozen=True)
class Job:
    """One job of a launch, as the launching process sees it."""

    number: int
    config: DictConfig
    context: HydraContext

    @classmethod
    def of(cls, launcher: Launcher, overrides: Overrides, number: int) -> Job:
        """Compose the job as its own process does."""
        assert launcher.config is not None
        assert launcher.hydra_context is not None
        loader = launcher.hydra_context.config_loader
        config = loader.load_sweep_config(launcher.config, list(overrides))
        folder = os.path.join(config.hydra.sweep.dir, config.hydra.sweep.subdir)
        with read_write(config), open_dict(config):
            config.hydra.job.num = number
            config.hydra.runtime.output_dir = os.path.abspath(folder)
        return cls(number, config, launcher.hydra_context)

    @property
    def run(self) -> Run:
        """Folder of the job."""
        return Run(Path(self.config.hydra.runtime.output_dir))

    def state(self, launch_start: float) -> str:
        """State of the job in a launch of that time; empty if the job has not started."""
        status = self.run.status
        is_ours = self.run.done or status.get("time", 0) >= launch_start
        return status["state"] if is_ours else ""

    def stored_result(self) -> JobReturn:
        """The result in the job's folder, which its process could not return."""
        return self._returned(float(self.run.metrics["score"]) if self.run.done else None)

    def record_failure(self, lost: LostJob, launch_start: float) -> JobReturn:
        """Write status.json for a job whose process was killed, unless that process wrote it."""
        if self.state(launch_start) in ("", RUNNING):
            run, error = self.run, f"its process {lost.reason}"
            if not self.state(launch_start):
                begin(run, self._settings(), self.config.hydra.runtime.choices)
            run.mark("oom" if lost.out_of_memory else "failed", stage=KILLED, error=error)
            log.error("%s: %s", run.folder.name, error)
        returned = self._returned(None)
        self.context.callbacks.on_job_end(config=self.config, job_return=returned)
        return returned

    def _settings(self) -> DictConfig:
        """The configuration that the job's process receives."""
        settings = copy.deepcopy(self.config)
        with read_write(settings), open_dict(settings):
            del settings["hydra"]
        return settings

    def _returned(self, score: float | None) -> JobReturn:
        overrides = OmegaConf.to_container(self.config.hydra.overrides.task)
        assert isinstance(overrides, list)
        return JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=score)


def launch_again(
    launcher: Launcher,
    overrides: Sequence[Overrides],
    first: int,
    launch_start: float,
    lost: LostJob,
) -> list[JobReturn]:
    """Finish a launch whose worker processes all ended because one of them was killed.

    Jobs that had not started are launched again. Then each job that was running is launched alone.
    Thus it is known whose process was killed; or memory sufficed for one job, not for two.

    Args:
        launcher: the launcher whose workers ended.
        overrides: of each job of the launch.
        first: number of the first job.
        launch_start: when the launch began, in seconds since 1970.
        lost: why the workers ended.

    Returns:
        The result of each job.
    """
    jobs = [Job.of(launcher, one, first + i) for i, one in enumerate(overrides)]
    if len(jobs) == 1:
        return [jobs[0].record_failure(lost, launch_start)]
    states = [job.state(launch_start) for job in jobs]
    waiting = [i for i, state in enumerate(states) if not state]
    running = [i for i, state in enumerate(states) if state == RUNNING]
    results = {
        i: jobs[i].stored_result() for i, state in enumerate(states) if state not in ("", RUNNING)
    }
    alone = running or waiting
    names = ", ".join(jobs[i].run.folder.name for i in alone)
    log.warning("a worker process %s; these jobs run again, one at a time: %s", lost.reason, names)
    number = first + len(overrides)
    for group in [waiting if running else [], *([i] for i in alone)]:
        if group:
            again = launcher.launch([overrides[i] for i in group], number)
            results |= dict(zip(group, again, strict=True))
            number += len(group)
    return [results[i] for i in range(len(overrides))]
