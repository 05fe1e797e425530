"""Whether the passes of a training can be recorded as CUDA graphs, and the batches for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from emloc.data.fixed_shapes import (
    LEAST_BATCHES,
    REAL_TOKENS,
    BatchShape,
    Collate,
    FixedShapes,
    answer_count,
    fixed_shapes,
    with_shape,
)
from emloc.models.causal import is_causal
from emloc.models.decoder import decoder_of
from emloc.models.embedded import VECTORS
from emloc.models.image_vectors import IMAGE_POSITIONS, image_positions, image_token
from emloc.runtime.distributed import is_sharded
from emloc.stages.training.order import order_of
from emloc.stages.training.trainee import Trainee
from emloc.stages.training.work import rows_of_step
from emloc.tensors.lean.embedding import HostEmbedding
from emloc.tensors.lean.step_graphs import CudaRecorder, Record

log = logging.getLogger(__name__)

# Makes what records the graphs of a device.
RECORDER: Callable[[torch.device], Record] = CudaRecorder
# Positions of padding that show whether a model needs a mask.
_TRIAL_PADDING = 16
# Relative difference of two losses that rounding can cause, by the bytes of a number.
_ROUNDING = {2: 0.02, 4: 1e-4, 8: 1e-4}
# Types of devices that have graphs.
DEVICES: tuple[str, ...] = ("cuda",)
# Log line of a training whose passes are no graphs, with the reason.
WITHOUT_GRAPHS = "train: without CUDA graphs (train.capture): %s"


@dataclass(frozen=True)
class Capture:
    """What a training needs to run its passes as graphs."""

    shapes: FixedShapes
    embedding: HostEmbedding | None  # whose rows are looked up ahead
    images: bool  # whether rows have images
    image_token: int | None  # id of the token that stands for a piece of an image, if known
    record: Record

    def collator(self, collate: Collate) -> Collate:
        """Return a function that collates rows to batches of fixed shapes."""

        def fixed(rows: list[Any]) -> dict[str, Any]:
            batch = self.shapes.collate(rows, collate)
            ids = batch["input_ids"]
            if self.embedding is not None:
                batch[VECTORS] = self.embedding.look_up(ids)
            if self.image_token is not None:
                batch[IMAGE_POSITIONS] = image_positions(ids, self.image_token)
            return batch

        return fixed


def capture_of(
    trainee: Trainee, rows: Sequence[Any], collate: Collate, first: int, end: int
) -> Capture | None:
    """Return how the steps of a training are recorded; None, with a log line, if they cannot be.

    Args:
        trainee: the model and the recipe.
        rows: encoded rows.
        collate: turns some rows into a batch, without offsets.
        first: the first step, in the order of the rows.
        end: the step behind the last one.
    """
    inputs = trainee.training_inputs
    recipe = inputs.recipe
    if not recipe.capture:
        return None
    level = logging.DEBUG if first else logging.INFO  # rounds say the same again
    has_images = any(getattr(row, "images", ()) for row in rows)
    step_rows, size = rows_of_step(recipe, len(rows)), recipe.batch
    is_uneven = step_rows > size and step_rows % size > 0
    if reason := _obstacle(trainee, rows, has_images=has_images, is_uneven=is_uneven):
        log.log(level, WITHOUT_GRAPHS, reason)
        return None
    indices = order_of(rows, recipe, inputs.seed).of_steps(0, max(recipe.steps, end))
    size = min(size, step_rows)
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    per_step = step_rows // size
    masked = _needs_mask(trainee, [rows[index] for index in indices], collate)
    examples = range(first * per_step, end * per_step)
    shapes = fixed_shapes(rows, batches, examples, masked=masked)
    if not shapes.examples:
        log.log(level, WITHOUT_GRAPHS, f"no length of batches occurs {LEAST_BATCHES} times")
        return None
    log.log(
        level,
        "train: each pass is one CUDA graph, of %d lengths up to %d; they pad batches by %.1f%%",
        *(len(shapes.shapes), shapes.shapes[-1].length, 100 * shapes.padding),
    )
    embedding = trainee.inner.get_input_embeddings()
    return Capture(
        shapes,
        embedding if isinstance(embedding, HostEmbedding) else None,
        has_images,
        image_token(trainee.inner) if has_images else None,
        RECORDER(trainee.device),
    )


def _obstacle(trainee: Trainee, rows: Sequence[Any], *, has_images: bool, is_uneven: bool) -> str:
    """Return why no graph can be recorded; nothing if one can."""
    for is_obstacle, reason in (
        (trainee.device.type not in DEVICES, f"the device is a {trainee.device.type.upper()}"),
        (is_sharded(), "the weights are split over processes (FSDP)"),
        (trainee.loss is None, "the loss is the model's own, or train.lean=false"),
        (not all(hasattr(row, "answer_start") for row in rows[:1]), "the rows are no text"),
        (
            has_images and not _trains_decoder_alone(trainee.inner),
            "the adapter lies in the vision tower, too",
        ),
        (is_uneven, "there are fewer rows than one step has, so that batches differ in size"),
    ):
        if is_obstacle:
            return reason
    return ""


@torch.no_grad()
def _needs_mask(trainee: Trainee, rows: Sequence[Any], collate: Collate) -> bool:
    """Return whether padding behind the text, without a mask, changes the loss of a row."""
    assert trainee.loss is not None
    if not is_causal(decoder_of(trainee.inner)):
        return True
    row = min(rows, key=lambda one: one.length)
    shape = BatchShape(row.length + _TRIAL_PADDING, row.length)
    losses = []
    for masked in (True, False):
        batch = dict(with_shape(collate([row]), shape, masked=masked))
        batch.pop(REAL_TOKENS, None)
        inputs = {
            name: value.to(trainee.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        count = answer_count(inputs).clamp(min=1)
        with trainee.context():
            losses.append(trainee.loss(trainee.model, inputs, count).item())
    rounding = _ROUNDING[trainee.built_emulator.source.dtype.itemsize]
    return abs(losses[0] - losses[1]) > rounding * abs(losses[0])


def _trains_decoder_alone(model: PreTrainedModel) -> bool:
    """Return whether all trained parameters belong to the decoder."""
    inside = {id(parameter) for parameter in decoder_of(model).parameters()}
    return all(id(p) in inside for p in model.parameters() if p.requires_grad)
