"""Cross-entropy of the answer's tokens: the objective of every family that writes text."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from torch.nn import functional

from emloc.data.collate import IGNORE
from emloc.data.examples import Examples
from emloc.data.prompts import EncodedExample
from emloc.models.objectives import Batch, Loss, Objective
from emloc.models.objectives.answer_loss import answer_loss


@dataclass(frozen=True)
class TokenAnswer:
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

    @property
    def line(self) -> dict[str, Any]:
        """See Answer."""
        return vars(self) | {"exact": self.exact}


@dataclass(frozen=True)
class Tokens(Objective):
    """The model's own loss of `labels`, and from the same logits the match of greedy decoding."""

    score_names = ("loss", "token_accuracy", "exact_match")
    writes_text = True

    @property
    def key(self) -> list[Any]:
        """Nothing: it has no settings, and was there before others were."""
        return []

    def items(self, batch: Batch) -> Tensor:
        """Answer tokens. Nothing predicts the token at the first position."""
        return (batch["labels"][:, 1:] != IGNORE).sum()

    def loss(self, model: Any, batch: Batch, count: Tensor) -> Tensor:
        """The loss that the model computes of `labels`, with every further term it has."""
        if _takes_count(model):
            loss: Tensor = model(**batch, num_items_in_batch=count)["loss"]
            return loss
        mean: Tensor = model(**batch)["loss"]
        return mean * (self.items(batch) / count)

    def plain_loss(self, model: Any, batch: Batch, count: Tensor) -> Tensor:
        """Cross-entropy of the logits, in float32 or the model's dtype where that is wider."""
        logits, labels = _shifted(model, batch)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = functional.cross_entropy(
            wide.transpose(1, 2), labels, ignore_index=IGNORE, reduction="sum"
        )
        return total / count

    def lean_loss(self, model: Any) -> Loss | None:
        """Of hidden states, a piece of the vocabulary's logits at a time; see `answer_loss`."""
        return answer_loss(model)

    def answers(
        self, model: Any, rows: Sequence[EncodedExample], batch: Batch
    ) -> list[TokenAnswer]:
        """See Objective."""
        logits, labels = _shifted(model, batch)
        logits = logits.float()
        nll = functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none"
        )
        valid = labels != IGNORE
        right = (logits.argmax(-1) == labels) & valid
        return [
            TokenAnswer(row.id, float(nll[i].sum()), int(valid[i].sum()), int(right[i].sum()))
            for i, row in enumerate(rows)
        ]

    def summary(self, answers: Sequence[TokenAnswer], examples: Examples) -> dict[str, float]:
        """Held-out loss (nats a token), token accuracy, exact match; the last of each group too.

        A group's exact match is called `exact_match/<group>`.
        """
        tokens = sum(answer.tokens for answer in answers)
        whole = {
            "loss": sum(answer.nll for answer in answers) / tokens,
            "token_accuracy": sum(answer.right for answer in answers) / tokens,
            "exact_match": sum(answer.exact for answer in answers) / len(answers),
        }
        return whole | _by_group(answers, examples)


def _shifted(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (batch, positions, vocabulary), and the labels (batch, positions) they are about."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    # The logits of one position are about the token of the next.
    return model(**inputs).logits[:, :-1], batch["labels"][:, 1:]


def _by_group(answers: Sequence[TokenAnswer], examples: Examples) -> dict[str, float]:
    groups = {example.id: example.group for example in examples if example.group}
    exact: dict[str, list[bool]] = {}
    for answer in answers:
        if answer.id in groups:
            exact.setdefault(groups[answer.id], []).append(answer.exact)
    return {f"exact_match/{group}": sum(one) / len(one) for group, one in sorted(exact.items())}


def _takes_count(model: Any) -> bool:
    """Whether the model divides its loss by a count it is given, not by that of the one batch.

    By the rule of transformers' Trainer: a class says so, or its forward takes any keyword.
    """
    inner = extract_model_from_parallel(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if hasattr(inner, "accepts_loss_kwargs"):
        return bool(inner.accepts_loss_kwargs)
    parameters = inspect.signature(inner.forward).parameters.values()
    return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
