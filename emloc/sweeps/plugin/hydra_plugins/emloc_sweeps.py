"""Launchers and sweepers for which a job that is killed or fails is one of many.

Hydra takes them from this package alone. Each builds upon a plugin that need not be installed.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from hydra.core.utils import JobReturn

log = logging.getLogger("emloc")

Jobs = Sequence[Sequence[str]]

if find_spec("hydra_plugins.hydra_joblib_launcher"):
    from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher

    class Joblib(JoblibLauncher):
        """Worker processes of this machine, each for one cell after the other."""

        def launch(self, job_overrides: Jobs, initial_job_idx: int) -> Sequence[JobReturn]:
            """Run them, `n_jobs` at a time."""
            since = time.time()
            try:
                return super().launch(job_overrides, initial_job_idx)
            except BrokenProcessPool as error:
                from emloc.sweeps.lost_jobs import Lost, go_on

                codes = re.search(r"exit codes? of the workers are \{(.*)\}", str(error))
                lost = Lost(why=f"was killed ({codes[1]})" if codes else "ended")
                return go_on(self, job_overrides, initial_job_idx, since, lost)


if find_spec("hydra_plugins.hydra_submitit_launcher"):
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import (
        LocalLauncher,
        SlurmLauncher,
    )

    class _Patient:
        """Every job is waited for, and one that was killed is recorded."""

        def launch(self, job_overrides: Jobs, initial_job_idx: int) -> Sequence[JobReturn]:
            """Submit them all."""
            from emloc.sweeps.lost_jobs import Job, Lost

            since = time.time()
            with _lost_jobs_return():
                returned = list(super().launch(job_overrides, initial_job_idx))  # type: ignore[misc]
            for i, one in enumerate(returned):
                if isinstance(one, Lost):
                    job = Job.of(self, job_overrides[i], initial_job_idx + i)  # type: ignore[arg-type]
                    returned[i] = job.buried(one, since)
            return returned

    @contextmanager
    def _lost_jobs_return() -> Iterator[None]:
        """A job without a result gives `Lost` where submitit would leave the others behind."""
        import submitit

        from emloc.sweeps.lost_jobs import Lost

        results = submitit.Job.results

        def whatever(job: Any) -> list[Any]:
            try:
                return results(job)
            except submitit.core.utils.UncompletedJobError:
                memory = job.state.upper().startswith("OUT_OF_ME")
                why = f"ended without a result ({job.state}; more in {job.paths.stderr})"
                return [Lost(why=why, out_of_memory=memory)]

        submitit.Job.results = whatever
        try:
            yield
        finally:
            submitit.Job.results = results

    class Local(_Patient, LocalLauncher):
        """A process of this machine for each cell, all at once."""

    class Slurm(_Patient, SlurmLauncher):
        """A job of an array for each cell."""


if find_spec("hydra_plugins.hydra_optuna_sweeper"):
    from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper

    # It remarks upon being imported, which the sampler does before its sweeper is made.
    logging.getLogger("alembic").setLevel(logging.WARNING)

    class Search(OptunaSweeper):
        """Optuna's trials; one without a score is passed over."""

        def __init__(self, **settings: Any) -> None:
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)  # it colours what is no terminal
            super().__init__(**settings)

        def sweep(self, arguments: list[str]) -> None:
            """Run the trials and write the best of them."""
            try:
                super().sweep(arguments)
            except ValueError as error:
                if "No trials are completed" not in str(error):
                    raise
                log.error("no trial gave a score")
