"""The evaluation stage: score the original model with the recovered adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emloc.runtime.stage_cache import Facts
from emloc.stages import RECOVERED, SCORES, Context, Stage
from emloc.stages.evaluation.evaluate import evaluate


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Stage that scores the final model on held-out rows and writes its answers."""

    gives = SCORES
    collected = MappingProxyType(
        {name: name for name in ("predictions.jsonl", "lm_eval_samples.jsonl", "answers.jsonl")}
    )

    def needed(self, context: Context) -> bool:
        """Return True: every run is scored, also one that trains nothing."""
        return True

    def inputs(self, context: Context) -> list[Any]:
        """Return the model, the recovered adapter, the task and the settings of the evaluation."""
        run_config = context.run_config
        recovered = context.current.get(RECOVERED)
        return [
            context.source,
            run_config.adapter,
            recovered,
            run_config.task,
            run_config.model.length_limit,
            run_config.eval,
        ]

    def work(self, folder: Path, context: Context) -> Facts:
        """Write predictions and answers into `folder` and return the scores."""
        return evaluate(folder, *self.inputs(context), device=context.device)
