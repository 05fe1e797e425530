"""Trackers, which mirror the results of runs. The run folder stays the record."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

from emloc.config.named_class import import_named
from emloc.config.run_folder import DONE, Run, find_runs
from emloc.config.values import Checked, OneOf
from emloc.errors import ConfigError
from emloc.report.tracking.artifacts import pictures_of, table_of_runs, tables_of_run
from emloc.report.tracking.wandb_run import WandbRun
from emloc.runtime.distributed import process_start

log = logging.getLogger("emloc")

# `<stage>/<quantity>` -> value, None where the value is not finite.
Line = Mapping[str, float | None]

# Horizontal axis of all training numbers.
STEP = "train/step"

# By so many seconds the clock of another machine may be ahead. A later status is made up.
CLOCK_SECONDS = 3600

# Exit codes by state; 1 for a run that failed.
_EXIT = {DONE: 0, "interrupted": 130}


class Session(Protocol):
    """One run that is tracked."""

    def log(self, line: Line) -> None:
        """Add one line of numbers."""

    def close(self, status: Mapping[str, Any]) -> None:
        """Close with the status of the run, and send the results in its folder."""


class Tracker(Protocol):
    """A service that mirrors runs."""

    def start(self, folder: Path, config: Mapping[str, Any], last: int) -> Session:
        """Open or resume the tracking of a run whose log reaches training step `last`; -1: none.

        All lines of the log are sent again. A tracker that resumes must skip those it already has.
        """

    def compare(self, folder: Path, group: str) -> None:
        """Show the runs in `folder` side by side."""


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """No tracking."""

    def start(self, folder: Path, config: Mapping[str, Any], last: int) -> Nothing:
        """Return itself; nothing is tracked."""
        return self

    def log(self, line: Line) -> None:
        """Ignore the line."""

    def close(self, status: Mapping[str, Any]) -> None:
        """Do nothing."""

    def compare(self, folder: Path, group: str) -> None:
        """Do nothing."""


@dataclass(frozen=True, kw_only=True)
class Wandb(Checked):
    """Weights & Biases: group = experiment, name = run folder, config = the resolved settings.

    All of its files are in `wandb/` of the run folder.
    """

    section: ClassVar[str] = "tracker"

    project: str  # project of W&B
    entity: str | None  # user or team; null: WANDB_ENTITY, else the account's own
    # offline: files in the run folder, no account, no network; online
    mode: Annotated[str, OneOf("offline", "online")]
    adapter: bool  # also upload the recovered adapter as an artifact

    def start(self, folder: Path, config: Mapping[str, Any], last: int) -> WandbSession:
        """Open the run. An interrupted run is resumed, and lines that it has are not sent again.

        Raises:
            ConfigError: wandb is not installed, or there is no account to go online with.
        """
        run = self._open(
            folder,
            group=config["name"],
            name=folder.name,
            job_type=config["method"],
            tags=[config["model"]["name"], config["task"]["name"]],
            config=dict(config),
        )
        run.draw_over("train/*", STEP)
        return WandbSession(run, folder, run.last_sent(STEP, last), self.adapter)

    def compare(self, folder: Path, group: str) -> None:
        """Add a run called `report` to the group, with the table and the figures of all runs."""
        try:
            run = self._open(folder, group=group, name="report", job_type="report")
            try:
                run.show_tables({"runs": table_of_runs(folder)})
                with pictures_of(folder) as pictures:
                    run.show_pictures(pictures)
            finally:
                run.end(0)
        except Exception as error:  # why: the runs are done, and the tracker is only their mirror
            log.warning(
                "tracker: the comparison of the runs was not logged: %s: %s",
                type(error).__name__,
                error,
            )

    def _open(self, folder: Path, **described: Any) -> WandbRun:
        return WandbRun(folder, self.mode, project=self.project, entity=self.entity, **described)


def compare(folder: Path) -> None:
    """Show the runs in `folder` side by side, in the tracker of the last one.

    Nothing happens if this launch has finished no run, since nothing would be new. The folder may
    also hold runs that somebody else made, so only a tracker of this package or a plug-in is used.
    """
    launch = (process_start(), time.time() + CLOCK_SECONDS)
    new = [
        run
        for run in find_runs(folder)
        if run.done and launch[0] <= run.status["time"] <= launch[1]
    ]
    if new:
        config = max(new, key=lambda run: run.status["time"]).config
        settings = dict(config["tracker"])
        tracker: Tracker = _class_of(str(settings.pop("_target_")))(**settings)
        tracker.compare(folder, config["name"])


def _class_of(target: str) -> type:
    """The class of a tracker.

    Raises:
        ConfigError: there is no such class, or it is of code that is not trusted.
    """
    try:
        cls = import_named(target)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"tracker._target_={target}: {error}") from error
    if not (isinstance(cls, type) and is_dataclass(cls) and hasattr(cls, "compare")):
        raise ConfigError(f"tracker._target_={target}: it is no tracker; set tracker=none")
    return cls


class WandbSession:
    """A run in W&B that has all lines up to training step `sent`."""

    def __init__(self, run: WandbRun, folder: Path, sent: int, adapter: bool) -> None:
        self._run, self._folder, self._sent, self._adapter = run, folder, sent, adapter

    def log(self, line: Line) -> None:
        """Send one line of numbers, unless an earlier attempt sent it."""
        step = line.get(STEP)
        if step is None or step > self._sent:
            self._run.log(line)

    def close(self, status: Mapping[str, Any]) -> None:
        """Send the status, and for a run that is done also tables, figures and the adapter."""
        state = status["state"]
        try:
            self._run.summarise({key: status.get(key, "") for key in ("state", "stage", "error")})
            if state == DONE:
                self._show_results(Run(self._folder).metrics)
        finally:
            self._run.end(_EXIT.get(state, 1))

    def _show_results(self, metrics: Mapping[str, Any]) -> None:
        self._run.summarise({key: metrics[key] for key in ("metric", "score", "provenance")})
        self._run.show_tables(tables_of_run(self._folder))
        adapter = self._folder / "adapter"
        if self._adapter and adapter.exists():
            peft = json.loads((adapter / "adapter_config.json").read_text())
            metadata = {
                "base_model": peft["base_model_name_or_path"],
                "method": metrics["method"],
                metrics["metric"]: metrics["score"],
            }
            self._run.keep(f"adapter-{self._folder.name}", "adapter", adapter, metadata)
        with pictures_of(self._folder) as pictures:
            self._run.show_pictures(pictures)
