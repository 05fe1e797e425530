"""The arithmetic of a training."""

from __future__ import annotations

from emloc.config.settings import TrainSettings
from emloc.runtime.distributed import world_size

# Passes over a frozen model for one row: forward, and the gradients of activations. Frozen weights
# have no gradients.
_PASSES = 2


def training_work(rows: int, share: float, *, recomputes: bool) -> dict[str, float]:
    """Return the facts `trained_rows` and `row_forwards` of a training through a frozen emulator.

    `row_forwards` is in forward passes of the original over one row. The few operations of the
    adapter are left out: a LoRA on the original takes 3 forwards a row if activations are
    recomputed, and 2 if not.

    Args:
        rows: of all optimizer steps in all processes; a row that is drawn twice counts twice.
        share: operations of the emulator as a share of the original's.
        recomputes: whether the backward pass runs each block forward once more.
    """
    return {"trained_rows": rows, "row_forwards": rows * (_PASSES + recomputes) * share}


def rows_of_step(recipe: TrainSettings, rows: int) -> int:
    """Return the rows of one optimizer step in all processes; it has at most all `rows`."""
    return min(recipe.batch * recipe.accumulate * world_size(), rows)
