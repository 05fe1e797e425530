"""The emulator stage: build the emulator from the original model."""

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
    """Stage that builds the emulator and writes the weights it does not share with the original."""

    gives = EMULATOR
    collected = MappingProxyType({"layers.json": "layers.json"})

    def needed(self, context: Context) -> bool:
        """Return True: every run has an emulator, if only the original model itself."""
        return True

    def inputs(self, context: Context) -> list[Any]:
        """Return the emulator's settings, the model and the inputs of the build."""
        return [context.run_config.emulator, context.source, _build_inputs(context)]

    def work(self, folder: Path, context: Context) -> Facts:
        """Build the emulator and write its files into `folder`."""
        return context.run_config.emulator.build(
            folder,
            context.source,
            _build_inputs(context),
            device=context.device,
            limits=context.limits,
        )


def _build_inputs(context: Context) -> BuildInputs:
    """Return the inputs of the build: plan, cached moments, samples and packed format."""
    emulator, precision = context.run_config.emulator, context.run_config.precision
    samples = context.samples if emulator.reads_samples(precision) else None
    return BuildInputs(context.plan, context.current.get(STATISTICS), samples, precision)
