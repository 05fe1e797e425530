"""The calibration stage: accumulate second moments of each layer and cache them."""

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
    """Stage that caches second moments, so that other ratios need no second calibration."""

    gives = STATISTICS

    def needed(self, context: Context) -> bool:
        """Return whether the emulator reads moments that fit into `budget.statistics_gib`.

        The moments of a large model would be larger than the model. Its emulator is built without
        this stage: each block is calibrated and compressed in one blockwise forward.
        """
        if not context.run_config.emulator.statistics:
            return False
        size = statistics_bytes(context.layers, _needs_input_grams(context), _joint(context))
        return size <= context.run_config.budget.statistics_gib * GIB

    def inputs(self, context: Context) -> list[Any]:
        """Return the model, the layers, the samples, and which layers need an input Gram."""
        joint = sorted(_joint(context))
        inputs = [context.source, context.layers, context.samples, _needs_input_grams(context)]
        return [*inputs, *([joint] if joint else [])]

    def work(self, folder: Path, context: Context) -> Facts:
        """Run the model over the samples and write the moments of its layers into `folder`."""
        assert context.samples is not None
        return calibrate(
            folder,
            context.source,
            context.layers,
            context.samples,
            _needs_input_grams(context),
            device=context.device,
            limits=context.limits,
            joint=_joint(context),
        )


def _joint(context: Context) -> set[str]:
    """Return the layers whose input Gram the emulator needs, whichever Gram is the smaller."""
    return context.run_config.emulator.joint(context.source, context.layers)


def _needs_input_grams(context: Context) -> bool:
    """Return whether the emulator needs the Gram matrix of every layer's inputs."""
    run_config = context.run_config
    return run_config.emulator.statistics_in(run_config.precision) == "input"
