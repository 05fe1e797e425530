"""The inputs of a graph of a forward and backward pass, from a batch.

A graph begins with the vectors of the tokens instead of their ids if the table of vectors is in
host memory, or if there are images: a model with images makes the host wait for the number of its
image tokens. The vision tower has graphs of its own, one for each number of images or tiles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emloc.anchors.attached import AttachedOffsets
from emloc.anchors.batches import OFFSETS, BatchOffsets, take_offsets
from emloc.data.fixed_shapes import ANSWERS, PREDICTING, REAL_TOKENS
from emloc.models.embedded import PER_TOKEN, VECTORS, decoder_inputs
from emloc.models.image_vectors import IMAGE_POSITIONS, PIXELS, features_of, token_vectors
from emloc.models.objectives import Batch
from emloc.stages.training.capture import Capture
from emloc.tensors.lean.step_graphs import Inputs, StepGraphs

log = logging.getLogger(__name__)

# Name of the number of items of the step among the inputs of a graph.
COUNT = "count"
# The number of items of a trial, whose loss is not scaled.
ONE = torch.ones((), dtype=torch.long)
# What a model does not read itself.
_OURS = (OFFSETS, REAL_TOKENS, VECTORS, IMAGE_POSITIONS)
# Graphs of the vision tower; batches with other numbers of images or tiles are computed without.
MOST_TOWERS = 16
TOWER_WITHOUT_GRAPH = "train: the vision tower is no CUDA graph: %s"


@dataclass(frozen=True)
class Trained:
    """The model that is trained, and its loss."""

    model: Any
    inner: Any  # the transformers model inside
    device: torch.device
    anchors: AttachedOffsets | None  # the model's hooks that add offsets; None: no offsets
    loss: Callable[[Batch, Tensor], Tensor]  # of a batch and the number of items of the step

    def anchored_loss(self, batch: Batch, offsets: BatchOffsets, count: Tensor) -> Tensor:
        """Return the loss of a batch, whose offsets the model's hooks get."""
        if self.anchors is not None:
            self.anchors.offsets = offsets
        return self.loss(batch, count)


class GraphInputs:
    """Prepares the inputs of graphs."""

    def __init__(self, trained: Trained, capture: Capture) -> None:
        self._trained, self._capture = trained, capture
        self._towers = StepGraphs(self._features, capture.record, MOST_TOWERS)
        self._begins_with_vectors = capture.embedding is not None or capture.images
        self._merges = False  # whether the vectors of a batch with images are put together here

    def go_on(self, trained: Trained) -> None:
        """Prepare inputs for the same model, with other offsets or another loss."""
        self._trained = trained

    def release(self) -> None:
        """Give the memory of the vision tower's graphs back; it has none from now on."""
        self._towers.give_up()

    def flaw(self, batch: Batch) -> str:
        """Return why graphs must not begin with vectors; nothing if they may, or do not.

        If there is a reason, the inputs are those of the model from now on.
        """
        if not self._begins_with_vectors:
            return ""
        self._merges = self._capture.image_token is not None and self._merges_alike(batch)
        reason = self._flaw(batch)
        self._begins_with_vectors = not reason
        return reason

    def of(self, batch: Batch, count: Tensor, *, recorded: bool = True) -> dict[str, Tensor]:
        """Return the inputs of a graph.

        Args:
            batch: its tensors are on the device.
            count: number of items of the step.
            recorded: run the vision tower as a graph.
        """
        trained = self._trained
        batch, count = dict(batch), count.to(trained.device)
        offsets = [] if trained.anchors is None else take_offsets(batch, trained.device)
        vectors, positions = batch.pop(VECTORS, None), batch.pop(IMAGE_POSITIONS, None)
        batch.pop(REAL_TOKENS, None)
        if not self._begins_with_vectors:
            return joined(batch, offsets, count)
        if not self._capture.images:
            del batch["input_ids"]
            return joined(batch | {VECTORS: vectors}, offsets, count)
        answers = {name: batch.pop(name) for name in (PREDICTING, ANSWERS)}
        if self._merges:
            tower = self._recorded_tower if recorded else self._tower
            with torch.no_grad():
                merged = token_vectors(trained.inner, batch, vectors, positions, tower)
            reached = {name: batch[name] for name in PER_TOKEN if name in batch}
            reached[VECTORS] = merged
        else:
            reached = decoder_inputs(trained.model, trained.inner, batch)
        return joined(reached | answers, offsets, count)

    @torch.no_grad()
    def _flaw(self, batch: Batch) -> str:
        """Return why the loss behind the vectors is another one; nothing if it is the same."""
        try:
            inputs = self.of(batch, ONE, recorded=False)
        except RuntimeError as error:
            return str(error)
        with_vectors, offsets, count = split(inputs)
        plain = {name: value for name, value in batch.items() if name not in _OURS}
        losses = [self._trained.anchored_loss(b, offsets, count) for b in (plain, with_vectors)]
        if torch.equal(*losses):  # the same operations give the same bits
            return ""
        return "the model reads more than the vectors of the tokens"

    @torch.no_grad()
    def _merges_alike(self, batch: Batch) -> bool:
        """Return whether the vectors that are put together here are those of the model."""
        left_out = (*_OURS, PREDICTING, ANSWERS)
        own = {name: value for name, value in batch.items() if name not in left_out}
        if own.keys() - set(PER_TOKEN) != {"input_ids", PIXELS}:
            return False  # the model wants to know more about its images
        inner, positions = self._trained.inner, batch[IMAGE_POSITIONS]
        try:
            expected = decoder_inputs(self._trained.model, inner, own)
            actual = token_vectors(inner, own, batch.get(VECTORS), positions, self._tower)
        except RuntimeError:
            return False
        return expected.keys() - own.keys() == {VECTORS} and torch.equal(actual, expected[VECTORS])

    def _tower(self, pixels: Tensor) -> Tensor:
        return features_of(self._trained.inner, pixels)

    def _recorded_tower(self, pixels: Tensor) -> Tensor:
        """Return the features of images by the graph of their number, recorded at its first use."""
        inputs = {PIXELS: pixels}
        if reason := self._towers.prepare(inputs):
            log.info(TOWER_WITHOUT_GRAPH, reason)
        return self._towers.run(inputs)

    @torch.no_grad()
    def _features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._tower(inputs[PIXELS])


def joined(batch: Mapping[str, Tensor], offsets: BatchOffsets, count: Tensor) -> dict[str, Tensor]:
    """Return the inputs of a graph: a batch, the offsets of its places, and the count of items."""
    parts = {
        f"{OFFSETS}.{place}.{name}": part
        for place, some in enumerate(offsets)
        for name, part in some.items()
    }
    return {**batch, **parts, COUNT: count}


def split(inputs: Inputs) -> tuple[dict[str, Tensor], BatchOffsets, Tensor]:
    """Return the batch, the offsets and the count that `joined` has put together."""
    batch: dict[str, Tensor] = {}
    places: dict[int, dict[str, Tensor]] = {}
    for name, tensor in inputs.items():
        if name.startswith(f"{OFFSETS}."):
            _, place, part = name.split(".")
            places.setdefault(int(place), {})[part] = tensor
        elif name != COUNT:
            batch[name] = tensor
    return batch, [places[place] for place in sorted(places)], inputs[COUNT]
