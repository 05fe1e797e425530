"""The polish stage: improve the recovered adapter on the original model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emloc.data.collate import EncodedRow
from emloc.data.reader import encode_all
from emloc.runtime.stage_cache import Facts
from emloc.stages import RECOVERED, Context, Stage
from emloc.stages.polishing import PolishInputs
from emloc.stages.training.order import order_of


@dataclass(frozen=True, kw_only=True)
class PolishAdapter(Stage):
    """Stage that turns the recovered adapter into a better one."""

    gives = RECOVERED
    collected = MappingProxyType({"curve.jsonl": "polish_curve.jsonl"})

    def needed(self, context: Context) -> bool:
        """Return whether the run has an adapter, and polishes it."""
        return context.run_config.polish.polishes and RECOVERED in context.current

    def check(self, context: Context) -> None:
        """Let the method check the launch.

        Raises:
            ConfigError: it does not work so.
        """
        if context.run_config.polish.polishes:
            context.run_config.polish.check()

    def together(self, context: Context) -> bool:
        """Return True: all processes of a launch train."""
        return True

    def inputs(self, context: Context) -> list[Any]:
        """Return the adapter, the original and the inputs of the training.

        The adapter's key contains the anchors, which leave some rows out of a training.
        """
        return [
            context.run_config.polish,
            context.current[RECOVERED],
            context.source,
            context.training_inputs,
        ]

    def work(self, folder: Path, context: Context) -> Facts:
        """Write the better adapter into `folder`."""
        polish = context.run_config.polish
        assert polish.polishes
        assert context.training_inputs is not None
        # The lines of the training's own log are followed by those of this one.
        done = context.training_inputs.recipe.steps
        return polish.polish(
            folder,
            PolishInputs(
                recovered=context.current[RECOVERED],
                source=context.source,
                training_inputs=context.training_inputs,
                next_rows=lambda steps: next_rows(context, steps),
                device=context.device,
                report=lambda step, values: context.report(done + step, values),
            ),
        )


def next_rows(context: Context, steps: int) -> Sequence[EncodedRow]:
    """Return the rows of so many steps behind those of the training, in the order of its seed."""
    inputs = context.training_inputs
    assert inputs is not None
    done = inputs.recipe.steps
    if context.run_config.anchor.anchors:
        anchored = context.anchored_rows
        return [keyed.row for keyed in anchored.of_steps(done, done + steps)]
    rows = encode_all(context.source.reader(), inputs.examples, inputs.max_length)
    order = order_of(rows, inputs.recipe, inputs.seed)
    return [rows[index] for index in order.of_steps(done, done + steps)]
