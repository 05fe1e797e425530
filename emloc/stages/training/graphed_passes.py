"""The passes of a training as graphs, or without graphs if a model turns out not to allow them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from emloc.anchors.batches import OFFSETS, BatchOffsets
from emloc.data.fixed_shapes import MOST_SHAPES
from emloc.tensors.lean.flat_gradients import FlatGradients
from emloc.tensors.lean.step_graphs import Compute, Inputs, Record, StepGraphs

# Name of the number of items of the step among the inputs of a graph.
COUNT = "count"

log = logging.getLogger(__name__)


class GraphedPasses:
    """Runs forward and backward passes, whose gradients are flat."""

    def __init__(self, compute: Compute, gradients: FlatGradients, record: Record) -> None:
        self.gradients = gradients
        self._compute, self._record = compute, record
        self._graphs = StepGraphs(compute, record, MOST_SHAPES)

    def prepare(self, examples: Iterable[Inputs]) -> None:
        """Record a graph for each of some inputs; the longest come first.

        If that fails, all passes run without graphs, and a log line says why.
        """
        for inputs in examples:
            self._prepare(inputs)

    def run(self, inputs: Inputs) -> Tensor:
        """Return the loss of a pass, a scalar, and add its gradients."""
        self.gradients.attach()  # a wrapper of the model may have dropped them
        self._prepare(inputs)
        return self._graphs.run(inputs)

    def _prepare(self, inputs: Inputs) -> None:
        """Record the graph of the shape of some inputs, unless there is one."""
        if not self._graphs.is_new(inputs):
            return
        before = [flat.clone() for flat in self.gradients.flat]
        try:
            self._graphs.prepare(inputs)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            log.warning("train: each operation is launched by itself (train.capture): %s", reason)
            self._graphs = StepGraphs(self._compute, self._record, 0)
        torch._foreach_copy_(self.gradients.flat, before)  # without those of a trial


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
