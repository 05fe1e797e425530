"""Score the packed model that was trained, before its adapter is recovered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc.runtime.stage_cache import Facts
from emloc.stages import SCORES_AS_TRAINED, TRAINED, Context, Stage
from emloc.stages.evaluation.evaluate import evaluate_as_trained


@dataclass(frozen=True, kw_only=True)
class EvaluateAsTrained(Stage):
    """Stage that scores the packed model, to compare with the original plus recovered adapter."""

    gives = SCORES_AS_TRAINED
    logged_as = "as_trained"

    def needed(self, context: Context) -> bool:
        """Return whether the run has trained an adapter on weights in a packed format."""
        return TRAINED in context.current and context.run_config.precision is not None

    def inputs(self, context: Context) -> list[Any]:
        """Return the emulator, the trained adapter, the task and the settings of the evaluation."""
        run_config, trained = context.run_config, context.current[TRAINED]
        return [
            context.emulator_with_tower,
            run_config.adapter,
            trained,
            run_config.task,
            run_config.model.length_limit,
            run_config.eval,
        ]

    def work(self, folder: Path, context: Context) -> Facts:
        """Write predictions and answers into `folder` and return the scores."""
        return evaluate_as_trained(folder, *self.inputs(context), device=context.device)
