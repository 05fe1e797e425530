"""Hide bases: YAML files of a configuration group that users cannot choose.

The name of a base begins with `_`. A base holds the settings that several choices of its group
share. It is listed in their defaults lists and is incomplete by itself.
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
    """Hydra's reader of configuration folders, without bases; Hydra requires this very name."""

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the names of the choices and groups in a folder of the search path."""
        names = super().list(config_path, results_filter)
        return [name for name in names if not name.startswith("_")]


def hide_bases() -> None:
    """Hide bases from Hydra's `--help`, completion, `glob(*)` and error messages."""
    Plugins.instance()  # Hydra registers its own reader here, which the next line replaces
    SourcesRegistry.instance().types["file"] = FileConfigSource


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
