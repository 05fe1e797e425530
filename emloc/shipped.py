"""Where configuration, experiments and small models lie that come with the package."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries the folders inside the package; a checkout has them beside it.
DATA = _PACKAGE / "_data" if (_PACKAGE / "_data").exists() else _PACKAGE.parent
CONF = DATA / "conf"
EXPERIMENTS = DATA / "experiments"


def conf_folders() -> list[Path]:
    """Where the YAML files of groups lie, `<folder>/<group>/<choice>.yaml`."""
    return [CONF]


def choices(group: str) -> dict[str, Path]:
    """The choices of a group: name -> YAML file; of one name, that of the earlier folder."""
    files = [file for folder in conf_folders() for file in sorted(folder.glob(f"{group}/*.yaml"))]
    return {file.stem: file for file in reversed(files)}
