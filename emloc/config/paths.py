"""Folders of the package and of plug-ins: configuration files, experiments and plug-in modules."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from emloc.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel has these folders inside the package, a checkout has them next to it.
DATA = _PACKAGE / "_data" if (_PACKAGE / "_data").exists() else _PACKAGE.parent
CONF = DATA / "conf"
EXPERIMENTS = DATA / "experiments"

# Environment variable with the folders of plug-ins, separated as in PATH. A plug-in folder contains
# Python modules, and YAML files below conf/.
PLUGINS = "EMLOC_PLUGINS"


def plugin_folders() -> list[Path]:
    """Return the folders in `EMLOC_PLUGINS` and add them to Python's import path.

    Raises:
        ConfigError: a path in `EMLOC_PLUGINS` is not a folder.
    """
    paths = [path for path in os.environ.get(PLUGINS, "").split(os.pathsep) if path]
    folders = [Path(path).expanduser().resolve() for path in paths]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{PLUGINS}: no folder {folder}; set {PLUGINS}=/path/to/plugins")
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return folders


def conf_folders() -> list[Path]:
    """Return the folders of `<group>/<choice>.yaml` files: ours first, then those of plug-ins."""
    folders = (folder / "conf" for folder in plugin_folders())
    return [CONF, *(folder for folder in folders if folder.is_dir())]


def choices(group: str) -> dict[str, Path]:
    """Return the choices of a configuration group: name -> YAML file, without bases (`_x.yaml`).

    If several folders have a file of that name, the first folder counts.
    """
    files = [file for folder in conf_folders() for file in sorted(folder.glob(f"{group}/*.yaml"))]
    return {file.stem: file for file in reversed(files) if not file.stem.startswith("_")}
