"""The objective of model families that generate text: cross-entropy of the answer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from emloc.data.collate import IGNORE
from emloc.data.examples import Examples
from emloc.data.fixed_shapes import ANSWERS, answer_count
from emloc.data.prompts import EncodedExample
from emloc.models.objectives import Batch, Loss, Objective
from emloc.models.objectives.answer_logits import forward_logits, without_labels
from emloc.models.objectives.answer_loss import install_answer_loss
from emloc.models.objectives.token_scores import score_tokens
from emloc.tensors.nn.forward import accepts_item_count


@dataclass(frozen=True)
class TokenAnswer:
    """Scores of the correct answer to one held-out row under teacher forcing.

    The model predicts each token of the correct answer from the tokens before it. If every token is
    the most likely one, greedy decoding would generate this answer with its end token (`exact`).
    """

    id: str
    nll: float  # negative log-likelihood of the answer in nats
    tokens: int  # tokens of the answer, including the end token
    right: int  # tokens that are the model's most likely prediction

    @property
    def exact(self) -> bool:
        """Whether greedy decoding generates exactly this answer."""
        return self.right == self.tokens

    @property
    def line(self) -> dict[str, Any]:
        """The row's line in `predictions.jsonl`: all fields, and `exact`."""
        return vars(self) | {"exact": self.exact}


@dataclass(frozen=True)
class Tokens(Objective):
    """Cross-entropy of the answer tokens as loss; token accuracy and exact match as scores."""

    score_names = ("loss", "token_accuracy", "exact_match")
    writes_text = True
    measures_rows = True

    @property
    def key(self) -> list[Any]:
        """An empty list: this default objective has no settings and adds nothing to cache keys."""
        return []

    def items(self, batch: Batch) -> Tensor:
        """Number of answer tokens, without the first position, which the model does not predict."""
        if ANSWERS in batch:
            return answer_count(batch)
        return (batch["labels"][:, 1:] != IGNORE).sum()

    def loss(self, model: Any, batch: Batch, count: Tensor) -> Tensor:
        """The loss that the model itself computes from `labels`, with all its extra terms."""
        if accepts_item_count(model):
            loss: Tensor = model(**batch, num_items_in_batch=count)["loss"]
            return loss
        mean: Tensor = model(**batch)["loss"]
        return mean * (self.items(batch) / count)

    def plain_loss(self, model: Any, batch: Batch, count: Tensor) -> Tensor:
        """Cross-entropy of the answer tokens, computed in float32 or a wider dtype of the model."""
        logits, labels = _logits_and_labels(model, batch)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="sum"
        )
        return total / count

    def lean_loss(self, model: Any) -> Loss | None:
        """Loss that computes the logits in chunks of tokens; see `install_answer_loss`."""
        return install_answer_loss(model)

    def row_losses(
        self, model: Any, rows: Sequence[EncodedExample], batch: Batch
    ) -> list[tuple[float, int]]:
        """Negative log-likelihood and number of the answer tokens of each row."""
        return [(answer.nll, answer.tokens) for answer in self.answers(model, rows, batch)]

    def answers(
        self, model: Any, rows: Sequence[EncodedExample], batch: Batch
    ) -> list[TokenAnswer]:
        """Score the correct answers from one forward pass under teacher forcing."""
        logits = forward_logits(model, batch)
        assert logits is not None  # every model that generates text has logits
        scores = score_tokens(logits, batch["labels"])
        columns = (scores.nll, scores.is_answer, scores.is_right)
        sums = [column.sum(-1).tolist() for column in columns]
        return [TokenAnswer(row.id, *sums) for row, *sums in zip(rows, *sums, strict=True)]

    def summary(self, answers: Sequence[TokenAnswer], examples: Examples) -> dict[str, float]:
        """Loss (nats per token), token accuracy and exact match over all answers.

        The exact match of each group of rows is added as `exact_match/<group>`.
        """
        tokens = sum(answer.tokens for answer in answers)
        scores = {
            "loss": sum(answer.nll for answer in answers) / tokens,
            "token_accuracy": sum(answer.right for answer in answers) / tokens,
            "exact_match": sum(answer.exact for answer in answers) / len(answers),
        }
        return scores | _group_scores(answers, examples)


def _logits_and_labels(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (batch, positions, vocabulary) and the labels (batch, positions) they predict."""
    # The logits at one position predict the token at the next position.
    return model(**without_labels(batch)).logits[:, :-1], batch["labels"][:, 1:]


def _group_scores(answers: Sequence[TokenAnswer], examples: Examples) -> dict[str, float]:
    """`exact_match/<group>` -> share of exact matches, for examples that belong to a group."""
    groups = {example.id: example.group for example in examples if example.group}
    exact: dict[str, list[bool]] = {}
    for answer in answers:
        if answer.id in groups:
            exact.setdefault(groups[answer.id], []).append(answer.exact)
    return {
        f"exact_match/{group}": sum(matches) / len(matches)
        for group, matches in sorted(exact.items())
    }
