"""What the stages of a run have left."""

import json
from pathlib import Path


def curve_of(folder: Path) -> list[dict]:
    """A line for each step of the training in this folder."""
    return [json.loads(line) for line in (folder / "curve.jsonl").open()]


def losses_of(result) -> list[float]:
    """The loss of each step of a run's training."""
    return [line["loss"] for line in curve_of(result.trained.folder)]
