"""What an experiment asks for: all points of its grid, without composing one of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from emloc.errors import ConfigError
from emloc.shipped import CONF


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


def points(path: Path) -> list[dict[str, str]]:
    """Override -> word for every run that the experiment in this YAML file asks for.

    Raises:
        ConfigError: what it sweeps cannot be read.
    """
    node = _loaded(path)
    swept = ((node.get("hydra") or {}).get("sweeper") or {}).get("params") or {}
    overrides = [f"{key}={value}" for key, value in swept.items()]
    if cells := node.get("cells"):
        overrides.append("cell=" + ",".join(f"{path.stem}/{name}" for name in cells))
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        (every,) = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"{path}: hydra.sweeper.params cannot be read: {said}") from error
    return [dict(_pair(word) for word in point) for point in every]


def experiment(path: Path) -> Experiment:
    """The experiment in this YAML file.

    Raises:
        ConfigError: what it sweeps cannot be read.
    """
    node = _loaded(path)
    return Experiment(
        name=path.stem,
        about=_first_sentence(path.read_text(encoding="utf-8")),
        points=points(path),
        cells={
            name: dict(_pair(word) for word in words.split())
            for name, words in node.get("cells", {}).items()
        },
        chosen=_chosen(_loaded(CONF / "config.yaml")) | _chosen(node),
    )


def _loaded(path: Path) -> dict[str, Any]:
    node = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


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
