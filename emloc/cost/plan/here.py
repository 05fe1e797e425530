"""Memory and disk of the machine to plan for: as a user states them, or those of this one."""

from __future__ import annotations

import re
import shutil

import psutil

from emloc.errors import ConfigError
from emloc.runtime.folders import cache_folder, existing_folder
from emloc.runtime.memory import GIB

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*GiB")


def gib_of(word: str) -> float | None:
    """Return the size of a word such as `12GiB`; None if it is no size."""
    size = _SIZE.fullmatch(word)
    return float(size[1]) if size else None


def host_gib(word: str | None) -> float:
    """Return the host memory in GiB that `--host` states; None: that of this machine.

    Raises:
        ConfigError: it is no size.
    """
    return psutil.virtual_memory().total / GIB if word is None else _required("--host", word)


def disk_gib(word: str | None) -> float:
    """Return the free disk in GiB that `--disk` states; None: that of this machine's cache.

    Raises:
        ConfigError: it is no size.
    """
    if word is not None:
        return _required("--disk", word)
    return shutil.disk_usage(existing_folder(cache_folder().absolute())).free / GIB


def _required(option: str, word: str) -> float:
    size = gib_of(word)
    if not size:
        raise ConfigError(f"{option} {word}: this is no size; give it as {option} 64GiB")
    return size
