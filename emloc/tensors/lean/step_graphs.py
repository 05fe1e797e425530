"""Replay the operations of a training step as one CUDA graph for each shape of its inputs.

A step of a small model, or of a small emulator, launches thousands of short operations, and the
host needs longer to launch them than the GPU to run them. A graph is launched at once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emloc.runtime.work_meter import count_weights, metered
from emloc.tensors.nn.streamed import forget_streamed, join_streamed

# Inputs of one step by name.
Inputs = Mapping[str, Tensor]
# Computes the loss of some inputs and adds its gradients to those of the parameters.
Compute = Callable[[dict[str, Tensor]], Tensor]
# Returns a function that repeats the operations of another, which it may run meanwhile.
Record = Callable[[Callable[[], None]], Callable[[], None]]


@dataclass(frozen=True)
class _Graph:
    inputs: dict[str, Tensor]  # that the graph reads
    loss: list[Tensor]  # that the graph writes
    replay: Callable[[], None]


class StepGraphs:
    """The graphs of a step; all share their memory, as one runs at a time.

    Args:
        compute: the step. It may read the parameters and the inputs, and nothing that changes
            beside. What it returns depends on values only through operations on the device.
        record: records a graph.
        most: graphs at most; inputs of further shapes are computed without one.
    """

    def __init__(self, compute: Compute, record: Record, most: int) -> None:
        self._compute, self._record, self._most = compute, record, most
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def is_new(self, inputs: Inputs) -> bool:
        """Return whether `prepare` would record a graph for some inputs."""
        return _key(inputs) not in self._graphs and len(self._graphs) < self._most

    def prepare(self, inputs: Inputs) -> str:
        """Record the graph of the shape of some inputs. Call it for the largest shape first.

        Return why that is impossible, and then use no graphs any more; nothing if it is not.
        """
        if not self.is_new(inputs):
            return ""
        try:
            self._add(inputs)
        except RuntimeError as error:
            self.give_up()
            return str(error).strip().splitlines()[0]
        return ""

    def give_up(self) -> None:
        """Drop all graphs, and compute all inputs without one from now on."""
        self._graphs, self._buffers, self._most = {}, {}, 0

    def _add(self, inputs: Inputs) -> None:
        fixed = {name: self._buffer(name, value) for name, value in inputs.items()}
        torch._foreach_copy_([*fixed.values()], [*inputs.values()])
        losses: list[Tensor] = []

        def step() -> None:
            losses[:] = [self._compute(dict(fixed))]

        self._graphs[_key(inputs)] = _Graph(fixed, losses, self._record(step))

    def run(self, inputs: Inputs) -> Tensor:
        """Return the loss of some inputs, a scalar, and add its gradients."""
        graph = self._graphs.get(_key(inputs))
        if graph is None:
            return self._compute(dict(inputs))
        for name, value in inputs.items():
            graph.inputs[name].copy_(value, non_blocking=True)
        graph.replay()
        return graph.loss[0].detach().clone()  # the next replay overwrites it

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """Return the part of the buffer of an input that has a shape; all shapes share one."""
        buffer = self._buffers.get((name, like.dtype))
        if buffer is None or buffer.numel() < like.numel():
            buffer = self._buffers[name, like.dtype] = torch.empty_like(like).flatten()
        return buffer[: like.numel()].view(like.shape)


def _key(inputs: Inputs) -> tuple[Any, ...]:
    return tuple((name, value.shape, value.dtype) for name, value in sorted(inputs.items()))


class CudaRecorder:
    """Records CUDA graphs that share a pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record a step. The first one is run before, so that libraries prepare themselves.

        Raises:
            RuntimeError: an operation cannot be recorded, for one since the host waits for it.
        """
        if self._pool is None:
            self._run(step)
        graph = torch.cuda.CUDAGraph()
        _free_workspaces()
        forget_streamed()
        try:
            # Threads that read ahead may allocate meanwhile: only this thread is restricted.
            with (
                metered() as work,
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                step()
                join_streamed()
        finally:
            forget_streamed()  # nothing was copied yet
        _free_workspaces()
        self._pool = graph.pool()

        def replay() -> None:
            graph.replay()
            forget_streamed()
            count_weights(work.weight_bytes)

        return replay

    def _run(self, step: Callable[[], None]) -> None:
        """Run a step, and give its memory back, since graphs have their own.

        The memory of earlier passes is given back as well: it belongs to another stream, so this
        step would take as much again.
        """
        current = torch.cuda.current_stream(self._device)
        self._give_memory_back()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)
        self._give_memory_back()

    def _give_memory_back(self) -> None:
        torch.cuda.synchronize(self._device)
        _free_workspaces()
        gc.collect()
        torch.cuda.empty_cache()


def _free_workspaces() -> None:
    """Free what cuBLAS keeps for each stream, so that all graphs have it in their pool, once."""
    torch._C._cuda_clearCublasWorkspaces()
