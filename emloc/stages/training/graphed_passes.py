"""The passes of a training as graphs, or without graphs if a model turns out not to allow them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from emloc.data.fixed_shapes import MOST_SHAPES
from emloc.models.causal import unmasked
from emloc.models.objectives import Batch
from emloc.runtime.progress import duration
from emloc.stages.training.capture import WITHOUT_GRAPHS, Capture
from emloc.stages.training.graph_inputs import ONE, GraphInputs, Trained, split
from emloc.tensors.lean.flat_gradients import FlatGradients
from emloc.tensors.lean.step_graphs import Inputs, StepGraphs

log = logging.getLogger(__name__)

# Log line behind the first graphs.
RECORDED = "train: recorded %d graphs in %s"


class GraphedPasses:
    """Runs forward and backward passes, whose gradients are flat."""

    def __init__(self, trained: Trained, capture: Capture, gradients: FlatGradients) -> None:
        self.gradients = gradients
        self._trained = trained
        self._inputs = GraphInputs(trained, capture)
        self._graphs = StepGraphs(self._compute, capture.record, MOST_SHAPES)

    def prepare(self, examples: Callable[[], Iterable[Batch]]) -> None:
        """Record a graph for each of some batches; the longest come first.

        If that fails, all passes run without graphs, and a log line says why. `examples` yields the
        batches, and is called twice: each pass first runs as it is, so that libraries have loaded
        their kernels for its shape before the first graph is recorded.
        """
        begun = time.perf_counter()
        for number, batch in enumerate(examples()):
            if number == 0 and (reason := self._inputs.flaw(batch)):
                log.warning(WITHOUT_GRAPHS, reason)
                self._graphs.give_up()
                return
            with self._kept_gradients():
                self._compute(self._inputs.of(batch, ONE, recorded=False))
        for batch in examples():
            self._record(self._inputs.of(batch, ONE))
        if len(self._graphs):
            log.info(RECORDED, len(self._graphs), duration(time.perf_counter() - begun))

    def run(self, batch: Batch, count: Tensor) -> Tensor:
        """Return the loss of a pass, a scalar, and add its gradients."""
        self.gradients.attach()  # a wrapper of the model may have dropped them
        inputs = self._inputs.of(batch, count)
        self._record(inputs)
        return self._graphs.run(inputs)

    def _record(self, inputs: Inputs) -> None:
        """Record the graph of the shape of some inputs, unless there is one."""
        if not self._graphs.is_new(inputs):
            return
        with self._kept_gradients():
            reason = self._graphs.prepare(inputs)
        if reason:
            log.warning(WITHOUT_GRAPHS, reason)

    @contextmanager
    def _kept_gradients(self) -> Iterator[None]:
        """Undo what passes inside the block add to the gradients."""
        before = [flat.clone() for flat in self.gradients.flat]
        yield
        torch._foreach_copy_(self.gradients.flat, before)

    def _compute(self, inputs: Inputs) -> Tensor:
        """Run one pass and return its loss."""
        with nullcontext() if "attention_mask" in inputs else unmasked():
            loss = self._trained.anchored_loss(*split(inputs))
            torch.autograd.backward(loss)
        return loss.detach()
