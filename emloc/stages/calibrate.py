"""Run the original model over the calibration samples and keep second moments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc.calibration.calibrate import calibrate, statistics_bytes
from emloc.runtime.memory import GIB
from emloc.runtime.stage_cache import Facts
from emloc.stages import STATISTICS, Context, Stage


@dataclass(frozen=True, kw_only=True)
class Calibrate(Stage):
    """Second moments that are kept, so that other ratios need no second pass."""

    gives = STATISTICS

    def needed(self, context: Context) -> bool:
        """Where the emulator reads them, and they are not larger than `budget.statistics_gib`.

        Those of a large model would be larger than itself: it is compressed while it is run.
        """
        if not context.run_config.emulator.statistics:
            return False
        size = statistics_bytes(context.layers, _whole(context))
        return size <= context.run_config.budget.statistics_gib * GIB

    def inputs(self, context: Context) -> list[Any]:
        """The model, the layers, the samples, and which moments."""
        return [context.source, context.layers, context.samples, _whole(context)]

    def work(self, folder: Path, context: Context) -> Facts:
        """See `emloc.calibration.calibrate`."""
        assert context.samples is not None
        return calibrate(
            folder,
            context.source,
            context.layers,
            context.samples,
            _whole(context),
            device=context.device,
            host_bytes=context.host_bytes,
        )


def _whole(context: Context) -> bool:
    """Whether every layer needs its input Gram."""
    return context.run_config.emulator.statistics == "input"
