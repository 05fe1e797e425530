"""Hydra's readers of configurations, changed in two ways.

* They hide bases: YAML files of a configuration group that users cannot choose. The name of a base
  begins with `_`. A base holds the settings that several choices of its group share. It is listed
  in their defaults lists and is incomplete by itself.
* They parse a file once, and do not copy everything that is registered. This takes a third off the
  time of a composition, and a sweep composes each of its jobs.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from functools import cache
from typing import Any

from hydra._internal.core_plugins import file_config_source, structured_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's reader of configuration folders, without bases; Hydra requires this very name."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the content of a file, cached until the file changes."""
        path = os.path.join(self.path, self._normalize_file_name(config_path))
        result = _read_file(self.provider, self.path, config_path, os.stat(path).st_mtime_ns)
        return replace(result, config=copy.deepcopy(result.config))  # Hydra changes it

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the names of the choices and groups in a folder of the search path."""
        names = super().list(config_path, results_filter)
        return [name for name in names if not name.startswith("_")]


@cache
def _read_file(provider: str, folder: str, config_path: str, modified: int) -> ConfigResult:
    """Read the file once for each time of modification."""
    reader = file_config_source.FileConfigSource(provider, f"file://{folder}")
    return reader.load_config(config_path)


class StructuredConfigSource(structured_config_source.StructuredConfigSource):
    """Hydra's reader of what is registered; Hydra requires this very name."""

    def __deepcopy__(self, memo: dict[int, Any]) -> StructuredConfigSource:
        """Return this reader, since it has no state of its own.

        Hydra copies its readers for each composition, and with this one all that is registered.
        What it loads is a copy already.
        """
        return self


def register_sources() -> None:
    """Make Hydra read through the classes above."""
    Plugins.instance()  # Hydra registers its own readers here, which the next lines replace
    SourcesRegistry.instance().types |= {
        "file": FileConfigSource,
        "structured": StructuredConfigSource,
    }
