"""Where a run's numbers also go. The run folder is the record; this is a mirror of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from emloc.config.run_folder import DONE, Run, find_runs
from emloc.errors import ConfigError
from emloc.report.tracking.artifacts import pictures_of, table_of_runs, tables_of_run
from emloc.report.tracking.wandb_run import WandbRun
from emloc.runtime.distributed import process_start

log = logging.getLogger("emloc")

# Names `<stage>/<what>` and their values; null where a value is not finite.
Line = Mapping[str, float | None]

# What the training's numbers are drawn over.
STEP = "train/step"

MODES = ("offline", "online")

# A run that failed ends with 1; as a program that was interrupted does.
_EXIT = {DONE: 0, "interrupted": 130}


class Session(Protocol):
    """One run being followed."""

    def log(self, line: Line) -> None:
        """Add one line of numbers."""

    def close(self, status: Mapping[str, Any]) -> None:
        """End as the run did, with what its folder holds by now."""


class Tracker(Protocol):
    """A place that follows runs."""

    def start(self, folder: Path, config: Mapping[str, Any], last: int) -> Session:
        """Begin to follow a run, or go on; its training is recorded up to step `last`.

        It will be told all that is recorded, so of a run it knows what it has heard before.
        """

    def compare(self, folder: Path, group: str) -> None:
        """Show the runs below `folder` side by side."""


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """No tracking."""

    def start(self, folder: Path, config: Mapping[str, Any], last: int) -> Nothing:
        """Nothing is started."""
        return self

    def log(self, line: Line) -> None:
        """Nothing is logged."""

    def close(self, status: Mapping[str, Any]) -> None:
        """Nothing is ended."""

    def compare(self, folder: Path, group: str) -> None:
        """Nothing is shown."""


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases: group = experiment, name = run folder, config = the resolved settings.

    All that it writes is in `wandb/` of the folder it follows.
    """

    project: str  # project of W&B
    entity: str | None  # user or team; null: WANDB_ENTITY, else the account's own
    mode: str  # offline: files in the run folder, no account, no network; online
    adapter: bool  # also keep the carried adapter, as an artifact

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(
                f"tracker.mode={self.mode}: one of {', '.join(MODES)}; "
                "set tracker.mode=offline, or tracker=none"
            )

    def start(self, folder: Path, config: Mapping[str, Any], last: int) -> WandbSession:
        """Open the run; an interrupted one is continued, and not told twice what it knows.

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
        return WandbSession(run, folder, run.known(STEP, last), self.adapter)

    def compare(self, folder: Path, group: str) -> None:
        """One more run in the group, called report, with the table of all and its figures."""
        try:
            run = self._open(folder, group=group, name="report", job_type="report")
            try:
                run.show_tables({"runs": table_of_runs(folder)})
                with pictures_of(folder) as pictures:
                    run.show_pictures(pictures)
            finally:
                run.end(0)
        except Exception as error:  # why: the runs are done, whatever comes of their mirror
            log.warning(
                "tracker: the comparison of the runs was not logged: %s: %s",
                type(error).__name__,
                error,
            )

    def _open(self, folder: Path, **described: Any) -> WandbRun:
        return WandbRun(folder, self.mode, project=self.project, entity=self.entity, **described)


def compare(folder: Path) -> None:
    """Show the runs below `folder` side by side, where the last of them was followed.

    Not if none has been done in this launch: nothing would be new.
    """
    new = [run for run in find_runs(folder) if run.done and run.status["time"] >= process_start()]
    if new:
        config = max(new, key=lambda run: run.status["time"]).config
        settings = dict(config["tracker"])
        module, _, name = settings.pop("_target_").rpartition(".")
        tracker: Tracker = getattr(import_module(module), name)(**settings)
        tracker.compare(folder, config["name"])


class WandbSession:
    """A run in W&B that has heard of its training up to step `told`."""

    def __init__(self, run: WandbRun, folder: Path, told: int, adapter: bool) -> None:
        self._run, self._folder, self._told, self._adapter = run, folder, told, adapter

    def log(self, line: Line) -> None:
        """Send one line of numbers, unless it was sent before an interruption."""
        step = line.get(STEP)
        if step is None or step > self._told:
            self._run.log(line)

    def close(self, status: Mapping[str, Any]) -> None:
        """Send how it ended, and of a run that is done tables, figures and adapter."""
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
