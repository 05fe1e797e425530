"""The training stage: train the adapter on the emulator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emloc.anchors import Anchor
from emloc.errors import ConfigError
from emloc.runtime.stage_cache import Facts
from emloc.stages import ANCHORS, TRAINED, Context, Stage
from emloc.stages.anchor import first_round
from emloc.stages.training.refit import refit_of
from emloc.stages.training.rounds import ROUNDS_FILE, rounds_of
from emloc.stages.training.train import train
from emloc.stages.training.trainee import open_trainee


@dataclass(frozen=True, kw_only=True)
class Train(Stage):
    """Stage that writes the trained adapter and its training curve."""

    gives = TRAINED
    collected = MappingProxyType({"curve.jsonl": "curve.jsonl", ROUNDS_FILE: ROUNDS_FILE})

    def needed(self, context: Context) -> bool:
        """Return whether the method trains an adapter."""
        return context.training_inputs is not None

    def together(self, context: Context) -> bool:
        """Return True: every process of a launch trains, each on its own device."""
        return True

    def inputs(self, context: Context) -> list[Any]:
        """Return the emulator and the inputs of the training: adapter, layers, rows and recipe."""
        anchor = context.run_config.anchor
        anchored: list[Any] = []
        if anchor.anchors:
            samples = context.samples if anchor.refit else None
            anchored = [anchor, context.run_config.recovery, samples]
        return [context.trained_emulator, context.training_inputs, *anchored]

    def work(self, folder: Path, context: Context) -> Facts:
        """Train the adapter and write it into `folder`."""
        assert context.training_inputs is not None
        _require_adapted_layers(context)
        if context.run_config.anchor.anchors:
            return _train_anchored(folder, context, context.run_config.anchor)
        return train(
            folder,
            context.trained_emulator,
            context.training_inputs,
            device=context.device,
            report=context.report,
            keeper=context.keeper,
        )


def _train_anchored(folder: Path, context: Context, anchor: Anchor) -> Facts:
    """Train in rounds, with offsets of the original's hidden states."""
    assert context.training_inputs is not None
    rows = context.anchored_rows
    recorded = context.current.get(ANCHORS)
    train_rounds = partial(
        rounds_of,
        folder,
        rows=rows,
        recovery=context.run_config.recovery,
        first_pass=first_round(recorded) if recorded is not None else None,
        limits=context.limits,
        report=context.report,
    )
    to_open = (context.trained_emulator, context.training_inputs, context.device)
    if anchor.refit:
        refit = refit_of(rows, context.samples, context.trained_emulator)
        return train_rounds(open_trainee(*to_open), refit=refit).run()
    if context.keeper is None:
        return train_rounds(open_trainee(*to_open)).run()
    with context.keeper.opened(*to_open) as entry:
        return train_rounds(entry.trainee, kept_passes=entry.passes).run()


def _require_adapted_layers(context: Context) -> None:
    """Check, before the emulator is loaded, that some layers to adapt remain in the emulator.

    Raises:
        ConfigError: none of the layers that `model.lora_targets` matches is in the emulator.
    """
    assert context.training_inputs is not None
    if not context.built_emulator.targets(context.training_inputs.layers):
        raise ConfigError(
            f"model.lora_targets={context.run_config.model.lora_targets!r} matches none of the "
            "layers that the emulator leaves to adapt; set model.lora_targets, or emulator.first "
            "and emulator.last higher"
        )
