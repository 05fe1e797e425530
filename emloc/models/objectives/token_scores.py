"""Likelihood and rank of each answer token, from the logits of a few tokens at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from emloc.data.collate import IGNORE
from emloc.models.objectives.answer_logits import Logits
from emloc.tensors.lean.loss import chunks


@dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens behind each position but the last, all (B, L - 1)."""

    nll: Tensor  # float32, negative log-likelihood in nats; 0 if the token is no answer token
    is_answer: Tensor
    is_right: Tensor  # whether an answer token is the model's most likely prediction


def score_tokens(logits: Logits, labels: Tensor) -> TokenScores:
    """Score the answer tokens, which are the tokens with labels (B, L); the first has no score."""
    # The logits at one position predict the token at the next position.
    targets = labels[:, 1:]
    is_answer = targets != IGNORE
    nll = torch.zeros(targets.shape, device=targets.device)
    is_right = torch.zeros_like(is_answer)
    rows, positions = is_answer.nonzero(as_tuple=True)
    for chunk in chunks(len(rows), logits.vocabulary):
        indices = rows[chunk], positions[chunk]
        values = logits.at(*indices).float()
        nll[indices] = functional.cross_entropy(values, targets[indices], reduction="none")
        is_right[indices] = values.argmax(-1) == targets[indices]
    return TokenScores(nll, is_answer, is_right)
