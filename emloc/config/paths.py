"""Where configuration, experiments and small models lie: those of the package and of plug-ins."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from emloc.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel carries the folders inside the package; a checkout has them beside it.
DATA = _PACKAGE / "_data" if (_PACKAGE / "_data").exists() else _PACKAGE.parent
CONF = DATA / "conf"
EXPERIMENTS = DATA / "experiments"

# Folders of plug-ins, several divided as in PATH: modules, and their YAML files below conf/.
PLUGINS = "EMLOC_PLUGINS"


def plugin_folders() -> list[Path]:
    """The folders in `EMLOC_PLUGINS`, their modules importable from now on.

    Raises:
        ConfigError: one is no folder.
    """
    words = [word for word in os.environ.get(PLUGINS, "").split(os.pathsep) if word]
    folders = [Path(word).expanduser().resolve() for word in words]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{PLUGINS}: no folder {folder}; set {PLUGINS}=/path/to/plugins")
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return folders


def conf_folders() -> list[Path]:
    """Where the YAML files of groups lie, `<folder>/<group>/<choice>.yaml`; ours come first."""
    folders = (folder / "conf" for folder in plugin_folders())
    return [CONF, *(folder for folder in folders if folder.is_dir())]


def choices(group: str) -> dict[str, Path]:
    """The choices of a group: name -> YAML file; of one name, that of the earlier folder."""
    files = [file for folder in conf_folders() for file in sorted(folder.glob(f"{group}/*.yaml"))]
    return {file.stem: file for file in reversed(files)}
