"""Score the very model that was trained, where it is held in a packed format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc.runtime.stage_cache import Facts
from emloc.stages import SCORES_AS_TRAINED, TRAINED, Context, Stage
from emloc.stages.evaluation.evaluate import evaluate_as_trained


@dataclass(frozen=True, kw_only=True)
class EvaluateAsTrained(Stage):
    """Scores of the model as it was trained, beside those of what was carried from it."""

    gives = SCORES_AS_TRAINED
    logged_as = "as_trained"

    def needed(self, context: Context) -> bool:
        """Where something was trained that is held in a packed format."""
        return TRAINED in context.current and context.run_config.precision is not None

    def inputs(self, context: Context) -> list[Any]:
        """The emulator, the adapter, the data, and how much of it."""
        run_config, trained = context.run_config, context.current[TRAINED]
        return [
            context.built_emulator,
            run_config.adapter,
            trained,
            run_config.task,
            run_config.model.longest,
            run_config.eval,
        ]

    def work(self, folder: Path, context: Context) -> Facts:
        """See `emloc.stages.evaluation.evaluate`."""
        return evaluate_as_trained(folder, *self.inputs(context), device=context.device)
