"""Build the emulator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emloc.emulators import Given
from emloc.runtime.stage_cache import Facts
from emloc.stages import EMULATOR, STATISTICS, Context, Stage


@dataclass(frozen=True, kw_only=True)
class Emulate(Stage):
    """The emulator's files: what the original does not hold."""

    gives = EMULATOR
    collected = MappingProxyType({"layers.json": "layers.json"})

    def needed(self, context: Context) -> bool:
        """Always: the original itself is an emulator too."""
        return True

    def inputs(self, context: Context) -> list[Any]:
        """The emulator's settings, the model, and what it is built from."""
        return [context.cell.emulator, context.source, _given(context)]

    def work(self, folder: Path, context: Context) -> Facts:
        """Have the emulator write them."""
        return context.cell.emulator.build(
            folder,
            context.source,
            _given(context),
            device=context.device,
            host_bytes=context.host_bytes,
        )


def _given(context: Context) -> Given:
    samples = context.samples if context.cell.emulator.samples else None
    return Given(context.plan, context.current.get(STATISTICS), samples, context.cell.precision)
