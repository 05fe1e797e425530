"""The folder of a run, with its settings, status and results. This module imports no torch."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from emloc.config.folder_words import safe_word
from emloc.config.named_class import import_named
from emloc.config.settings import DECISIVE, SECTIONS
from emloc.config.stage_order import standard_stages
from emloc.errors import ConfigError
from emloc.runtime.atomic import write_json
from emloc.runtime.digest import digest
from emloc.runtime.distributed import POLL_SECONDS, process_start, world_size
from emloc.runtime.imports import exempt_imports
from emloc.runtime.keys import class_name, without_neutral
from emloc.runtime.quiet_libraries import quiet

log = logging.getLogger("emloc")

DONE, RUNNING = "done", "running"


@dataclass(frozen=True)
class Run:
    """The folder of one run.

    config.yaml: resolved settings. choices.json: choice of each configuration group.
    status.json: state of the run (running, done, oom, failed or interrupted) and its time.
    metrics.json: results. metrics.jsonl: log of all numbers in order of time
    (`emloc.report.tracking.metrics_log`).
    """

    folder: Path

    @property
    def status(self) -> dict[str, Any]:
        """Content of status.json; empty if the run never began.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self.folder / "status.json"
        status = _read_json(path)
        if status and not (
            isinstance(status.get("state"), str) and isinstance(status.get("time"), int | float)
        ):
            raise _unreadable(path, "it has no state or no time")
        return status

    @property
    def metrics(self) -> dict[str, Any]:
        """Results of the run; empty until the run is done."""
        return _read_json(self.folder / "metrics.json")

    @property
    def config(self) -> dict[str, Any]:
        """Settings of the run as its folder has them: plain values, no reference is followed.

        Raises:
            ConfigError: the file cannot be read.
        """
        path = self.folder / "config.yaml"
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise _unreadable(path, error) from error
        if not isinstance(values, dict):
            raise _unreadable(path, "it has no settings")
        return values

    @property
    def done(self) -> bool:
        """Whether the run has finished and its results are complete."""
        return self.status.get("state") == DONE

    def begin(self, config: DictConfig, choices: dict[str, str]) -> None:
        """Write the settings and the choice of each group, and mark the run as running."""
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, self.folder / "config.yaml", resolve=True)
        write_json(self.folder / "choices.json", choices)
        self.mark(RUNNING)

    @property
    def choices(self) -> dict[str, str]:
        """Choice of each configuration group, as on the command line."""
        return _read_json(self.folder / "choices.json")

    def mark(self, state: str, **more: Any) -> None:
        """Write status.json with the state, the present time and further facts."""
        write_json(self.folder / "status.json", {"state": state, "time": time.time(), **more})

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock of the folder within the block; wait while another process holds it."""
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

    def wait_until_ended(self, within: float) -> bool:
        """Wait at most `within` seconds until status.json says that the run has ended.

        The first process of a launch writes the status. A status from before this launch is
        ignored.

        Returns:
            Whether the run has ended.
        """
        deadline = time.monotonic() + within
        while (status := self.status).get("state", RUNNING) == RUNNING or status[
            "time"
        ] < process_start():
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the results, then mark the run as done."""
        write_json(self.folder / "metrics.json", metrics)
        self.mark(DONE)


def is_run(folder: Path) -> bool:
    """Whether the folder is that of a single run."""
    return (folder / "status.json").exists()


def find_runs(folder: Path) -> list[Run]:
    """Return the runs whose folders are in `folder`, or `folder` itself if it is a run's folder."""
    if is_run(folder):
        return [Run(folder)]
    return [Run(path.parent) for path in sorted(folder.glob("*/status.json"))]


# Sections of a run without the part, whose folder has the name from before there were such parts.
WITHOUT = {
    "anchor": {"_target_": "emloc.anchors.none.NoAnchor"},
    "polish": {"_target_": "emloc.stages.polishing.none.NoPolish"},
}


@exempt_imports()
def folder_name(config: DictConfig) -> str:
    """Return the name of a run's folder, `<method>-<model>-<task>-s<seed>-<id>`.

    `<id>` is a digest of all settings that determine results, so equal settings have one folder.
    """
    # Sections that are None are left out, so that a new section does not rename older folders.
    sections = {name: _plain(config[name]) for name in DECISIVE}
    decisive = {
        name: _key_value(name, section) for name, section in sections.items() if section is not None
    }
    if decisive["stage"] == _key_value("stage", standard_stages()):
        del decisive["stage"]
    for name, section in WITHOUT.items():
        if decisive[name] == _key_value(name, section):
            del decisive[name]
    if config.compression.ratio is None:  # compression=auto: the budget determines the ratio
        decisive["gpu_gib"] = config.budget.gpu_gib
    if world_size() > 1:  # more processes make an optimizer step larger
        decisive["processes"] = world_size()
    words = (config.method, config.model.name, config.task.name)
    names = (safe_word(str(word)) for word in words)  # the run itself refuses a word with a slash
    return "-".join([*names, f"s{config.seed}", digest(decisive)[:8]])


def _key_value(name: str, value: Any) -> Any:
    """Return the JSON value of the section `name` in a digest.

    Neutral settings and the modules of classes are left out, since they do not change results.
    """
    if name == "stage":
        return {
            stage: _part_key(settings, ("counted", "column")) for stage, settings in value.items()
        }
    cls = SECTIONS.get(name)
    return _part_key(value) if cls is None else without_neutral(value, cls)


def _part_key(value: Any, excluded: Sequence[str] = ()) -> Any:
    """Return the JSON value of a part in a digest, without neutral and `excluded` settings."""
    if not isinstance(value, Mapping):
        return value
    settings = {key: _part_key(item) for key, item in value.items() if key not in excluded}
    target = settings.pop("_target_", None)
    if target is None:
        return settings
    cls = _import_class(str(target))
    if cls is None:  # building the run will refuse the class, with a message
        return {"part": target, **settings}
    return {"part": class_name(cls), **without_neutral(settings, cls)}


def _import_class(target: str) -> type | None:
    """Return the class with the dotted name `target`; None if it cannot or may not be imported."""
    quiet()  # importing the part may import libraries that print
    try:
        cls = import_named(target)
    except (ImportError, AttributeError):
        return None
    return cls if isinstance(cls, type) else None


def _plain(node: Any) -> Any:
    """Convert a node of OmegaConf to plain dicts and lists; return other values unchanged."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if the file does not exist.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(value, dict):
        raise _unreadable(path, "it is no mapping")
    return value


def _unreadable(path: Path, reason: object) -> ConfigError:
    """The error for a file of a run folder that was cut off or changed by hand."""
    return ConfigError(
        f"{path}: the file is damaged: {' '.join(str(reason).split())}; "
        f"delete the folder {path.parent.name} and run its command again"
    )
