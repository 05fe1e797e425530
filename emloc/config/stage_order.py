"""The order of stages, from where each says that it stands. Imports no torch: reports ask, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from emloc.config.paths import CONF
from emloc.errors import ConfigError


def in_order(after: Mapping[str, str | None]) -> list[str]:
    """The names of the stages in the order they run in.

    Args:
        after: stage -> the one it stands directly behind; None: at the beginning. Of several behind
            the same one a standard stage comes last, and of others the last in this mapping first.

    Raises:
        ConfigError: a stage stands behind one that is not there, or behind itself.
    """
    order: list[str] = []
    waiting = dict(sorted(after.items(), key=lambda item: item[0] not in standard_stages()))
    while waiting:
        placed = [name for name, before in waiting.items() if before is None or before in order]
        if not placed:
            name, before = next(iter(waiting.items()))
            raise ConfigError(
                f"stage.{name}.after={before}: there is no such stage before it, of "
                f"{', '.join(after)}; set stage=[standard,{name}], or stage.{name}.after"
            )
        for name in placed:
            before = waiting.pop(name)
            order.insert(0 if before is None else order.index(before) + 1, name)
    return order


@cache
def standard_stages() -> dict[str, dict[str, Any]]:
    """Stage -> its settings, of the stages that every run has unless it says otherwise."""
    folder = CONF / "stage"
    names = OmegaConf.load(folder / "standard.yaml").defaults
    stages = {}
    for name in names:
        stages[str(name)] = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"))
    return stages  # type: ignore[return-value]


def stages_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Stage -> its settings, in order, of a run's resolved configuration.

    Runs made before stages were settings had the standard ones.

    Raises:
        ConfigError: a stage stands behind one that is not there.
    """
    stages = config.get("stage") or standard_stages()
    order = in_order({name: stage["after"] for name, stage in stages.items()})
    return {name: {"counted": True, "column": True} | stages[name] for name in order}


def merged(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """The names of both: what only the second has stands behind what it stands behind there."""
    order = list(first)
    for index, name in enumerate(second):
        if name not in order:
            before = second[index - 1] if index else None
            order.insert(order.index(before) + 1 if before else 0, name)
    return order
