"""The folder of one run: its settings, how it is going, and its results. Imports no torch."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from emloc.config.paths import plugin_folders
from emloc.config.settings import DECISIVE, SECTIONS
from emloc.config.stage_order import standard_stages
from emloc.runtime.atomic import write_json
from emloc.runtime.digest import digest
from emloc.runtime.distributed import LOOK, process_start, world_size
from emloc.runtime.keys import class_name, without_neutral
from emloc.runtime.quiet_libraries import quiet

log = logging.getLogger("emloc")

DONE, RUNNING = "done", "running"


@dataclass(frozen=True)
class Run:
    """One run's folder.

    config.yaml: resolved settings. status.json: running, done, oom, failed or interrupted.
    metrics.json: results. metrics.jsonl: every number as it came
    (`emloc.report.tracking.metrics_log`).
    """

    folder: Path

    @property
    def status(self) -> dict[str, Any]:
        """The last status written; empty for a run that never began."""
        return _read(self.folder / "status.json")

    @property
    def metrics(self) -> dict[str, Any]:
        """The results; empty until the run is done."""
        return _read(self.folder / "metrics.json")

    @property
    def config(self) -> dict[str, Any]:
        """The resolved settings."""
        return _plain(OmegaConf.load(self.folder / "config.yaml"))

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.status.get("state") == DONE

    def begin(self, config: DictConfig, choices: dict[str, str]) -> None:
        """Record settings, the choice of each group, and the start."""
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, self.folder / "config.yaml", resolve=True)
        write_json(self.folder / "choices.json", choices)
        self.mark(RUNNING)

    @property
    def choices(self) -> dict[str, str]:
        """Group -> choice, as on the command line."""
        return _read(self.folder / "choices.json")

    def mark(self, state: str, **more: Any) -> None:
        """Record how the run is going."""
        write_json(self.folder / "status.json", {"state": state, "time": time.time(), **more})

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Work on it in this process alone; wait as long as another one does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s: waiting for another process that works on this run", self.folder.name)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def ended(self, within: float) -> bool:
        """Wait at most `within` seconds until the first process has recorded how its run ended.

        What was recorded before this launch was started does not count.
        """
        latest = time.monotonic() + within
        while (status := self.status).get("state", RUNNING) == RUNNING or status[
            "time"
        ] < process_start():
            if time.monotonic() >= latest:
                return False
            time.sleep(LOOK)
        return True

    def finish(self, metrics: dict[str, Any]) -> None:
        """Record the results, then that they are complete."""
        write_json(self.folder / "metrics.json", metrics)
        self.mark(DONE)


def find_runs(folder: Path) -> list[Run]:
    """The runs directly below `folder`, or `folder` itself if it is one."""
    if (folder / "status.json").exists():
        return [Run(folder)]
    return [Run(path.parent) for path in sorted(folder.glob("*/status.json"))]


def folder_name(config: DictConfig) -> str:
    """`<method>-<model>-<task>-s<seed>-<id>`: the same settings give the same folder."""
    # What was left open is not named: a section that is new changes no folder of before.
    chosen = {name: _plain(config[name]) for name in DECISIVE}
    decisive = {name: _meaning(name, one) for name, one in chosen.items() if one is not None}
    if decisive["stage"] == _meaning("stage", standard_stages()):
        del decisive["stage"]
    if config.compression.ratio is None:  # compression=auto: the budget decides it
        decisive["gpu_gib"] = config.budget.gpu_gib
    if world_size() > 1:  # they share a step of the training, which is the larger for it
        decisive["processes"] = world_size()
    words = (config.method, config.model.name, config.task.name, f"s{config.seed}")
    return "-".join([*words, digest(decisive)[:8]])


def _meaning(name: str, value: Any) -> Any:
    """A section without what says nothing: where its class lies, and settings that are neutral."""
    if name == "stage":
        return {stage: _without(one, ("counted", "column")) for stage, one in value.items()}
    fixed = SECTIONS.get(name)
    return _without(value) if fixed is None else without_neutral(value, fixed)


def _without(value: Any, names: Sequence[str] = ()) -> Any:
    if not isinstance(value, Mapping):
        return value
    kept = {key: _without(one) for key, one in value.items() if key not in names}
    target = kept.pop("_target_", None)
    if target is None:
        return kept
    cls = _class_of(str(target))
    if cls is None:  # which is refused in a moment, by what builds the parts
        return {"part": target, **kept}
    return {"part": class_name(cls), **without_neutral(kept, cls)}


def _class_of(target: str) -> type | None:
    plugin_folders()
    quiet()  # what is imported with a part may remark upon it
    try:
        return get_class(target)
    except ImportError:
        return None


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return value
