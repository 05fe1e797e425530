"""The passes of a training as graphs, or without graphs if a model turns out not to allow them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emloc.anchors.attached import AttachedOffsets
from emloc.anchors.batches import OFFSETS, BatchOffsets, take_offsets
from emloc.data.fixed_shapes import ANSWERS, MOST_SHAPES, PREDICTING, REAL_TOKENS
from emloc.models.causal import unmasked
from emloc.models.embedded import PER_TOKEN, VECTORS, decoder_inputs
from emloc.models.image_vectors import (
    IMAGE_POSITIONS,
    PIXELS,
    Tower,
    features_of,
    token_vectors,
)
from emloc.models.objectives import Batch
from emloc.runtime.progress import duration
from emloc.stages.training.capture import WITHOUT_GRAPHS, Capture
from emloc.tensors.lean.flat_gradients import FlatGradients
from emloc.tensors.lean.step_graphs import Inputs, StepGraphs

log = logging.getLogger(__name__)

# Name of the number of items of the step among the inputs of a graph.
COUNT = "count"
# Graphs of the vision tower; batches with other numbers of images or tiles are computed without.
MOST_TOWERS = 16
# Log line behind the first graphs.
RECORDED = "train: recorded %d graphs in %s"
TOWER_WITHOUT_GRAPH = "train: each operation of the vision tower is launched by itself: %s"


@dataclass(frozen=True)
class Trained:
    """The model that is trained, and its loss."""

    model: Any
    inner: Any  # the transformers model inside
    device: torch.device
    anchors: AttachedOffsets | None  # the model's hooks that add offsets; None: no offsets
    loss: Callable[[Batch, Tensor], Tensor]  # of a batch and the number of items of the step


class GraphedPasses:
    """Runs forward and backward passes, whose gradients are flat.

    A graph begins with the vectors of the tokens if the table of vectors is in host memory, or if
    the model has images, since models wait for the number of image tokens. The vision tower has
    graphs of its own, one for each number of images or tiles.
    """

    def __init__(self, trained: Trained, capture: Capture, gradients: FlatGradients) -> None:
        self.gradients = gradients
        self._trained, self._capture = trained, capture
        self._begins_with_vectors = capture.embedding is not None or capture.images
        self._graphs = StepGraphs(self._compute, capture.record, MOST_SHAPES)
        self._towers = StepGraphs(self._features, capture.record, MOST_TOWERS)
        self._merges = False  # whether the vectors of a batch with images are put together here

    def prepare(self, examples: Callable[[], Iterable[Batch]]) -> None:
        """Record a graph for each of some batches; the longest come first.

        If that fails, all passes run without graphs, and a log line says why. `examples` yields the
        batches, and is called twice: each pass first runs as it is, so that libraries have loaded
        their kernels for its shape before the first graph is recorded.
        """
        begun = time.perf_counter()
        for number, batch in enumerate(examples()):
            if number == 0 and self._begins_with_vectors:
                self._merges = self._capture.image_token is not None and self._merges_alike(batch)
                if reason := self._flaw(batch):
                    self._begins_with_vectors = False
                    self._give_up(reason)
                    return
            inputs = self._inputs(batch, _one(self._trained.device), self._tower)
            with self._kept_gradients():
                self._compute(inputs)
        for batch in examples():
            self._record(self._inputs(batch, _one(self._trained.device), self._recorded_tower))
        if len(self._graphs):
            log.info(RECORDED, len(self._graphs), duration(time.perf_counter() - begun))

    def run(self, batch: Batch, count: Tensor) -> Tensor:
        """Return the loss of a pass, a scalar, and add its gradients."""
        self.gradients.attach()  # a wrapper of the model may have dropped them
        count = count.to(self._trained.device)
        inputs = self._inputs(batch, count, self._recorded_tower)
        self._record(inputs)
        return self._graphs.run(inputs)

    def _record(self, inputs: Inputs) -> None:
        """Record the graph of the shape of some inputs, unless there is one."""
        if not self._graphs.is_new(inputs):
            return
        with self._kept_gradients():
            try:
                self._graphs.prepare(inputs)
            except RuntimeError as error:
                self._give_up(str(error).strip().splitlines()[0])

    @contextmanager
    def _kept_gradients(self) -> Iterator[None]:
        """Undo what passes inside the block add to the gradients."""
        before = [flat.clone() for flat in self.gradients.flat]
        yield
        torch._foreach_copy_(self.gradients.flat, before)

    def _give_up(self, reason: str) -> None:
        log.warning(WITHOUT_GRAPHS, reason)
        self._graphs = StepGraphs(self._compute, self._capture.record, 0)

    @torch.no_grad()
    def _flaw(self, batch: Batch) -> str:
        """Return why a graph must not begin with vectors; nothing if the loss is the same."""
        try:
            inputs = self._inputs(batch, _one(self._trained.device), self._tower)
        except RuntimeError as error:
            return str(error)
        with_vectors, offsets, count = split(inputs)
        left_out = (VECTORS, OFFSETS, REAL_TOKENS, IMAGE_POSITIONS)
        plain = {name: value for name, value in batch.items() if name not in left_out}
        losses = [self._loss(one, offsets, count) for one in (plain, with_vectors)]
        if torch.equal(*losses):  # the same operations give the same bits
            return ""
        return "the model reads more than the vectors of the tokens"

    @torch.no_grad()
    def _merges_alike(self, batch: Batch) -> bool:
        """Return whether the vectors that are put together here are those of the model."""
        left_out = (OFFSETS, REAL_TOKENS, PREDICTING, ANSWERS, VECTORS, IMAGE_POSITIONS)
        own = {name: value for name, value in batch.items() if name not in left_out}
        if own.keys() - set(PER_TOKEN) != {"input_ids", PIXELS}:
            return False  # the model wants to know more about its images
        inner = self._trained.inner
        try:
            expected = decoder_inputs(self._trained.model, inner, own)
            actual = token_vectors(inner, batch, batch.get(VECTORS), self._tower)
        except RuntimeError:
            return False
        return expected.keys() - own.keys() == {VECTORS} and torch.equal(actual, expected[VECTORS])

    def _inputs(self, batch: Batch, count: Tensor, tower: Tower) -> dict[str, Tensor]:
        """Return the inputs of a graph for a batch, whose tensors are on the device."""
        trained, batch = self._trained, dict(batch)
        offsets = [] if trained.anchors is None else take_offsets(batch, trained.device)
        batch.pop(REAL_TOKENS, None)
        if not self._begins_with_vectors:
            batch.pop(VECTORS, None)
            return joined(batch, offsets, count)
        if not self._capture.images:
            del batch["input_ids"]
            return joined(batch, offsets, count)
        vectors = batch.pop(VECTORS, None)
        answers = {name: batch.pop(name) for name in (PREDICTING, ANSWERS)}
        if self._merges:
            with torch.no_grad():
                vectors = token_vectors(trained.inner, batch, vectors, tower)
            per_token = {name: batch[name] for name in PER_TOKEN if name in batch}
            return joined({VECTORS: vectors, **per_token, **answers}, offsets, count)
        batch.pop(IMAGE_POSITIONS, None)
        reached = decoder_inputs(trained.model, trained.inner, batch)
        return joined(reached | answers, offsets, count)

    def _tower(self, pixels: Tensor) -> Tensor:
        return features_of(self._trained.inner, pixels)

    def _recorded_tower(self, pixels: Tensor) -> Tensor:
        """Return the features of images by the graph of their number, recorded at its first use."""
        inputs = {PIXELS: pixels}
        try:
            self._towers.prepare(inputs)
        except RuntimeError as error:
            log.info(TOWER_WITHOUT_GRAPH, str(error).strip().splitlines()[0])
            self._towers = StepGraphs(self._features, self._capture.record, 0)
        return self._towers.run(inputs)

    @torch.no_grad()
    def _features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._tower(inputs[PIXELS])

    def _compute(self, inputs: dict[str, Tensor]) -> Tensor:
        """Run one pass and return its loss."""
        with nullcontext() if "attention_mask" in inputs else unmasked():
            loss = self._loss(*split(inputs))
            torch.autograd.backward(loss)
        return loss.detach()

    def _loss(self, batch: Batch, offsets: BatchOffsets, count: Tensor) -> Tensor:
        """Return the loss of a batch, whose offsets the model's hooks get."""
        if self._trained.anchors is not None:
            self._trained.anchors.offsets = offsets
        return self._trained.loss(batch, count)


def joined(batch: Mapping[str, Tensor], offsets: BatchOffsets, count: Tensor) -> dict[str, Tensor]:
    """Return the inputs of a graph: a batch, the offsets of its places, and the count of items."""
    parts = {
        f"{OFFSETS}.{place}.{name}": part
        for place, some in enumerate(offsets)
        for name, part in some.items()
    }
    return {**batch, **parts, COUNT: count}


def split(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], BatchOffsets, Tensor]:
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


def _one(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.long, device=device)
