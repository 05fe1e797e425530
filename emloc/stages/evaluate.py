"""Score the original model with the carried adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emloc.runtime.stage_cache import Facts
from emloc.stages import CARRIED, SCORES, Context, Stage
from emloc.stages.evaluation.evaluate import evaluate


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Scores on the held-out rows, and what was answered to each."""

    gives = SCORES
    collected = MappingProxyType(
        {name: name for name in ("predictions.jsonl", "lm_eval_samples.jsonl", "answers.jsonl")}
    )

    def needed(self, context: Context) -> bool:
        """Always."""
        return True

    def inputs(self, context: Context) -> list[Any]:
        """The model, what was carried to it, the data, and how much of it."""
        run_config = context.run_config
        recovered = context.current.get(CARRIED)
        return [
            context.source,
            run_config.adapter,
            recovered,
            run_config.task,
            run_config.model.longest,
            run_config.eval,
        ]

    def work(self, folder: Path, context: Context) -> Facts:
        """See `emloc.stages.evaluation.evaluate`."""
        return evaluate(folder, *self.inputs(context), device=context.device)
