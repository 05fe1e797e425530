"""The vectors of the tokens of a batch with images, from vision tower and table of vectors alone.

Most models put the features of images in the place of the vectors of image tokens. Their own
forward pass does that with checks for which the host waits until the GPU has nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Names in a batch: the pixels of all images, and the indices of the image tokens in the flat batch.
PIXELS, IMAGE_POSITIONS = "pixel_values", "image_positions"

# Returns the features (N, d) of the image tokens of a batch, from its pixels.
Tower = Callable[[Tensor], Tensor]


def image_token(model: Any) -> int | None:
    """Return the id of the token that stands for a piece of an image.

    None if the model has none, or if the id has no row in the table of vectors.
    """
    token = getattr(model.config, "image_token_id", None)
    if not isinstance(token, int) or not hasattr(model, "get_image_features"):
        return None
    return token if token < model.get_input_embeddings().weight.shape[0] else None


def image_positions(ids: Tensor, token: int) -> Tensor:
    """Return the indices (N,) of the image tokens in the flat batch of ids (B, L)."""
    return (ids.flatten() == token).nonzero().squeeze(1)


def features_of(model: Any, pixels: Tensor) -> Tensor:
    """Return the features (N, d) of the image tokens, in their order.

    Raises:
        RuntimeError: the model returns no tensors of such features.
    """
    output = model.get_image_features(pixel_values=pixels)
    features = getattr(output, "pooler_output", output)
    if isinstance(features, list | tuple) and all(isinstance(one, Tensor) for one in features):
        features = torch.cat([one.flatten(0, -2) for one in features])
    if not isinstance(features, Tensor):
        raise RuntimeError("the model returns no features of images")
    return features.flatten(0, -2)


def token_vectors(
    model: Any,
    batch: Mapping[str, Tensor],
    vectors: Tensor | None,
    positions: Tensor,
    tower: Tower,
) -> Tensor:
    """Return the vectors (B, L, d) of all tokens of a batch.

    Args:
        model: the transformers model.
        batch: with ids (B, L), and `PIXELS` if it has images.
        vectors: of the ids in the table; None: they are looked up.
        positions: indices (N,) of the image tokens in the flat batch.
        tower: computes features.
    """
    if vectors is None:
        vectors = model.get_input_embeddings()(batch["input_ids"])
    if PIXELS not in batch:
        return vectors
    features = tower(batch[PIXELS]).to(vectors.dtype)
    return vectors.flatten(0, 1).index_copy(0, positions, features).view_as(vectors)
