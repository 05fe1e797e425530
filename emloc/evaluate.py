"""Stage 5: score the original model with the carried adapter on held-out rows."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emloc.adapters.saved import load_on
from emloc.emulators import Built
from emloc.models.text import IGNORE, by_length, collate, encode_all
from emloc.prompts import Encoded
from emloc.settings import EvalSettings
from emloc.source import Source
from emloc.store import Artifact
from emloc.tasks import Task
from emloc.tasks.text import TextTask

log = logging.getLogger(__name__)

OWN_SCORES = ("loss", "token_accuracy", "exact_match")


@dataclass(frozen=True)
class Answer:
    """One held-out answer under the model, each token predicted from the true ones before it.

    `exact` is what greedy decoding gives: it writes the answer and then the end token if and only
    if each of these tokens is the most likely one after those before it.
    """

    id: str
    nll: float  # sum over the answer's tokens, in nats
    tokens: int  # end token included
    right: int  # tokens that are the most likely ones

    @property
    def exact(self) -> bool:
        """Whether greedy decoding gives this very answer."""
        return self.right == self.tokens


def evaluate(
    folder: Path,
    source: Source,
    carried: Artifact | None,
    task: Task,
    max_length: int,
    settings: EvalSettings,
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Score the original with what was carried to it, if anything was."""
    model = source.load(device)
    if carried is not None:
        model = load_on(model, carried.folder / "adapter").to(device)
    return _scores(folder, model, source.tokenizer(), task, max_length, settings)


def evaluate_as_trained(
    folder: Path,
    built: Built,
    trained: Artifact,
    task: Task,
    max_length: int,
    settings: EvalSettings,
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Score the very model that was trained, adapter and all, before anything is carried."""
    model = load_on(built.open(device), trained.folder / "adapter").to(device)
    return _scores(folder, model, built.source.tokenizer(), task, max_length, settings)


def _scores(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    max_length: int,
    settings: EvalSettings,
) -> dict[str, Any]:
    """Write predictions and return `scores`: loss, token_accuracy, exact_match and lm-eval's."""
    model.eval()
    encoded = encode_all(tokenizer, task.held_out(settings.limit), max_length)
    answers = answer_all(model, encoded, settings.batch, tokenizer.pad_token_id)
    lines = [json.dumps(vars(answer) | {"exact": answer.exact}) for answer in answers]
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    scores = summary(answers)
    if settings.harness and task.lm_eval is not None:
        from emloc.harness import score  # lm-eval takes seconds to import

        assert isinstance(task, TextTask)
        scores |= score(
            model, tokenizer, task, limit=settings.limit, batch_size=settings.batch, folder=folder
        )
    return {"scores": scores, "rows": len(answers)}


def headline(task: Task, settings: EvalSettings) -> str:
    """The score that stands for a run: the task's own, or token_accuracy without lm-eval.

    Raises:
        ConfigError: lm-eval has no task of that name.
    """
    if task.metric in OWN_SCORES or task.lm_eval is None:
        return task.metric
    if not settings.harness:
        log.info("eval.harness=false: %s is not computed, the score is token_accuracy", task.metric)
        return "token_accuracy"
    from emloc.harness import own_yaml

    own_yaml(task.lm_eval)
    return task.metric


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Held-out loss (nats a token), token accuracy and exact match."""
    tokens = sum(answer.tokens for answer in answers)
    return {
        "loss": sum(answer.nll for answer in answers) / tokens,
        "token_accuracy": sum(answer.right for answer in answers) / tokens,
        "exact_match": sum(answer.exact for answer in answers) / len(answers),
    }


@torch.inference_mode()
def answer_all(
    model: PreTrainedModel, encoded: Sequence[Encoded], size: int, pad: int
) -> list[Answer]:
    """Every answer under the model, in the given order."""
    found: dict[int, Answer] = {}
    for group in tqdm(by_length(encoded, size), "evaluate", unit="batch"):
        answers = _answers(model, [encoded[index] for index in group], pad)
        found |= dict(zip(group, answers, strict=True))
    return [found[index] for index in range(len(encoded))]


def _answers(model: PreTrainedModel, rows: Sequence[Encoded], pad: int) -> list[Answer]:
    batch = {key: value.to(model.device) for key, value in collate(rows, pad).items()}
    labels = batch.pop("labels")
    # The logits of one position are about the token of the next.
    logits, labels = model(**batch).logits[:, :-1].float(), labels[:, 1:]
    nll = functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none"
    )
    valid = labels != IGNORE
    right = (logits.argmax(-1) == labels) & valid
    return [
        Answer(row.id, float(nll[i].sum()), int(valid[i].sum()), int(right[i].sum()))
        for i, row in enumerate(rows)
    ]
