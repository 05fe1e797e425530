"""Build the emulator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emloc.emulators import BuildInputs
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
        return [context.run_config.emulator, context.source, _build_inputs(context)]

    def work(self, folder: Path, context: Context) -> Facts:
        """Have the emulator write them."""
        return context.run_config.emulator.build(
            folder,
            context.source,
            _build_inputs(context),
            device=context.device,
            host_bytes=context.host_bytes,
        )


def _build_inputs(context: Context) -> BuildInputs:
    samples = context.samples if context.run_config.emulator.samples else None
    return BuildInputs(
        context.plan, context.current.get(STATISTICS), samples, context.run_config.precision
    )
