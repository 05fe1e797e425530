"""Hydra callbacks: progress of a sweep; table, next steps and exit code at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Lock, Thread
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emloc.config.run_folder import DONE, RUNNING, Run, find_runs, is_run
from emloc.console.next_steps import next_steps
from emloc.errors import ConfigError
from emloc.report.tracking.trackers import compare
from emloc.runtime.distributed import is_first, process_start, silence_other_processes
from emloc.runtime.failures import reason_of
from emloc.runtime.permissions import apply_umask
from emloc.sweeps.job import CONFIG
from emloc.sweeps.planned_jobs import PlannedJobs
from emloc.sweeps.progress import JobKind, SweepProgress, sweep_line

log = logging.getLogger(__name__)

FAILED, REFUSED = 1, 2

POLL_SECONDS = 2.0


class ResultsTable(Callback):
    """Print the table after the last run. Exit with 1 if a run failed, with 2 if it was refused.

    Of several processes each one exits with that code, and the first one prints.
    """

    def __init__(self) -> None:
        self._unrecorded = 0  # jobs of this process that failed and left no record

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Silence all processes but the first."""
        silence_other_processes()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Count a job whose folder cannot say that it failed."""
        self._unrecorded += job_return.status == JobStatus.FAILED

    def on_run_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Close a single run. A failure that is not recorded reaches the command line."""
        assert job_return.hydra_cfg is not None
        if job_return.status == JobStatus.COMPLETED:
            self._close(Path(job_return.hydra_cfg.hydra.runtime.output_dir))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Close a sweep."""
        folder = Path(config.hydra.sweep.dir)
        if is_first():
            _try(f"tracker: the comparison of the runs in {folder}", lambda: compare(folder))
        self._close(folder)

    def _close(self, folder: Path) -> None:
        bad = [run for run in find_runs(folder) if _ended_badly(run)]
        if is_run(folder) and bad:
            sys.exit(_code(bad))  # the one line of a single run is printed already
        is_shown = True
        if is_first():
            is_shown = _try(f"the table of {folder}", lambda: print(f"\n{_table(folder)}\n"))
            for run in bad:
                error = run.status.get("error", run.status["state"])
                print(f"{run.folder.name}: {error}", file=sys.stderr)
            if self._unrecorded:
                print(f"{self._unrecorded} failed without a record, see above", file=sys.stderr)
            is_shown &= _try("the next steps", lambda: print(_next_steps(folder), end=""))
        if self._unrecorded or not is_shown:
            sys.exit(FAILED)
        if bad:
            sys.exit(_code(bad))


def _table(folder: Path) -> str:
    from emloc.report.markdown import table  # it imports pandas, which takes a while

    return table(folder)


def _next_steps(folder: Path) -> str:
    steps = next_steps(folder)
    return f"{steps}\n\n" if steps else ""


def _try(subject: str, action: Callable[[], None]) -> bool:
    """Do what comes after the last run, and return whether it worked; say why it did not.

    Hydra would turn an error into a warning of Python, and the exit code would be 0.
    """
    try:
        action()
    except Exception as error:  # why: the runs have ended, and their exit code counts
        reason = str(error) if isinstance(error, ConfigError) else reason_of(error)
        print(f"emloc: {subject} cannot be shown: {reason}", file=sys.stderr)
        return False
    return True


def _ended_badly(run: Run) -> bool:
    """Whether the run failed in this launch. A run that is older or still running is not ours."""
    try:
        status = run.status
    except ConfigError:  # a damaged folder of an earlier launch, which the table names
        return False
    return status["state"] not in (DONE, RUNNING) and status["time"] >= process_start()


def _code(bad: list[Run]) -> int:
    return REFUSED if all(run.status.get("stage") == CONFIG for run in bad) else FAILED


class ProgressLines(Callback):
    """Log the progress of a sweep when a job has ended, whichever process and launcher ran it.

    Launchers send a copy of this object to their workers, which record their jobs. The process
    that the user started reads the records and is the only one to log.
    """

    def __init__(self) -> None:
        self._progress: SweepProgress | None = None
        self._watcher: ProgressWatcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_progress": self._progress, "_watcher": None}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Begin to watch the jobs."""
        if is_first():
            try:
                sweep = Path(config.hydra.sweep.dir)
                sweep.mkdir(parents=True, exist_ok=True)
                self._watcher = ProgressWatcher(sweep, PlannedJobs(config))
            except (OSError, OmegaConfBaseException):  # the sweep itself fails there in a moment
                return
            self._progress = self._watcher.progress
            if not config.hydra.launcher._target_.endswith("BasicLauncher"):
                self._watcher.start()

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Record that a job has started in this process."""
        if self._progress is not None:
            run = Run(Path(config.hydra.runtime.output_dir))
            number, kind = config.hydra.job.num, JobKind.of(config)
            self._progress.start(number, run.folder.name, kind, run.done)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Record how a job has ended. A job without a folder is not among those that started."""
        if self._progress is not None and not OmegaConf.is_missing(
            config.hydra.runtime, "output_dir"
        ):
            run = Run(Path(config.hydra.runtime.output_dir))
            is_complete = job_return.status == JobStatus.COMPLETED
            state = run.status.get("state", "failed") if is_complete else "failed"
            number, kind = config.hydra.job.num, JobKind.of(config)
            self._progress.end(number, run.folder.name, kind, state)
        if self._watcher is not None:
            self._watcher.look()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Log the last line and remove the records."""
        if self._watcher is not None:
            self._watcher.end()


class ProgressWatcher:
    """Reader of the records of one launch, which logs a line when another job has ended."""

    def __init__(self, sweep: Path, planned: PlannedJobs) -> None:
        self._planned = planned
        self._folder = TemporaryDirectory(prefix=".progress-", dir=sweep.resolve())
        apply_umask(Path(self._folder.name))
        self.progress = SweepProgress(Path(self._folder.name))
        self._ended_jobs = 0  # as of the last line
        self._lock = Lock()
        self._is_over = Event()

    def start(self) -> None:
        """Look every few seconds from now on, in a thread."""
        Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self._is_over.wait(POLL_SECONDS):
            self.look()

    def look(self) -> None:
        """Log the progress if another job has ended."""
        with self._lock:
            if self._is_over.is_set():
                return
            jobs = self.progress.jobs()
            ended = sum(job.end is not None for job in jobs)
            if ended != self._ended_jobs:
                can_estimate = any(job.state == DONE and not job.was_done for job in jobs)
                started = {job.number for job in jobs}
                waiting = self._planned.kinds(started) if can_estimate else []
                log.info("%s", sweep_line(jobs, self._planned.total, time.time(), waiting))
                self._ended_jobs = ended

    def end(self) -> None:
        """Log the last line and remove the records."""
        self.look()
        with self._lock:
            self._is_over.set()
            self._folder.cleanup()
