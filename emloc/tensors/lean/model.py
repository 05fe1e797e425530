"""Save memory in a model with an adapter: embedding in host memory, recomputed layers."""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from emloc.tensors.lean.embedding import HostEmbedding

log = logging.getLogger(__name__)


def offload_embedding(model: PreTrainedModel) -> int:
    """Move the token embedding to host memory; return the freed bytes on the device.

    Nothing is moved, and 0 returned, if the embedding is trained, is tied to the output layer, or
    is not a plain `nn.Embedding`.
    """
    embedding = separate_embedding(model)
    if embedding is None or embedding.weight.requires_grad:
        return 0
    size, device = embedding.weight.nbytes, embedding.weight.device
    model.set_input_embeddings(HostEmbedding(embedding.weight))
    del embedding
    if device.type == "cuda":
        # Smaller tensors would settle in its place, and CUDA graphs could not use the rest of it.
        torch.cuda.empty_cache()
    return size


def separate_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """Return the token embedding of a model; None if it has none that can be replaced.

    It cannot if it is tied to the output layer, or is not a plain `nn.Embedding`.
    """
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # the model reads no tokens
        return None
    head = model.get_output_embeddings()
    if type(embedding) is not nn.Embedding:
        return None
    if head is not None and head.weight is embedding.weight:
        return None
    return embedding


def recompute_layers(model: PreTrainedModel) -> None:
    """Enable activation checkpointing from the first layer with trainable parameters on.

    Checkpointed layers save only their inputs; layers below the first trained one need no backward
    pass and save nothing. By itself, transformers would request gradients of every embedding, even
    of pixels, so a frozen vision tower would be recomputed and differentiated in vain.
    """
    checkpoint_layers(model, preserve_rng_state=_uses_random_numbers(model))
    reached = False  # whether the first layer with trainable parameters was passed
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            trained = any(parameter.requires_grad for parameter in module.parameters())
            if not trained and not reached:
                module.gradient_checkpointing = False
            reached = reached or (trained and isinstance(module, GradientCheckpointingLayer))


def checkpoint_layers(model: PreTrainedModel, **arguments: bool) -> None:
    """Enable the activation checkpointing of transformers, without gradients of embeddings."""
    # The name since transformers 5.23, which warns if the older name is called.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **arguments})
    model.disable_input_require_grads()


def _uses_random_numbers(model: nn.Module) -> bool:
    """Whether a forward pass in training mode draws random numbers, by dropout or jitter.

    Rates of functional dropouts are attributes whose names differ between models, so any positive
    float with "drop" or "jitter" in its name counts.
    """
    return any(
        (isinstance(module, _DropoutNd) and module.p > 0)
        or any(
            ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0
            for name, value in vars(module).items()
        )
        for module in model.modules()
    )
