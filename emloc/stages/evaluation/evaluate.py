"""Stage 5: score the original model with the carried adapter on held-out rows."""

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
    """Score the original with what was carried to it, if anything was."""
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
    """Score the very model that was trained, adapter and all, before anything is carried."""
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
    """Write predictions and return `scores`: those of the model's objective, and lm-eval's."""
    model.eval()
    reader, objective = source.reader(), source.objective
    examples = task.held_out(settings.limit)
    encoded = encode_all(reader, examples, max_length)
    answers = objective.score(model, encoded, reader, settings.batch)
    lines = [json.dumps(answer.line) for answer in answers]
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    scores = objective.summary(answers, examples)
    if settings.harness and objective.writes_text:
        written = cast("TokenReader", reader)  # of every family that writes text
        scores |= _harness(folder, model, written, task, examples, encoded, settings)
    return {"scores": scores, "rows": len(answers)}


def _harness(
    folder: Path,
    model: PreTrainedModel,
    reader: TokenReader,
    task: Task,
    examples: Examples,
    encoded: Sequence[EncodedExample],
    settings: EvalSettings,
) -> dict[str, float]:
    """What lm-eval scores of it: its own task, or our scorer of the answers it asks for."""
    limit, size = settings.limit, settings.batch
    # lm-eval takes seconds to import.
    if isinstance(task, GenerativeTask):
        from emloc.stages.evaluation.harness import generated_answers as answers

        of = {example.id: example for example in examples}
        rows = [(of[one.id], one) for one in encoded]
        return answers.score(model, reader, task, rows, batch_size=size, folder=folder)
    if isinstance(task, TextTask) and task.lm_eval is not None:
        from emloc.stages.evaluation.harness import lm_eval_tasks as known

        words = reader.tokenizer
        return known.score(model, words, task, limit=limit, batch_size=size, folder=folder)
    return {}


def headline(task: Task, settings: EvalSettings, objective: Objective) -> str:
    """The score that stands for a run: the task's own, or token_accuracy without lm-eval.

    Raises:
        ConfigError: the model's objective or the task's scorer gives no such score, or lm-eval has
            no task of that name.
    """
    own = objective.score_names
    if not objective.writes_text and task.metric not in own:
        raise ConfigError(
            f"task.metric={task.metric}: the scores of this kind of model are {', '.join(own)}; "
            f"set task.metric={own[0]}"
        )
    if task.metric in own or not (task.lm_eval or isinstance(task, GenerativeTask)):
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
                f"task.metric={task.metric}: of these rows the scorer gives {', '.join(names)}; "
                f"set task.metric={names[0]}, or eval.limit higher"
            )
    return task.metric
