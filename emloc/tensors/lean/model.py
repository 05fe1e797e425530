"""Make a model with an adapter lean to train: host embedding, recomputed layers."""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from emloc.tensors.lean.embedding import HostEmbedding

log = logging.getLogger(__name__)


def offload_embedding(model: PreTrainedModel) -> int:
    """Leave the token embedding in host memory; bytes that came free on the device.

    Not one that is trained, or that also is the output matrix, or that does more than look up.
    """
    try:
        own = model.get_input_embeddings()
    except NotImplementedError:  # it reads no tokens
        return 0
    head = model.get_output_embeddings()
    if type(own) is not nn.Embedding or own.weight.requires_grad:
        return 0
    if head is not None and head.weight is own.weight:
        return 0
    size = own.weight.numel() * own.weight.element_size()
    model.set_input_embeddings(HostEmbedding(own.weight))
    return size


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
