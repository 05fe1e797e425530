"""Launchers and sweepers that go on when a job is killed or fails.

Hydra finds plugins in this package alone. Each one extends a plugin that need not be installed.
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

from hydra._internal.core_plugins import basic_launcher
from hydra.core.utils import JobReturn, JobStatus

log = logging.getLogger("emloc")

Jobs = Sequence[Sequence[str]]


class OwnBasicLauncher(basic_launcher.BasicLauncher):
    """One job after the other in this process, also after a job that could not start."""

    def launch(self, job_overrides: Jobs, initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs."""
        with _failures_as_results():
            return super().launch(job_overrides, initial_job_idx)


@contextmanager
def _failures_as_results() -> Iterator[None]:
    """Log why a job could not start, such as a folder that cannot be made, and give no score.

    Hydra would end the sweep with the traceback of that job.
    """
    run_job = basic_launcher.run_job

    def run_job_or_log(*, hydra_context: Any, config: Any, **settings: Any) -> JobReturn:
        try:
            returned = run_job(hydra_context=hydra_context, config=config, **settings)
        except Exception as error:  # why: the other jobs go on, whatever is wrong with this one
            _log_not_started(config.hydra.overrides.task, error)
            returned = JobReturn(status=JobStatus.FAILED)
            hydra_context.callbacks.on_job_end(config=config, job_return=returned)
        # A failure is logged, and the callbacks have counted it.
        return _without_score(returned) if returned.status == JobStatus.FAILED else returned

    basic_launcher.run_job = run_job_or_log
    try:
        yield
    finally:
        basic_launcher.run_job = run_job


def _log_not_started(overrides: Sequence[str], error: Exception) -> None:
    """Log why the job with these overrides could not start."""
    from emloc.runtime.failures import reason_of, refusal_of

    reason = refusal_of(error) or reason_of(error)
    log.error("%s: could not start: %s", " ".join(overrides), reason)


def _without_score(returned: JobReturn) -> JobReturn:
    """The result of a failed job as one without a score, which does not end the sweep."""
    return JobReturn(returned.overrides, status=JobStatus.COMPLETED, _return_value=None)


if find_spec("hydra_plugins.hydra_joblib_launcher"):
    from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher

    class Joblib(JoblibLauncher):
        """Worker processes of this machine, each of which runs one job after the other."""

        def launch(self, job_overrides: Jobs, initial_job_idx: int) -> Sequence[JobReturn]:
            """Run the jobs, `n_jobs` at a time."""
            from emloc.runtime.failures import reason_of, refusal_of
            from emloc.sweeps.lost_jobs import LostJob, launch_again

            start = time.time()
            try:
                returned = super().launch(job_overrides, initial_job_idx)
                return [self._without_failure(one) for one in returned]
            except BrokenProcessPool as error:
                codes = re.search(r"exit codes? of the workers are \{(.*)\}", str(error))
                lost = LostJob(reason=f"was killed ({codes[1]})" if codes else "ended")
            except Exception as error:  # why: one job could not start, and the others go on
                if len(job_overrides) == 1:
                    _log_not_started(job_overrides[0], error)
                    return [self._without_failure(JobReturn(status=JobStatus.FAILED))]
                reason = refusal_of(error) or reason_of(error)
                lost = LostJob(reason=f"could not start a job ({reason})")
            return launch_again(self, job_overrides, initial_job_idx, start, lost)

        def _without_failure(self, returned: JobReturn) -> JobReturn:
            """Count a failure that no folder records, and return a result without a score."""
            if returned.status != JobStatus.FAILED:
                return returned
            assert self.hydra_context is not None
            self.hydra_context.callbacks.on_job_end(config=self.config, job_return=returned)
            return _without_score(returned)


if find_spec("hydra_plugins.hydra_submitit_launcher"):
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import (
        LocalLauncher,
        SlurmLauncher,
    )

    class _FailureRecorder:
        """Mixin for a launcher: wait for every job, and record those that were killed."""

        def launch(self, job_overrides: Jobs, initial_job_idx: int) -> Sequence[JobReturn]:
            """Submit all jobs."""
            from emloc.sweeps.lost_jobs import Job, LostJob

            start = time.time()
            with _results_of_lost_jobs():
                returned = list(super().launch(job_overrides, initial_job_idx))  # type: ignore[misc]
            for i, one in enumerate(returned):
                if isinstance(one, LostJob):
                    job = Job.of(self, job_overrides[i], initial_job_idx + i)  # type: ignore[arg-type]
                    returned[i] = job.record_failure(one, start)
            return returned

    @contextmanager
    def _results_of_lost_jobs() -> Iterator[None]:
        """Return a `LostJob` for a job without a result, where submitit would raise an error."""
        import submitit

        from emloc.sweeps.lost_jobs import LostJob

        results = submitit.Job.results

        def results_or_lost(job: Any) -> list[Any]:
            try:
                return results(job)
            except submitit.core.utils.UncompletedJobError:
                memory = job.state.upper().startswith("OUT_OF_ME")
                reason = f"ended without a result ({job.state}; more in {job.paths.stderr})"
                return [LostJob(reason=reason, out_of_memory=memory)]

        submitit.Job.results = results_or_lost
        try:
            yield
        finally:
            submitit.Job.results = results

    class Local(_FailureRecorder, LocalLauncher):
        """A process of this machine for each job, all at once."""

    class Slurm(_FailureRecorder, SlurmLauncher):
        """A Slurm job of an array for each job of the sweep."""


if find_spec("hydra_plugins.hydra_optuna_sweeper"):
    from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper

    # Alembic logs when it is imported, which the sampler does before its sweeper exists.
    logging.getLogger("alembic").setLevel(logging.WARNING)

    class Search(OptunaSweeper):
        """Optuna's trials; a trial without a score is skipped."""

        def __init__(self, **settings: Any) -> None:
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)  # its lines have colour codes
            super().__init__(**settings)

        def sweep(self, arguments: list[str]) -> None:
            """Run the trials and write the best one."""
            try:
                super().sweep(arguments)
            except ValueError as error:
                if "No trials are completed" not in str(error):
                    raise
                log.error("no trial gave a score")
