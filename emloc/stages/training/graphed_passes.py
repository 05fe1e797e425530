"""The passes of a training as graphs, or without graphs if a model turns out not to allow them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from emloc.data.fixed_shapes import MOST_SHAPES
from emloc.models.causal import unmasked
from emloc.models.objectives import Batch
from emloc.runtime.memory import free_device_bytes
from emloc.runtime.progress import duration
from emloc.stages.training.capture import WITHOUT_GRAPHS, Capture
from emloc.stages.training.graph_inputs import ONE, GraphInputs, Trained, split
from emloc.tensors.lean.flat_parameters import FlatParameters
from emloc.tensors.lean.step_graphs import Inputs, StepGraphs
from emloc.tensors.nn.attention import with_cudnn

log = logging.getLogger(__name__)

# Log lines behind the first graphs, and if there are some already.
RECORDED = "train: recorded %d graphs in %s"
USED_AGAIN = "train: %d graphs are used again"


class GraphedPasses:
    """Runs forward and backward passes of a model whose trained parameters are flat."""

    def __init__(self, trained: Trained, capture: Capture, flat: FlatParameters) -> None:
        self.flat = flat
        self.shapes = capture.shapes.shapes
        self._trained = trained
        self._inputs = GraphInputs(trained, capture)
        self._graphs = StepGraphs(self._compute, capture.record, MOST_SHAPES)
        self._is_new = True

    def go_on(self, trained: Trained) -> None:
        """Compute further passes of the same model, with other offsets or another loss."""
        self._trained = trained
        self._inputs.go_on(trained)

    @property
    def has_graphs(self) -> bool:
        """Whether a graph is recorded."""
        return len(self._graphs) > 0

    def release(self) -> None:
        """Give the memory of all graphs back; further passes have none."""
        self._graphs.give_up()
        self._inputs.release()
        if self._trained.device.type == "cuda":
            torch.cuda.empty_cache()

    def prepare(self, examples: Callable[[], Iterable[Batch]]) -> None:
        """Record a graph for each of some batches that has none; the longest come first.

        If that fails, all passes run without graphs, and a log line says why. `examples` yields the
        batches, and is called twice: each pass first runs as it is, so that libraries have loaded
        their kernels for its shape before the first graph is recorded.

        Graphs of the vision tower are recorded later, when they are used first. They need less
        memory than those of the passes, so all they need is there by then.
        """
        if before := len(self._graphs):
            log.info(USED_AGAIN, before)
        begun = time.perf_counter()
        for batch in examples():
            if self._is_new and (reason := self._inputs.flaw(batch)):
                log.warning(WITHOUT_GRAPHS, reason)
                self._graphs.give_up()
            self._is_new = False
            inputs = self._inputs.of(batch, ONE, recorded=False)
            if self._graphs.is_new(inputs):
                with self._kept_gradients():
                    self._compute(inputs)
        for batch in examples():
            self._record(self._inputs.of(batch, ONE, recorded=False))
        if more := len(self._graphs) - before:
            log.info(RECORDED, more, duration(time.perf_counter() - begun))

    def run(self, batch: Batch, count: Tensor) -> Tensor:
        """Return the loss of a pass, a scalar, and add its gradients."""
        self.flat.attach()  # a wrapper of the model may have dropped them
        return self._graphs.run(self._inputs.of(batch, count))

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
        before = [gradient.clone() for gradient in self.flat.gradients]
        yield
        torch._foreach_copy_(self.flat.gradients, before)

    def _compute(self, inputs: Inputs) -> Tensor:
        """Run one pass and return its loss."""
        with nullcontext() if "attention_mask" in inputs else _causal_attention():
            loss = self._trained.anchored_loss(*split(inputs))
            torch.autograd.backward(loss)
        return loss.detach()


@contextmanager
def _causal_attention() -> Iterator[None]:
    """Let attention take its fastest way inside the block, for batches without a mask."""
    with unmasked(), with_cudnn():
        yield


@dataclass
class KeptPasses:
    """The passes of a round or a training, which the next one of the same model uses again.

    Their graphs keep their memory meanwhile.
    """

    _passes: GraphedPasses | None = None
    _addresses: tuple[int, ...] = ()

    @property
    def has_graphs(self) -> bool:
        """Whether there are any."""
        return self._passes is not None and self._passes.has_graphs

    def take(self, model: Any, capture: Capture) -> GraphedPasses | None:
        """Return the passes, once; None if there are none for this capture.

        They are released if batches have other shapes now, or the model has moved since.
        """
        passes, self._passes = self._passes, None
        if passes is None:
            return None
        if _addresses(model) != self._addresses or passes.shapes != capture.shapes.shapes:
            passes.release()
            return None
        return passes

    def keep(self, passes: GraphedPasses, model: Any, device: torch.device) -> None:
        """Keep the passes of a model if its device is at most half full; else release them."""
        own_bytes = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
        if free_device_bytes(device) >= own_bytes:
            self._passes, self._addresses = passes, _addresses(model)
        else:
            passes.release()

    def release(self) -> None:
        """Give the memory of the graphs back, if there are any."""
        passes, self._passes = self._passes, None
        if passes is not None:
            passes.release()


def _addresses(model: Any) -> tuple[int, ...]:
    """Return where the tensors of a model are; graphs read and write them there."""
    return tuple(t.data_ptr() for t in chain(model.parameters(), model.buffers()))
