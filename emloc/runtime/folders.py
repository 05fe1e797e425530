"""Folders of this machine that environment variables name: runs and the cache of stages."""

from __future__ import annotations

import os
from pathlib import Path

RUNS, CACHE = "EMLOC_RUNS", "EMLOC_CACHE"


def runs_folder() -> Path:
    """Return the folder of all experiments: `EMLOC_RUNS`, or else `runs` in the current folder."""
    return Path(os.environ.get(RUNS) or "runs")


def existing_folder(folder: Path) -> Path:
    """Return a folder that need not exist yet, or the nearest folder above it that does."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def cache_folder() -> Path:
    """Return the folder of the cache: `EMLOC_CACHE`, or else `~/.cache/emloc`."""
    return Path(os.environ.get(CACHE) or "~/.cache/emloc").expanduser()
