"""Which files of a configuration group can be chosen: all but bases.

A base is a YAML file whose name begins with `_`. It holds what several choices of its group share,
stands in their defaults lists, and makes no configuration by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins

from emloc.config.paths import CONF
from emloc.errors import ConfigError


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's reader of folders, which lists no base. It has that name as Hydra compares names."""

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The names in a folder of the search path."""
        names = super().list(config_path, results_filter)
        return [name for name in names if not name.startswith("_")]


def hide_bases() -> None:
    """Have Hydra list no base: in `--help`, completion, `glob(*)` and its errors."""
    Plugins.instance()  # registers Hydra's own reader first
    SourcesRegistry.instance().types["file"] = FileConfigSource


def refuse_bases(overrides: Sequence[str]) -> None:
    """Check that no base is chosen on the command line.

    Raises:
        ConfigError: one is.
    """
    for override in overrides:
        group, _, words = override.partition("=")
        if (CONF / group.lstrip("+")).is_dir():
            for word in words.split(","):
                if word.startswith("_"):
                    raise ConfigError(
                        f"{group}={word}: there is no such choice; {word} is a base that others "
                        "are made of"
                    )
