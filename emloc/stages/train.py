"""Train the adapter through the emulator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emloc.errors import ConfigError
from emloc.runtime.stage_cache import Facts
from emloc.stages import TRAINED, Context, Stage
from emloc.stages.training.train import train


@dataclass(frozen=True, kw_only=True)
class Train(Stage):
    """The adapter as it was trained, and its curve."""

    gives = TRAINED
    collected = MappingProxyType({"curve.jsonl": "curve.jsonl"})

    def needed(self, context: Context) -> bool:
        """Unless the method trains nothing."""
        return context.training_inputs is not None

    def together(self, context: Context) -> bool:
        """Always: each process trains on its own device."""
        return True

    def inputs(self, context: Context) -> list[Any]:
        """The emulator, and what is fitted to what."""
        return [context.built_emulator, context.training_inputs]

    def work(self, folder: Path, context: Context) -> Facts:
        """See `emloc.stages.training.train`."""
        assert context.training_inputs is not None
        _refuse_nothing_adapted(context)
        return train(
            folder,
            context.built_emulator,
            context.training_inputs,
            device=context.device,
            report=context.report,
        )


def _refuse_nothing_adapted(context: Context) -> None:
    """Refuse an emulator that leaves none of the layers to adapt, before it is opened.

    Raises:
        ConfigError: that is so.
    """
    assert context.training_inputs is not None
    if not context.built_emulator.targets(context.training_inputs.layers):
        raise ConfigError(
            f"model.lora_targets={context.run_config.model.lora_targets!r} matches none of the "
            "layers that the emulator leaves to adapt; set model.lora_targets, or emulator.first "
            "and emulator.last higher"
        )
