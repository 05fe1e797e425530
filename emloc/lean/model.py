"""Make a model with an adapter lean to train: host embedding, answer loss, fewer operations."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from emloc.batching import IGNORE
from emloc.lean.embedding import HostEmbedding
from emloc.lean.loss import AnswerLoss

log = logging.getLogger(__name__)

# Called with the model's output, the labels (batch, kept) and the tokens of the whole step.
Loss = Callable[..., Tensor]

# The relative size of what rounding does to a vector in 16 bits, with room.
ROUNDING = 0.01
# Logits beyond every cap in use.
LARGE = 1e3


def keep_embedding_on_host(model: PreTrainedModel) -> int:
    """Leave the token embedding in host memory; bytes that came free on the device.

    Not one that is trained, or that also is the output matrix, or that does more than look up.
    """
    own = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if type(own) is not nn.Embedding or own.weight.requires_grad:
        return 0
    if head is not None and head.weight is own.weight:
        return 0
    size = own.weight.numel() * own.weight.element_size()
    model.set_input_embeddings(HostEmbedding(own.weight))
    return size


class Passing(nn.Module):
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
    passing = Passing(weight)
    name = next(name for name, module in model.named_modules() if module is head)
    model.set_submodule(name, passing)
    if not _only_scales(model, passing):
        model.set_submodule(name, head)
        return None
    return partial(_answer_loss, weight)


def _only_scales(model: PreTrainedModel, passing: Passing) -> bool:
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


def _answer_loss(
    weight: Tensor,
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    # The hidden state of one position is about the token of the next.
    hidden, target = outputs.logits[:, :-1], labels[:, 1:]
    learnt = target != IGNORE
    count = learnt.sum() if num_items_in_batch is None else num_items_in_batch
    count = torch.as_tensor(count, device=hidden.device)
    # Under autocast accelerate gives out a model's output in float32, which rounds back exactly.
    rows = hidden[learnt].to(weight.dtype)
    total: Tensor = AnswerLoss.apply(rows, weight, target[learnt], count)  # type: ignore[no-untyped-call]
    return total


def recompute_layers(model: PreTrainedModel) -> None:
    """Keep only what enters a layer; nothing at all below the first one with something to train.

    transformers asks for gradients of every embedding once layers are recomputed, pixels included:
    a frozen vision tower would then be recomputed and differentiated for nothing.
    """
    checkpoint_layers(model, preserve_rng_state=_draws(model))
    reached = False  # the first layer that is trained, which all above it come behind
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            trained = any(parameter.requires_grad for parameter in module.parameters())
            if not trained and not reached:
                module.gradient_checkpointing = False
            reached = reached or (trained and isinstance(module, GradientCheckpointingLayer))


def checkpoint_layers(model: PreTrainedModel, **arguments: bool) -> None:
    """Switch on what transformers computes again, without gradients of embeddings."""
    # Its name from transformers 5.23 on, which warns at the older one.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **arguments})
    model.disable_input_require_grads()


def _draws(model: nn.Module) -> bool:
    """Whether a forward pass in training draws random numbers.

    Models keep the rates of their functional dropouts under names of their own.
    """
    return any(
        (isinstance(one, _DropoutNd) and one.p > 0)
        or any(
            ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0
            for name, value in vars(one).items()
        )
        for one in model.modules()
    )
