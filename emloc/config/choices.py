"""Refuse bases (`emloc.config.sources`) on the command line."""

from __future__ import annotations

from collections.abc import Sequence

from emloc.config.paths import CONF
from emloc.errors import ConfigError


def refuse_bases(overrides: Sequence[str]) -> None:
    """Check that no override on the command line chooses a base.

    Raises:
        ConfigError: an override chooses a base.
    """
    for override in overrides:
        group, _, words = override.partition("=")
        if (CONF / group.lstrip("+")).is_dir():
            for word in words.split(","):
                if word.startswith("_"):
                    raise ConfigError(
                        f"{group}={word}: there is no such choice; {word} is a base that other "
                        "choices share"
                    )
