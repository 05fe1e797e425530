"""What is said at the end of a run or a sweep, and the exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from emloc.ranks import born, first, hush
from emloc.report.markdown import table
from emloc.runs import DONE, RUNNING, Run, find_runs

FAILED, REFUSED = 1, 2


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
        self._close(Path(config.hydra.sweep.dir))

    def _close(self, folder: Path) -> None:
        bad = [run for run in find_runs(folder) if _bad(run)]
        if (folder / "status.json").exists() and bad:
            sys.exit(_code(bad))  # one run, and its one line has been said
        if first():
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
