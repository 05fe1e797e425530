"""Estimate the host memory, disk space and time of building an emulator and training on it."""

from __future__ import annotations

from dataclasses import dataclass

from emloc.calibration.calibrate import statistics_bytes
from emloc.calibration.offload import state_limits
from emloc.calibration.read_ahead import pinned_block_bytes
from emloc.config.settings import Budget
from emloc.cost.plan.gpus import Gpu
from emloc.cost.plan.layout import StepShape, TrainingLayout
from emloc.emulators.size import joint_layers
from emloc.models.checkpoint.source import Source
from emloc.precision.error_feedback import SPAN
from emloc.runtime.memory import GIB

# Share of the makers' rates that large matrix products and copies of a transformer reach.
UTILISATION = 0.4
# Host time of one operation, with Python and the kernel launch; it limits short steps.
SECONDS_PER_OPERATION = 22e-6
# Subspace iterations until the factors of a layer have converged.
ITERATIONS = 12
# Operations that rounding a span of columns by error feedback dispatches.
FEEDBACK_OPERATIONS = 14
# Bytes of host memory that a Python process with its libraries and the driver uses.
PROCESS = 3 * GIB


@dataclass(frozen=True)
class TrainingCost:
    """Cost of a training besides device memory."""

    host: int  # bytes of anonymous host memory
    disk: int  # bytes of all artifacts
    build_seconds: float  # time to calibrate and build the emulator
    step_seconds: float  # time of one optimizer step


def cost_of(
    layout: TrainingLayout,
    step_shape: StepShape,
    operations: int,
    gpu: Gpu,
    samples: int,
    budget: Budget,
) -> TrainingCost:
    """Estimate the cost of a training.

    Args:
        layout: the model and its adapter.
        step_shape: the shape of an optimizer step.
        operations: operations that one forward and backward pass dispatches.
        gpu: the GPU to estimate for.
        samples: number of calibration samples, each as long as a training row.
        budget: limits on host memory and cached statistics.
    """
    tokens = samples * step_shape.length
    disk = 2 * 4 * layout.parameters  # the trained and the recovered adapter, in float32
    build, host = 0.0, PROCESS + layout.embedding + layout.streamed_bytes
    if layout.ranks:
        joint = joint_layers(layout.groups)
        moments = statistics_bytes(layout.compressed, inputs_only=layout.has_feedback, joint=joint)
        disk += layout.factors + (moments if moments <= budget.statistics_gib * GIB else 0)
        build = _build_seconds(layout, tokens, gpu)
    elif layout.has_feedback:
        disk += layout.packed_bytes
        build = _feedback_seconds(layout, tokens, gpu)
    if layout.ranks or layout.has_feedback:  # the original runs block by block on the samples
        widest = max(columns for _, columns in layout.adapted.values())
        hidden_states = tokens * widest * layout.source.dtype.itemsize
        host += state_limits(budget).host_share(hidden_states) + next_block(layout.source)
    return TrainingCost(host, disk, build, _step_seconds(layout, step_shape, operations, gpu))


def next_block(source: Source) -> int:
    """Bytes of host memory in which the next block of the original waits while another one runs."""
    itemsize = source.dtype.itemsize
    return pinned_block_bytes({name: size * itemsize for name, size in source.sizes.items()})


def _build_seconds(layout: TrainingLayout, tokens: int, gpu: Gpu) -> float:
    """Estimate the time of two blockwise forwards, of the second moments and of the factors."""
    sizes = sum(rows * columns for rows, columns in layout.compressed.values())
    forwards = 2 * 2 * sizes * tokens / (UTILISATION * gpu.bf16 * 1e12)
    # Moments are summed in float64 if the GPU is as fast in float64 as in float32, else in float32.
    moment_rate = max(gpu.fp64, gpu.bf16 / 15)
    moment_operations = sum(2 * tokens * min(m, n) ** 2 for m, n in layout.compressed.values())
    moment_operations += sum(2 * tokens * m * n for m, n in layout.compressed.values() if m < n)
    factor_operations = 0.0
    for layer, k in layout.ranks.items():
        m, n = layout.compressed[layer]
        p = min(m, n)
        factor_operations += 2 * m * n * p + 4 * p**3 + ITERATIONS * 8 * p * p * k + 4 * m * n * k
    return (
        forwards
        + moment_operations / (UTILISATION * moment_rate * 1e12)
        + factor_operations / (UTILISATION * gpu.fp64 * 1e12)
    )


def _feedback_seconds(layout: TrainingLayout, tokens: int, gpu: Gpu) -> float:
    """Estimate the time to quantise all packed layers by error feedback, and of the forward.

    Each span of rounded columns changes all later ones, and waits for a few launches.
    """
    seconds = 0.0
    for layer in layout.packed_layers:
        m, n = layout.source.linears[layer]
        rate = UTILISATION * max(gpu.fp64, gpu.bf16 / 15) * 1e12
        seconds += 2 * m * n * tokens / (UTILISATION * gpu.bf16 * 1e12)
        seconds += (2 * tokens * n * n + n**3 + m * n * n) / rate
        seconds += -(-n // SPAN) * FEEDBACK_OPERATIONS * SECONDS_PER_OPERATION
    return seconds


def _step_seconds(
    layout: TrainingLayout, step_shape: StepShape, operations: int, gpu: Gpu
) -> float:
    """Estimate the time of an optimizer step.

    The longest of three times counts: of the arithmetic on the device, of the launches by the host,
    and of the blocks that come from host memory, forward and backward.
    """
    tokens = step_shape.batch * step_shape.length  # tokens of one forward pass
    passes = 3 if step_shape.checkpointing else 2
    multiplications = sum(layout.multiplications(layer) for layer in layout.adapted)
    device_seconds = 2 * multiplications * tokens * passes / (UTILISATION * gpu.bf16 * 1e12)
    device_seconds += layout.dequantised_bytes * passes / (UTILISATION * gpu.bandwidth * 1e12)
    if layout.precision is not None:  # the trace does not contain the dequantisation
        matrices = len(layout.adapted) * (2 if layout.ranks else 1)
        operations += layout.precision.dequantize_operations * passes * matrices
    copies = 2 * layout.streamed_bytes / (gpu.host_link * 1e12)
    return step_shape.accumulate * max(device_seconds, operations * SECONDS_PER_OPERATION, copies)
