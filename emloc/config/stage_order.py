"""Order of the stages of a run, by their setting `after`. Reports use this, so no torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from emloc.config.paths import CONF
from emloc.errors import ConfigError


def order_stages(after: Mapping[str, str | None]) -> list[str]:
    """Return the names of the stages in the order in which they run.

    Args:
        after: stage -> the stage that it follows directly; None for the first stage. If several
            stages follow the same one, standard stages run last, and of the others the last in
            this mapping runs first.

    Raises:
        ConfigError: a stage follows one that is missing, or follows itself.
    """
    order: list[str] = []
    waiting = dict(sorted(after.items(), key=lambda item: item[0] not in standard_stages()))
    while waiting:
        ready = [name for name, before in waiting.items() if before is None or before in order]
        if not ready:
            name, before = next(iter(waiting.items()))
            raise ConfigError(
                f"stage.{name}.after={before}: there is no such stage before it, only "
                f"{', '.join(after)}; set stage=[standard,{name}], or stage.{name}.after"
            )
        for name in ready:
            before = waiting.pop(name)
            order.insert(0 if before is None else order.index(before) + 1, name)
    return order


@cache
def standard_stages() -> dict[str, dict[str, Any]]:
    """Return stage -> settings for the stages of `stage=standard`, the default of a run."""
    folder = CONF / "stage"
    names = OmegaConf.load(folder / "standard.yaml").defaults
    stages = {}
    for name in names:
        stages[str(name)] = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"))
    return stages  # type: ignore[return-value]


def stages_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return stage -> settings, in order, from the resolved configuration of a run.

    Older runs without the section `stage` had the standard stages.

    Raises:
        ConfigError: a stage follows one that is missing.
    """
    stages = config.get("stage") or standard_stages()
    order = order_stages({name: stage["after"] for name, stage in stages.items()})
    return {name: {"counted": True, "column": True} | stages[name] for name in order}


def merged(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Merge two orders of names; a name only in `second` follows its predecessor in `second`."""
    order = list(first)
    for index, name in enumerate(second):
        if name not in order:
            before = second[index - 1] if index else None
            order.insert(order.index(before) + 1 if before else 0, name)
    return order
