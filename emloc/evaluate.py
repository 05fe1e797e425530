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
from transformers import PreTrainedModel

from emloc.adapters import Adapter
from emloc.adapters.none import NoAdapter
from emloc.batching import IGNORE, by_length
from emloc.emulators import Built
from emloc.errors import ConfigError
from emloc.examples import Examples
from emloc.prompts import Encoded
from emloc.reading import Reader, encode_all
from emloc.settings import EvalSettings
from emloc.source import Source
from emloc.store import Artifact
from emloc.tasks import Answered, Task
from emloc.tasks.scorers import score_names
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
    adapter: Adapter | NoAdapter,
    carried: Artifact | None,
    task: Task,
    max_length: int,
    settings: EvalSettings,
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Score the original with what was carried to it, if anything was."""
    model = source.load(device)
    if adapter.trains and carried is not None:
        model = adapter.load(model, carried.folder / "adapter").to(device)
    return _scores(folder, model, source.reader(), task, max_length, settings)


def evaluate_as_trained(
    folder: Path,
    built: Built,
    adapter: Adapter,
    trained: Artifact,
    task: Task,
    max_length: int,
    settings: EvalSettings,
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Score the very model that was trained, adapter and all, before anything is carried."""
    model = adapter.load(built.open(device), trained.folder / "adapter").to(device)
    return _scores(folder, model, built.source.reader(), task, max_length, settings)


def _scores(
    folder: Path,
    model: PreTrainedModel,
    reader: Reader,
    task: Task,
    max_length: int,
    settings: EvalSettings,
) -> dict[str, Any]:
    """Write predictions and return `scores`: loss, token_accuracy, exact_match and lm-eval's."""
    model.eval()
    examples = task.held_out(settings.limit)
    encoded = encode_all(reader, examples, max_length)
    answers = answer_all(model, encoded, settings.batch, reader)
    lines = [json.dumps(vars(answer) | {"exact": answer.exact}) for answer in answers]
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    scores = summary(answers) | by_group(answers, examples)
    if settings.harness:
        scores |= _harness(folder, model, reader, task, examples, encoded, settings)
    return {"scores": scores, "rows": len(answers)}


def _harness(
    folder: Path,
    model: PreTrainedModel,
    reader: Reader,
    task: Task,
    examples: Examples,
    encoded: Sequence[Encoded],
    settings: EvalSettings,
) -> dict[str, float]:
    """What lm-eval scores of it: its own task, or our scorer of the answers it asks for."""
    limit, size = settings.limit, settings.batch
    # lm-eval takes seconds to import.
    if isinstance(task, Answered):
        from emloc.harness import answers

        of = {example.id: example for example in examples}
        rows = [(of[one.id], one) for one in encoded]
        return answers.score(model, reader, task, rows, batch_size=size, folder=folder)
    if isinstance(task, TextTask) and task.lm_eval is not None:
        from emloc.harness import known

        words = reader.tokenizer
        return known.score(model, words, task, limit=limit, batch_size=size, folder=folder)
    return {}


def headline(task: Task, settings: EvalSettings) -> str:
    """The score that stands for a run: the task's own, or token_accuracy without lm-eval.

    Raises:
        ConfigError: lm-eval has no task of that name, or the task's scorer gives no such score.
    """
    if task.metric in OWN_SCORES or not (task.lm_eval or isinstance(task, Answered)):
        return task.metric
    if not settings.harness:
        log.info("eval.harness=false: %s is not computed, the score is token_accuracy", task.metric)
        return "token_accuracy"
    if task.lm_eval is not None:
        from emloc.harness.known import own_yaml

        own_yaml(task.lm_eval)
    if isinstance(task, Answered):
        names = score_names(task, task.held_out(settings.limit).rows)
        if task.metric not in names:
            raise ConfigError(
                f"task.metric={task.metric}: of these rows the scorer gives {', '.join(names)}; "
                f"set task.metric={names[0]}, or eval.limit higher"
            )
    return task.metric


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Held-out loss (nats a token), token accuracy and exact match."""
    tokens = sum(answer.tokens for answer in answers)
    return {
        "loss": sum(answer.nll for answer in answers) / tokens,
        "token_accuracy": sum(answer.right for answer in answers) / tokens,
        "exact_match": sum(answer.exact for answer in answers) / len(answers),
    }


def by_group(answers: Sequence[Answer], examples: Examples) -> dict[str, float]:
    """Exact match of each kind of row, where there are kinds, as `exact_match/<group>`."""
    groups = {example.id: example.group for example in examples if example.group}
    found: dict[str, list[bool]] = {}
    for answer in answers:
        if answer.id in groups:
            found.setdefault(groups[answer.id], []).append(answer.exact)
    return {f"exact_match/{group}": sum(one) / len(one) for group, one in sorted(found.items())}


@torch.inference_mode()
def answer_all(
    model: PreTrainedModel, encoded: Sequence[Encoded], size: int, reader: Reader
) -> list[Answer]:
    """Every answer under the model, in the given order."""
    found: dict[int, Answer] = {}
    with tqdm(desc="evaluate", total=len(encoded), unit="row") as bar:
        for group in by_length(encoded, size):
            answers = _answers(model, [encoded[index] for index in group], reader)
            found |= dict(zip(group, answers, strict=True))
            bar.update(len(group))
    return [found[index] for index in range(len(encoded))]


def _answers(model: PreTrainedModel, rows: Sequence[Encoded], reader: Reader) -> list[Answer]:
    batch = {key: value.to(model.device) for key, value in reader.collate(rows).items()}
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
