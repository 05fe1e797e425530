"""The recovery stage: adapt the trained adapter to the original model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emloc.recovery import RecoveryInputs
from emloc.runtime.stage_cache import Facts
from emloc.stages import RECOVERED, TRAINED, Context, Stage


@dataclass(frozen=True, kw_only=True)
class Recover(Stage):
    """Stage that turns the adapter of the emulator into an adapter of the original model."""

    gives = RECOVERED
    collected = MappingProxyType({"layers.json": "correction.json"})

    def needed(self, context: Context) -> bool:
        """Return whether the run has trained an adapter."""
        return TRAINED in context.current

    def inputs(self, context: Context) -> list[Any]:
        """Return the recovery's settings, the adapter, the emulator and the rows that are read."""
        inputs = _recovery_inputs(context)
        training_inputs = [inputs.training_inputs] if inputs.training_inputs is not None else []
        return [
            context.run_config.recovery,
            inputs.trained,
            inputs.built_emulator,
            inputs.samples,
            *training_inputs,
        ]

    def together(self, context: Context) -> bool:
        """Return whether the recovery trains, since all processes share a training."""
        return context.run_config.recovery.trains

    def work(self, folder: Path, context: Context) -> Facts:
        """Write the recovered adapter into `folder`."""
        return context.run_config.recovery.recover(folder, _recovery_inputs(context))


def _recovery_inputs(context: Context) -> RecoveryInputs:
    """Return the recovery's inputs; samples and training rows only if the recovery reads them."""
    recovery = context.run_config.recovery
    return RecoveryInputs(
        trained=context.current[TRAINED],
        built_emulator=context.built_emulator,
        samples=context.samples if recovery.statistics else None,
        training_inputs=context.training_inputs if recovery.trains else None,
        device=context.device,
        limits=context.limits,
        report=context.report,
    )
