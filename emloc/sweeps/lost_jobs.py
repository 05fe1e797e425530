"""What becomes of a sweep when the process of a cell is killed: by the system for want of memory,
by a scheduler, or because it crashed in a library.

Launchers would end the whole sweep there, and the cell would be called running for ever.
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

# In the place of a stage: which one it was in is in the run's log.
KILLED = "killed"


class Launcher(Protocol):
    """A launcher of Hydra's behind its setup."""

    config: DictConfig | None
    hydra_context: HydraContext | None

    def launch(self, job_overrides: Sequence[Overrides], initial_job_idx: int) -> Any:
        """Run these jobs, numbered from there on, and wait for all of them."""


@dataclass
class Lost(JobReturn):
    """Stands for the result of a job whose process was killed."""

    why: str = ""  # of the process
    out_of_memory: bool = False


@dataclass(frozen=True)
class Job:
    """One cell of a launch, as the process that launches sees it."""

    number: int
    config: DictConfig
    context: HydraContext

    @classmethod
    def of(cls, launcher: Launcher, overrides: Overrides, number: int) -> Job:
        """Compose it as its own process does."""
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
        """Its folder."""
        return Run(Path(self.config.hydra.runtime.output_dir))

    def state(self, since: float) -> str:
        """How it went in a launch of that time; empty if it was not begun."""
        status = self.run.status
        return status["state"] if self.run.done or status.get("time", 0) >= since else ""

    def found(self) -> JobReturn:
        """The result that its process did not come to hand over, from its folder."""
        return self._returned(float(self.run.metrics["score"]) if self.run.done else None)

    def buried(self, lost: Lost, since: float) -> JobReturn:
        """Its end is recorded as its process would have, unless that has."""
        if self.state(since) in ("", RUNNING):
            run, error = self.run, f"its process {lost.why}"
            if not self.state(since):
                begin(run, self._settings(), self.config.hydra.runtime.choices)
            run.mark("oom" if lost.out_of_memory else "failed", stage=KILLED, error=error)
            log.error("%s: %s", run.folder.name, error)
        returned = self._returned(None)
        self.context.callbacks.on_job_end(config=self.config, job_return=returned)
        return returned

    def _settings(self) -> DictConfig:
        """What its process is given."""
        settings = copy.deepcopy(self.config)
        with read_write(settings), open_dict(settings):
            del settings["hydra"]
        return settings

    def _returned(self, score: float | None) -> JobReturn:
        overrides = OmegaConf.to_container(self.config.hydra.overrides.task)
        assert isinstance(overrides, list)
        return JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=score)


def go_on(
    launcher: Launcher, jobs: Sequence[Overrides], first: int, since: float, lost: Lost
) -> list[JobReturn]:
    """The results of a launch whose worker processes all ended because one of them was killed.

    What was not begun is launched again. Then what they were at, each alone: so it is known whose
    process it was, or there was no room for them side by side, and it works.
    """
    cells = [Job.of(launcher, overrides, first + i) for i, overrides in enumerate(jobs)]
    if len(cells) == 1:
        return [cells[0].buried(lost, since)]
    states = [cell.state(since) for cell in cells]
    waiting = [i for i, state in enumerate(states) if not state]
    begun = [i for i, state in enumerate(states) if state == RUNNING]
    returned = {i: cells[i].found() for i, state in enumerate(states) if state not in ("", RUNNING)}
    alone = begun or waiting
    names = ", ".join(cells[i].run.folder.name for i in alone)
    log.warning("a worker %s; to be run again alone: %s", lost.why, names)
    number = first + len(jobs)
    for group in [waiting if begun else [], *([i] for i in alone)]:
        if group:
            again = launcher.launch([jobs[i] for i in group], number)
            returned |= dict(zip(group, again, strict=True))
            number += len(group)
    return [returned[i] for i in range(len(jobs))]
