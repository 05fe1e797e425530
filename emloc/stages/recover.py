"""Carry the adapter back to the original model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emloc.calibration.samples import Samples
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
        """The recovery's settings, the adapter, the emulator, and the samples it reads."""
        recovery = context.cell.recovery
        return [recovery, context.current[TRAINED], context.built, _seen(context)]

    def work(self, folder: Path, context: Context) -> Facts:
        """Have the recovery write it."""
        return context.cell.recovery.carry(
            folder,
            context.current[TRAINED],
            context.built,
            _seen(context),
            device=context.device,
            host_bytes=context.host_bytes,
        )


def _seen(context: Context) -> Samples | None:
    return context.samples if context.cell.recovery.statistics else None
