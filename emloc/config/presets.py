"""Methods as presets: the choice that each of them makes of every part, and the name of a run's.

Reports use this, so no torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import yaml

from emloc.config.paths import CONF, choices
from emloc.config.settings import PARTS
from emloc.errors import one_line

# Choice of a group that adds nothing to a method.
NONE = "none"

Settings = Mapping[str, str]  # choices of groups and dotted keys, with their values


@dataclass(frozen=True)
class Preset:
    """The choice of every part, and all else that a method sets."""

    parts: Mapping[str, str]
    others: Settings

    def fits(self, parts: Mapping[str, str], settings: Settings) -> bool:
        """Whether a run with these parts and settings is what the preset makes."""
        return self.parts == parts and all(
            settings.get(name) == value for name, value in self.others.items()
        )


def optional_parts() -> dict[str, str]:
    """Return group -> `none` for the parts that a method may leave alone, such as `anchor`."""
    return {group: NONE for group in PARTS if _default_parts()[group] == NONE}


def part_of(method: str, settings: Settings, group: str) -> str:
    """Return a run's choice of a part: its own, or that of its method; else the default."""
    own = _preset(method)
    return settings.get(group) or (own.parts if own else _default_parts())[group]


def named_method(method: str, settings: Settings) -> str:
    """Return the name of the method that has the parts of a run.

    This is the run's own method, unless the run makes another choice than its method of a part that
    a method may leave alone. Then it is the method with the parts of the run. If there is none, the
    choice stands behind the name of the method without it, as in `upop anchor=blocks`.

    Args:
        method: the run's own method.
        settings: of the run. Parts that are missing are those of its method.
    """
    own, optional = _preset(method), optional_parts()
    parts = {group: part_of(method, settings, group) for group in PARTS}
    usual = own.parts if own else _default_parts()
    if all(parts[group] == usual[group] for group in optional):
        return method
    presets = _presets() if own or all(group in settings for group in PARTS) else {}
    # Each set of parts that may stand behind the name; the first ones say more by the name.
    added = [group for group in optional if parts[group] != NONE]
    behind = chain.from_iterable(combinations(added, size) for size in range(len(added) + 1))
    candidates = [
        (name, [f"{group}={parts[group]}" for group in groups])
        for groups in behind
        if (name := _best_match(presets, parts | dict.fromkeys(groups, NONE), settings))
    ]
    if candidates:
        name, words = max(candidates, key=lambda one: len(presets[one[0]].others))
    else:
        name = method
        words = [f"{group}={parts[group]}" for group in optional if parts[group] != usual[group]]
    return " ".join([name, *words])


def _best_match(
    presets: Mapping[str, Preset], parts: Mapping[str, str], settings: Settings
) -> str | None:
    """Return the method that makes these parts and sets the most of the settings; None: none."""
    matches = [name for name, preset in presets.items() if preset.fits(parts, settings)]
    return max(matches, key=lambda name: len(presets[name].others), default=None)


def group_choices(node: Mapping[str, Any]) -> dict[str, str]:
    """Return group -> choice from the defaults list of a YAML file."""
    entries = [entry for entry in node.get("defaults", []) if isinstance(entry, dict)]
    return {
        str(group).removeprefix("override /"): str(choice)
        for entry in entries
        for group, choice in entry.items()
        if choice is not None
    }


def _presets() -> dict[str, Preset]:
    return {name: _read(path) for name, path in sorted(choices("method").items())}


def _preset(method: str) -> Preset | None:
    """Return what a method presets; None if there is no such method."""
    path = choices("method").get(method)
    return None if path is None else _read(path)


@cache
def _read(path: Path) -> Preset:
    content: Any = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    by_group = {group.removeprefix("/"): word for group, word in group_choices(content).items()}
    values = {name: value for name, value in content.items() if name not in ("defaults", "method")}
    parts = {group: by_group.pop(group, usual) for group, usual in _default_parts().items()}
    return Preset(parts, by_group | dict(_leaves(values)))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the value of each setting, in the words of a run's settings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", one_line(value)


@cache
def _default_parts() -> dict[str, str]:
    content: Any = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    by_group = group_choices(content)
    return {group: by_group[group] for group in PARTS}
