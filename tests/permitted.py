"""Read the permissions of files and folders, and say which the umask gives to new ones."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def permissions(folder: Path) -> dict[str, str]:
    """Path -> octal permissions of a folder and all in it; the path of a folder ends in a slash.

    Links are left out, since their own permissions mean nothing.
    """
    return {
        f"{path}{os.sep if path.is_dir() else ''}": f"{stat.S_IMODE(path.stat().st_mode):o}"
        for path in (folder, *folder.rglob("*"))
        if not path.is_symlink()
    }


def new_permissions(paths: dict[str, str]) -> dict[str, str]:
    """The same paths with the permissions of new files and folders in this process."""
    mask = os.umask(0)
    os.umask(mask)
    modes = {True: f"{0o777 & ~mask:o}", False: f"{0o666 & ~mask:o}"}
    return {path: modes[path.endswith(os.sep)] for path in paths}
