"""Hydra callback that refuses wrong settings before the folder of a run is made."""

from __future__ import annotations

import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from emloc.config.check import check_settings
from emloc.errors import ConfigError
from emloc.runtime.distributed import is_first
from emloc.runtime.quiet_libraries import quiet
from emloc.sweeps.callbacks import REFUSED
from emloc.sweeps.planned_jobs import PlannedJobs


class FirstCheck(Callback):
    """Check settings, first without torch and then, of a single run, with the parts' own checks.

    A sweep is refused if all of its jobs are. Otherwise a job with wrong settings records in its
    folder why it was refused, and the others go on.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Print one line and end the process if the settings are wrong."""
        settings = _without_hydra(config)
        try:
            check_settings(settings)
            quiet()
            from emloc.stages.run_config import build  # imports torch, which the run needs anyway

            build(settings)
        except ConfigError as error:
            _refuse(error)
        except Exception:  # why: it is no refusal, and the run itself records and reports it
            return

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Print one line and end the process if the settings of all jobs are wrong."""
        errors = []
        for job in PlannedJobs(config).composed():
            try:
                if job is None:
                    return
                check_settings(_without_hydra(job))
            except ConfigError as error:
                errors.append(error)
            else:
                return
        if errors:
            _refuse(errors[0])


def _without_hydra(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _refuse(error: ConfigError) -> None:
    """End the process with a line; Hydra turns other exceptions of a callback into warnings."""
    if is_first():
        print(f"emloc: {error}", file=sys.stderr)
    sys.exit(REFUSED)
