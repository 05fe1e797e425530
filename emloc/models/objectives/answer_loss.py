"""The loss of answer tokens without the logits of them all: an optimisation of `tokens`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.data.collate import IGNORE
from emloc.models.objectives import Batch, Loss
from emloc.tensors.lean.loss import AnswerLoss

# The relative size of what rounding does to a vector in 16 bits, with room.
ROUNDING = 0.01
# Logits beyond every cap in use.
LARGE = 1e3


class IdentityHead(nn.Module):
    """In the place of the output matrix: hands the hidden states on.

    While the model is probed, it answers with `given` instead.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight  # some models ask it for its dtype
        self.given: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) as it comes, or (..., V) made up."""
        return hidden if self.given is None else self.given.expand(*hidden.shape[:-1], -1)


def answer_loss(model: PreTrainedModel) -> Loss | None:
    """Take the output matrix off the model and give the loss that uses it; None if it cannot be.

    The model then returns hidden states where it returned logits. Left alone are models whose
    logits go through more than a scale (a cap), and those whose loss has another term (a router's).
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return None
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return None
    weight = head.weight
    passing = IdentityHead(weight)
    name = next(name for name, module in model.named_modules() if module is head)
    model.set_submodule(name, passing)
    if not _only_scales(model, passing):
        model.set_submodule(name, head)
        return None
    return partial(_answer_loss, weight)


def _only_scales(model: PreTrainedModel, passing: IdentityHead) -> bool:
    """Whether what stands behind the head is a scale, which hidden states go through as well.

    Logits far larger than any that weights may give, so that no cap stays unseen.
    """
    weight = passing.weight
    words = torch.linspace(-LARGE, LARGE, len(weight), device=weight.device, dtype=weight.dtype)
    passing.given = words
    ids = torch.arange(8, device=weight.device)[None]
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    passing.given = None
    given = words.float()
    scale = (found @ given) / (given @ given)
    return bool((found - scale * given).norm() <= ROUNDING * found.norm())


def _answer_loss(weight: Tensor, model: Any, batch: Batch, count: Tensor) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    # The hidden state of one position is about the token of the next.
    hidden, target = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    learnt = target != IGNORE
    count = torch.as_tensor(count, device=hidden.device)
    # Under autocast accelerate gives out a model's output in float32, which rounds back exactly.
    rows = hidden[learnt].to(weight.dtype)
    total: Tensor = AnswerLoss.apply(rows, weight, target[learnt], count)  # type: ignore[no-untyped-call]
    return total
