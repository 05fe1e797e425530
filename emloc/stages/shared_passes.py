"""Passes over rows in a folder that many runs share, and the artifacts that list them.

A pass is a finished folder. A run computes only what no earlier pass has left in the shared folder,
and its artifact lists the passes that hold all of its rows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from emloc.runtime.manifest import DamagedError, flaw_of, set_aside
from emloc.runtime.stage_cache import Artifact

log = logging.getLogger(__name__)

PASSES_FILE = "passes.json"


def intact_passes(shared: Path, contents: str) -> list[Path]:
    """Return the folders of all finished passes; damaged ones are logged and moved aside.

    `contents` says in the log what a pass holds, such as `anchor: the offsets`.
    """
    passes = []
    for folder in sorted(path for path in shared.iterdir() if path.is_dir() and not path.suffix):
        if (flaw := flaw_of(folder)) is None:
            passes.append(folder)
        else:
            aside = set_aside(folder)
            log.warning("%s %s are damaged: %s; moved to %s", contents, folder, flaw, aside.name)
    return passes


def write_list(folder: Path, passes: Sequence[Path]) -> None:
    """Write the list of passes into the folder of an artifact."""
    (folder / PASSES_FILE).write_text(json.dumps([str(one) for one in passes]))


def listed_passes(artifact: Artifact, contents: str) -> list[Path]:
    """Return the folders of the passes that an artifact lists.

    `contents` says in errors what a pass holds, such as `offsets`.

    Raises:
        DamagedError: one of them is missing or damaged, so the stage has to be computed again.
    """
    folders = [Path(name) for name in json.loads((artifact.folder / PASSES_FILE).read_text())]
    for folder in folders:
        if not folder.exists():
            raise DamagedError(artifact.folder, f"its {contents} {folder} are missing")
        if (flaw := flaw_of(folder)) is not None:
            set_aside(folder)
            raise DamagedError(artifact.folder, f"its {contents} {folder} are damaged: {flaw}")
    return folders
