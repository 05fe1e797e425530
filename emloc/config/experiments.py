"""An experiment's YAML file: what Hydra composes of it, and all points of its grid.

Hydra knows settings and groups, but no cells, which are named combinations of overrides under the
key `cells`. The file is read here alone, and the points of a grid are told apart here alone.
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
from emloc.errors import ConfigError


@dataclass(frozen=True)
class Experiment:
    """An experiment's YAML file, read for what it asks for."""

    name: str
    about: str  # the first sentence of its comment
    points: Sequence[Mapping[str, str]]  # override -> word
    cells: Mapping[str, Mapping[str, str]]  # name -> override -> word
    chosen: Mapping[str, str]  # group -> choice of all points that say nothing of it

    def word(self, point: Mapping[str, str], key: str) -> str:
        """What a point has of a setting: by itself, as its cell, or as all do; else empty."""
        cell = self.cells.get(cell_name(point), {})
        return point.get(key) or cell.get(key) or self.chosen.get(key, "")


def cell_name(point: Mapping[str, str]) -> str:
    """The name of a point's cell within the experiment; empty where it has none."""
    return point.get("cell", "").rpartition("/")[2]


@dataclass(frozen=True)
class ExperimentFile:
    """An experiment's YAML file as it is written."""

    node: DictConfig  # what Hydra composes: without `cells`, and with a sweep over them
    cells: Mapping[str, str]  # name -> words of the command line


def read_experiment(path: Path) -> ExperimentFile:
    """The experiment in this YAML file, read anew only when the file has changed."""
    return _read(path, path.stat().st_mtime_ns)


@cache
def _read(path: Path, modified: int) -> ExperimentFile:
    """Kept until the file is `modified`: it takes longer to read all of them than to compose."""
    node = OmegaConf.load(path)
    assert isinstance(node, DictConfig)
    cells = dict(node.pop("cells", {}))
    if cells:
        every = ",".join(f"{path.stem}/{name}" for name in cells)
        OmegaConf.update(node, "hydra.sweeper.params.cell", every)
    return ExperimentFile(node, cells)


def split_sweep(overrides: Sequence[str], loader: ConfigLoader | None = None) -> list[list[str]]:
    """The overrides of each run of a sweep, as Hydra's basic sweeper splits them.

    `loader` knows the choices of each group, which `glob(...)` asks for.

    Raises:
        HydraException: an override that the basic sweeper refuses.
    """
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    (every,) = BasicSweeper.split_arguments(parsed, None)
    return [list(point) for point in every]


def points(path: Path) -> list[dict[str, str]]:
    """Override -> word for every run that the experiment in this YAML file asks for.

    Raises:
        ConfigError: what it sweeps cannot be read.
    """
    node = _plain(read_experiment(path).node)
    swept = ((node.get("hydra") or {}).get("sweeper") or {}).get("params") or {}
    try:
        every = split_sweep([f"{key}={value}" for key, value in swept.items()])
    except HydraException as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"{path}: hydra.sweeper.params cannot be read: {said}") from error
    return [dict(_pair(word) for word in point) for point in every]


def experiment(path: Path) -> Experiment:
    """The experiment in this YAML file.

    Raises:
        ConfigError: what it sweeps cannot be read.
    """
    file = read_experiment(path)
    return Experiment(
        name=path.stem,
        about=_first_sentence(path.read_text(encoding="utf-8")),
        points=points(path),
        cells={
            name: dict(_pair(word) for word in words.split()) for name, words in file.cells.items()
        },
        chosen=_chosen(_plain(OmegaConf.load(CONF / "config.yaml"))) | _chosen(_plain(file.node)),
    )


def _plain(node: DictConfig | ListConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(node)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _pair(word: str) -> tuple[str, str]:
    key, _, value = word.partition("=")
    return key, value


def _chosen(node: Mapping[str, Any]) -> dict[str, str]:
    """Group -> choice of a defaults list."""
    named = [one for one in node.get("defaults", []) if isinstance(one, dict)]
    return {
        str(group).removeprefix("override /"): str(choice)
        for one in named
        for group, choice in one.items()
        if choice is not None
    }


def _first_sentence(text: str) -> str:
    """Of the comment at the head of a file, behind the line that is Hydra's."""
    head = takewhile(lambda line: line.startswith("#"), text.splitlines())
    lines = [line.lstrip("# ") for line in head]
    said = " ".join(line for line in lines if not line.startswith("@package"))
    match = re.match(r".+?[.](?=\s|$)", said)
    return match[0] if match else said
