"""Read the files that the training stage of a run has written."""

import json
from pathlib import Path


def curve_of(folder: Path) -> list[dict]:
    """Return the recorded values of each training step in this folder."""
    return [json.loads(line) for line in (folder / "curve.jsonl").open()]


def losses_of(result) -> list[float]:
    """Return the loss of each training step of a run."""
    return [line["loss"] for line in curve_of(result.trained.folder)]
