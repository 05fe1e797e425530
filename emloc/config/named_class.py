"""Import what a setting names, such as a class in `_target_`, from trusted code alone.

Settings also come from the folders of runs that somebody else made, and an import runs code. So a
dotted name is checked before anything is imported. Its first word has to be this package, or a
module in a folder of `EMLOC_PLUGINS`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from emloc.config.paths import PLUGINS, plugin_folders

_OURS = __name__.partition(".")[0]


def import_named(dotted: str) -> Any:
    """Import and return the class or function with a dotted name, `module.name`.

    Raises:
        ImportError: the name is of other code than this package and the plug-ins, in which case
            nothing is imported; or there is no such module.
        AttributeError: the module has no such name.
    """
    module, _, name = dotted.rpartition(".")
    if not _is_trusted(module):
        raise ImportError(
            f"it is neither of {_OURS} nor of a folder in {PLUGINS}, so it is not imported; "
            f"set {PLUGINS}=/path/to/plugin if you trust that code"
        )
    value = getattr(import_module(module), name)
    # A module also has the names that it imports from elsewhere, such as those of Python.
    home = getattr(value, "__module__", module)
    if callable(value) and not _is_trusted(str(home)):
        raise ImportError(f"it is of {home}, and {module} only imports it")
    return value


def _is_trusted(module: str) -> bool:
    """Whether a module is of this package or of a plug-in; nothing is imported to find out."""
    first, *others = module.split(".")
    if not all(word.isidentifier() for word in (first, *others)):
        return False
    if first == _OURS:
        return True
    folders = plugin_folders()  # also adds them to Python's path
    if first in sys.builtin_module_names or first in sys.stdlib_module_names:
        return False
    spec = PathFinder.find_spec(first)
    if spec is None:
        return False
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return bool(places) and all(_lies_in(Path(place), folders) for place in places)


def _lies_in(path: Path, folders: list[Path]) -> bool:
    return any(path.resolve().is_relative_to(folder) for folder in folders)
