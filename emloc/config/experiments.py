"""Read the YAML file of an experiment: the node that Hydra composes, and the points of its grid.

A cell is a named combination of overrides, listed under the key `cells`. Hydra knows settings and
groups but no cells, so this module takes them out of the file and adds a sweep over them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from emloc.config.paths import CONF
from emloc.config.presets import group_choices
from emloc.errors import ConfigError


@dataclass(frozen=True)
class Experiment:
    """An experiment: its grid points, its cells and the choices that all points share."""

    name: str
    about: str  # first sentence of the comment at the head of the file
    points: Sequence[Mapping[str, str]]  # for each grid point: setting -> value
    cells: Mapping[str, Mapping[str, str]]  # cell -> setting -> value
    defaults: Mapping[str, str]  # group -> choice, for points that do not set the group

    def word(self, point: Mapping[str, str], key: str) -> str:
        """Return the value of a setting at a grid point: own, cell's or default; empty if unset."""
        cell = self.cells.get(cell_name(point), {})
        return point.get(key) or cell.get(key) or self.defaults.get(key, "")


def cell_name(point: Mapping[str, str]) -> str:
    """Return the name of a point's cell, without the experiment; empty if the point has no cell."""
    return point.get("cell", "").rpartition("/")[2]


@dataclass(frozen=True)
class ExperimentFile:
    """Content of the YAML file of an experiment."""

    node: DictConfig  # for Hydra: without the key `cells`, but with a sweep over the cells
    cells: Mapping[str, str]  # cell -> overrides, as on the command line


def read_experiment(path: Path) -> ExperimentFile:
    """Return the content of an experiment's YAML file, cached until the file changes."""
    return _read_file(path, path.stat().st_mtime_ns)


@cache
def _read_file(path: Path, modified: int) -> ExperimentFile:
    """Read the file once for each time of modification.

    Reading all experiments takes longer than composing a configuration, so they are cached.
    """
    node = OmegaConf.load(path)
    assert isinstance(node, DictConfig)
    cells = dict(node.pop("cells", {}))
    if cells:
        sweep = ",".join(f"{path.stem}/{name}" for name in cells)
        OmegaConf.update(node, "hydra.sweeper.params.cell", sweep)
    return ExperimentFile(node, cells)


def split_sweep(overrides: Sequence[str], loader: ConfigLoader | None = None) -> list[list[str]]:
    """Return the overrides of each run of a sweep, split by Hydra's basic sweeper.

    `loader` lists the choices of a group, which `glob(...)` needs.

    Raises:
        HydraException: the basic sweeper refuses an override.
    """
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    (runs,) = BasicSweeper.split_arguments(parsed, None)
    return [list(run) for run in runs]


def sweep_runs(words: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each run of a command line; there is one run without a sweep.

    Words that cannot be read are those of one run, so that its composition says why.
    """
    try:
        return split_sweep(words)
    except HydraException:
        return [[*words]]


def points(path: Path) -> list[dict[str, str]]:
    """Return the grid points of an experiment's YAML file, each as setting -> value.

    Raises:
        ConfigError: `hydra.sweeper.params` cannot be parsed.
    """
    node = _plain(read_experiment(path).node)
    parameters = ((node.get("hydra") or {}).get("sweeper") or {}).get("params") or {}
    try:
        runs = split_sweep([f"{key}={value}" for key, value in parameters.items()])
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: hydra.sweeper.params cannot be read: {reason}") from error
    return [dict(_split_override(override) for override in run) for run in runs]


def experiment(path: Path) -> Experiment:
    """Return the experiment that a YAML file describes.

    Raises:
        ConfigError: `hydra.sweeper.params` cannot be parsed.
    """
    file = read_experiment(path)
    return Experiment(
        name=path.stem,
        about=_first_sentence(path.read_text(encoding="utf-8")),
        points=points(path),
        cells={
            name: dict(_split_override(override) for override in overrides.split())
            for name, overrides in file.cells.items()
        },
        defaults=group_choices(_plain(OmegaConf.load(CONF / "config.yaml")))
        | group_choices(_plain(file.node)),
    )


def _plain(node: DictConfig | ListConfig) -> dict[str, Any]:
    """Convert a node of OmegaConf, which must be a mapping, to a plain dict."""
    values = OmegaConf.to_container(node)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _split_override(override: str) -> tuple[str, str]:
    """Split `setting=value` into setting and value."""
    key, _, value = override.partition("=")
    return key, value


def _first_sentence(text: str) -> str:
    """Return the first sentence of the comment at the head of a YAML file, after `@package`."""
    head = takewhile(lambda line: line.startswith("#"), text.splitlines())
    lines = [line.lstrip("# ") for line in head]
    comment = " ".join(line for line in lines if not line.startswith("@package"))
    match = re.match(r".+?[.](?=\s|$)", comment)
    return match[0] if match else comment
