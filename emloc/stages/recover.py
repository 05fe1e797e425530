"""Carry the adapter back to the original model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emloc.recovery import RecoveryInputs
from emloc.runtime.stage_cache import Facts
from emloc.stages import CARRIED, TRAINED, Context, Stage


@dataclass(frozen=True, kw_only=True)
class Recover(Stage):
    """The adapter for the original model."""

    gives = CARRIED
    collected = MappingProxyType({"layers.json": "correction.json"})

    def needed(self, context: Context) -> bool:
        """Where something was trained."""
        return TRAINED in context.current

    def inputs(self, context: Context) -> list[Any]:
        """The recovery's settings, the adapter, the emulator, and what else it reads."""
        known = _inputs(context)
        rows = [known.training_inputs] if known.training_inputs is not None else []
        return [
            context.run_config.recovery,
            known.trained,
            known.built_emulator,
            known.samples,
            *rows,
        ]

    def together(self, context: Context) -> bool:
        """Where the recovery trains."""
        return context.run_config.recovery.trains

    def work(self, folder: Path, context: Context) -> Facts:
        """Have the recovery write it."""
        return context.run_config.recovery.recover(folder, _inputs(context))


def _inputs(context: Context) -> RecoveryInputs:
    recovery = context.run_config.recovery
    return RecoveryInputs(
        trained=context.current[TRAINED],
        built_emulator=context.built_emulator,
        samples=context.samples if recovery.statistics else None,
        training_inputs=context.training_inputs if recovery.trains else None,
        device=context.device,
        host_bytes=context.host_bytes,
        report=context.report,
    )
