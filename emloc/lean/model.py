"""Make a model with an adapter lean to train: host embedding, answer loss, fewer operations."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc.lean.embedding import HostEmbedding
from emloc.lean.loss import AnswerLoss
from emloc.models.text import IGNORE

log = logging.getLogger(__name__)

# Called with the model's output, the labels (batch, kept) and the tokens of the whole step.
Loss = Callable[..., Tensor]

# The relative size of what rounding does to a vector of logits in 16 bits, with room.
ROUNDING = 0.05


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


def answer_loss(model: PreTrainedModel) -> Loss | None:
    """Take the output matrix off the model and give the loss that uses it; None if it cannot be.

    The model then returns hidden states where it returned logits. Models that do more than one
    product behind their last norm (a cap, a scale) are found out on a few tokens and left alone.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return None
    name = next(name for name, module in model.named_modules() if module is head)
    ids = torch.arange(8, device=head.weight.device)[None]
    expected = _last(model, ids)
    model.set_submodule(name, nn.Identity())
    weight = head.weight
    found = _last(model, ids) @ weight.T
    if (found - expected).float().norm() > ROUNDING * expected.float().norm():
        model.set_submodule(name, head)
        return None

    def loss(
        outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        # The hidden state of one position is about the token of the next.
        hidden, target = outputs.logits[:, :-1], labels[:, 1:]
        learnt = target != IGNORE
        count = learnt.sum() if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, device=hidden.device)
        total: Tensor = AnswerLoss.apply(hidden[learnt], weight, target[learnt], count)
        return total

    return loss


@torch.no_grad()
def _last(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, -1]
    return logits


def recompute_layers(model: PreTrainedModel) -> None:
    """Keep only what enters a layer; nothing at all below the first one with something to train.

    transformers asks for gradients of every embedding once layers are recomputed, pixels included:
    a frozen vision tower would then be recomputed and differentiated for nothing.
    """
    # Its name from transformers 5.23 on, which warns at the older one.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": _draws(model)})
    model.disable_input_require_grads()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and not any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            module.gradient_checkpointing = False


def _draws(model: PreTrainedModel) -> bool:
    """Whether a forward pass in training draws random numbers."""
    drops = any(isinstance(one, nn.Dropout) and one.p > 0 for one in model.modules())
    configs = [model.config, model.config.get_text_config()]
    return drops or any(getattr(one, "attention_dropout", 0) for one in configs)
