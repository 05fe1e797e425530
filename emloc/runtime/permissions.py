"""Permissions of files and folders: what the user's umask gives to new ones.

Some libraries write a file under a temporary name that only its owner may read, and then rename it.
In a cache or a folder of runs that a group shares, nobody else could read such a file.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

_SPECIAL = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX


def apply_umask(folder: Path) -> None:
    """Give `folder` and everything in it the permissions of new files and folders.

    Folders keep the bit that hands on their group (setgid). Links and the files of other users are
    left as they are.
    """
    file_mode = _new_file_mode(folder)
    folder_mode = file_mode | (file_mode & 0o444) >> 2  # who may read a folder may also enter it
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            set_permissions(path, folder_mode if path.is_dir() else file_mode)


def set_permissions(path: Path, permissions: int) -> None:
    """Set the nine permission bits of a file or folder; a file of another user is left as it is."""
    mode = stat.S_IMODE(path.stat().st_mode)
    permissions |= mode & _SPECIAL
    if mode != permissions:
        with suppress(PermissionError):
            path.chmod(permissions)


def _new_file_mode(folder: Path) -> int:
    """Permission bits of a new file in `folder`.

    A file is made to find out, since the umask of a process can only be read by changing it, and
    since the access list of a folder may replace the umask.
    """
    path = folder / f".new-{uuid4().hex}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        path.unlink()
