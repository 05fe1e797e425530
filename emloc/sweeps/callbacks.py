"""What is said during and at the end of a run or a sweep, and the exit code."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Lock, Thread
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from emloc.config.experiments import split_sweep
from emloc.config.run_folder import DONE, RUNNING, Run, find_runs
from emloc.report.tracking.trackers import compare
from emloc.runtime.distributed import born, first, hush
from emloc.sweeps.progress import Tally, line

log = logging.getLogger(__name__)

FAILED, REFUSED = 1, 2

# Seconds between two looks at what the workers have ended.
LOOK = 2.0


class Table(Callback):
    """Print the table behind the last run; leave with 1 if a run failed, 2 if it was refused.

    Of several processes each leaves with that code, and the first prints.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Only the first of several processes says what is run."""
        hush()

    def on_run_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """One run has ended."""
        assert job_return.hydra_cfg is not None
        self._close(Path(job_return.hydra_cfg.hydra.runtime.output_dir))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """All runs of a sweep have ended."""
        if first():
            compare(Path(config.hydra.sweep.dir))
        self._close(Path(config.hydra.sweep.dir))

    def _close(self, folder: Path) -> None:
        bad = [run for run in find_runs(folder) if _bad(run)]
        if (folder / "status.json").exists() and bad:
            sys.exit(_code(bad))  # one run, and its one line has been said
        if first():
            from emloc.report.markdown import table  # it imports pandas, which takes a while

            print(f"\n{table(folder)}\n")
            for run in bad:
                said = run.status.get("error", run.status["state"])
                print(f"{run.folder.name}: {said}", file=sys.stderr)
        if bad:
            sys.exit(_code(bad))


def _bad(run: Run) -> bool:
    """Whether it ended badly in this launch: what was left before it, or goes on, is another's."""
    status = run.status
    return status["state"] not in (DONE, RUNNING) and status["time"] >= born()


def _code(bad: list[Run]) -> int:
    return REFUSED if all(run.status.get("stage") == "config" for run in bad) else FAILED


class Progress(Callback):
    """Say how far a sweep is whenever a cell has ended, whichever process and launcher ran it.

    Launchers send a copy of it to their workers, which keep the tally; the process that was
    started reads it, and is the only one to speak.
    """

    def __init__(self) -> None:
        self._tally: Tally | None = None
        self._watch: Watch | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_tally": self._tally, "_watch": None}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Nothing has been done yet."""
        if first():
            sweep = Path(config.hydra.sweep.dir)
            sweep.mkdir(parents=True, exist_ok=True)
            self._watch = Watch(sweep, cells_of(config))
            self._tally = self._watch.tally
            if not config.hydra.launcher._target_.endswith(".BasicLauncher"):
                self._watch.start()

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """A cell is begun, in this process."""
        if self._tally is not None:
            run = Run(Path(config.hydra.runtime.output_dir))
            self._tally.begin(config.hydra.job.num, run.folder.name, run.done)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """It has ended."""
        if self._tally is not None:
            run = Run(Path(config.hydra.runtime.output_dir))
            whole = job_return.status == JobStatus.COMPLETED
            state = run.status["state"] if whole else "failed"
            self._tally.end(config.hydra.job.num, run.folder.name, state)
        if self._watch is not None:
            self._watch.look()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """All have ended."""
        if self._watch is not None:
            self._watch.end()


class Watch:
    """The tally of this launch, and a line about it whenever it has changed."""

    def __init__(self, sweep: Path, total: int | None) -> None:
        self._total = total
        self._folder = TemporaryDirectory(prefix=".tally-", dir=sweep.resolve())
        self.tally = Tally(Path(self._folder.name))
        self._said = 0
        self._one_at_a_time = Lock()
        self._over = Event()

    def start(self) -> None:
        """Look every now and then from here on."""
        Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not self._over.wait(LOOK):
            self.look()

    def look(self) -> None:
        """Say how far it is, if that is something new."""
        with self._one_at_a_time:
            if self._over.is_set():
                return
            stints = self.tally.stints()
            ended = sum(stint.ended is not None for stint in stints)
            if ended != self._said:
                log.info("%s", line(stints, self._total, time.time()))
                self._said = ended

    def end(self) -> None:
        """Say it for the last time."""
        self.look()
        with self._one_at_a_time:
            self._over.set()
            self._folder.cleanup()


def cells_of(config: DictConfig) -> int | None:
    """How many cells a sweep has; None if its sweeper does not say so beforehand."""
    sweeper = config.hydra.sweeper
    if "n_trials" in sweeper:
        return int(sweeper.n_trials)
    if not sweeper._target_.endswith(".BasicSweeper"):
        return None
    try:
        return len(split_sweep([*_swept(config)], GlobalHydra.instance().config_loader()))
    except HydraException:  # a kind of sweep that it refuses itself in a moment
        return None


def _swept(config: DictConfig) -> Iterator[str]:
    """What the basic sweeper is given: what an experiment sweeps, then the command line."""
    for key, value in (config.hydra.sweeper.params or {}).items():
        yield f"{key}={value}"
    yield from config.hydra.overrides.task
