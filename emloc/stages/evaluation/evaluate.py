"""Score a model on held-out rows: the original with the recovered adapter, or the emulator."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from emloc.adapters import Adapter
from emloc.adapters.none import NoAdapter
from emloc.config.settings import EvalSettings
from emloc.data.examples import Examples
from emloc.data.prompts import EncodedExample
from emloc.data.reader import TokenReader, encode_all
from emloc.emulators import BuiltEmulator
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.models.objectives import Objective
from emloc.runtime.stage_cache import Artifact
from emloc.tasks import GenerativeTask, Task
from emloc.tasks.scorers import score_names
from emloc.tasks.text import TextTask

log = logging.getLogger(__name__)


def evaluate(
    folder: Path,
    source: Source,
    adapter: Adapter | NoAdapter,
    recovered: Artifact | None,
    task: Task,
    max_length: int | None,
    settings: EvalSettings,
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Score the original model, with the recovered adapter if the run has one.

    Returns:
        `scores` by metric and the number of `rows`. `folder` receives predictions and answers.
    """
    model = source.load(device)
    if adapter.trains and recovered is not None:
        model = adapter.load(model, recovered.folder / "adapter").to(device)
    return _scores(folder, model, source, task, max_length, settings)


def evaluate_as_trained(
    folder: Path,
    built_emulator: BuiltEmulator,
    adapter: Adapter,
    trained: Artifact,
    task: Task,
    max_length: int | None,
    settings: EvalSettings,
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Score the emulator with the trained adapter, before the adapter is recovered.

    Returns:
        `scores` by metric and the number of `rows`. `folder` receives predictions and answers.
    """
    model = adapter.load(built_emulator.open(device), trained.folder / "adapter").to(device)
    return _scores(folder, model, built_emulator.source, task, max_length, settings)


def _scores(
    folder: Path,
    model: PreTrainedModel,
    source: Source,
    task: Task,
    max_length: int | None,
    settings: EvalSettings,
) -> dict[str, Any]:
    """Write predictions and return `scores` (the objective's and lm-eval's) and `rows`."""
    model.eval()
    reader, objective = source.reader(), source.objective
    examples = task.held_out(settings.limit)
    encoded = encode_all(reader, examples, max_length)
    answers = objective.score(model, encoded, reader, settings.batch)
    lines = [json.dumps(answer.line) for answer in answers]
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    scores = objective.summary(answers, examples)
    if settings.harness and objective.writes_text:
        # Every model family that writes text has a TokenReader.
        token_reader = cast("TokenReader", reader)
        scores |= _lm_eval_scores(folder, model, token_reader, task, examples, encoded, settings)
    return {"scores": scores, "rows": len(answers)}


def _lm_eval_scores(
    folder: Path,
    model: PreTrainedModel,
    reader: TokenReader,
    task: Task,
    examples: Examples,
    encoded: Sequence[EncodedExample],
    settings: EvalSettings,
) -> dict[str, float]:
    """Return the scores of a task that lm-eval runs; empty if lm-eval has no part in the task.

    lm-eval generates the answers of a `GenerativeTask`, which our scorers judge. A text task may
    name one of lm-eval's own tasks, which lm-eval judges as well.
    """
    limit, batch_size = settings.limit, settings.batch
    # Imported here, since importing lm-eval takes seconds.
    if isinstance(task, GenerativeTask):
        from emloc.stages.evaluation.harness import generated_answers

        examples_by_id = {example.id: example for example in examples}
        rows = [(examples_by_id[row.id], row) for row in encoded]
        return generated_answers.score(
            model, reader, task, rows, batch_size=batch_size, folder=folder
        )
    if isinstance(task, TextTask) and task.lm_eval is not None:
        from emloc.stages.evaluation.harness import lm_eval_tasks

        tokenizer = reader.tokenizer
        return lm_eval_tasks.score(
            model, tokenizer, task, limit=limit, batch_size=batch_size, folder=folder
        )
    return {}


def headline(task: Task, settings: EvalSettings, objective: Objective) -> str:
    """Return the name of a run's headline score.

    The headline score is `task.metric`; without lm-eval, which computes most of them, it is
    `token_accuracy`.

    Raises:
        ConfigError: neither the model's objective nor the task's scorer computes `task.metric`, or
            lm-eval has no task named `task.lm_eval`.
    """
    objective_scores = objective.score_names
    if not objective.writes_text and task.metric not in objective_scores:
        raise ConfigError(
            f"task.metric={task.metric}: the scores of this kind of model are "
            f"{', '.join(objective_scores)}; set task.metric={objective_scores[0]}"
        )
    if task.metric in objective_scores or not (task.lm_eval or isinstance(task, GenerativeTask)):
        return task.metric
    if not settings.harness:
        log.info(
            "evaluate: %s needs eval.harness=true; without it the score is token_accuracy",
            task.metric,
        )
        return "token_accuracy"
    if task.lm_eval is not None:
        from emloc.stages.evaluation.harness.lm_eval_tasks import own_yaml

        own_yaml(task.lm_eval)
    if isinstance(task, GenerativeTask):
        names = score_names(task, task.held_out(settings.limit).rows)
        if task.metric not in names:
            raise ConfigError(
                f"task.metric={task.metric}: the scores of these rows are {', '.join(names)}; "
                f"set task.metric={names[0]}, or eval.limit higher"
            )
    return task.metric
