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

# Share of the makers' rates that matrix products in float64, copies and builds reach.
UTILISATION = 0.4
# Share of the makers' rate that the matrix products of a training step reach, and how often a
# forward and backward pass reads or writes the inputs and outputs of all layers beside them. With
# both, LoRA and emulators of 8B and 38B models take the times that were measured on an H200.
STEP_UTILISATION, ELEMENTWISE = 0.63, 16
# Share of it that a pass without gradients takes.
ELEMENTWISE_FORWARD = 1 / 3
# Host time of one operation, with Python and the kernel launch; it limits short steps that are no
# CUDA graph.
SECONDS_PER_OPERATION = 22e-6
# Bytes a second that a disk reads: an SSD with NVMe.
DISK = 2e9
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
    read: int  # bytes of the original's weights that are read from the disk
    load_seconds: float  # time to read the weights that are trained through
    build_seconds: float  # time to calibrate and build the emulator
    step_seconds: float  # time of one optimizer step
    pass_seconds: float = 0.0  # time of all passes of the original
    first_pass_seconds: float = 0.0  # of them, time of the first, which runs of a sweep share
    polish_seconds: float = 0.0  # time of the exact steps behind the training
    feature_seconds: float = 0.0  # time of the pass that stores features of images

    def seconds(self, steps: int) -> float:
        """Return the time of everything up to the adapter, for a training of so many steps."""
        return (
            self.load_seconds
            + self.build_seconds
            + self.feature_seconds
            + self.pass_seconds
            + steps * self.step_seconds
            + self.polish_seconds
        )


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
    tokens, whole = samples * step_shape.length, weight_bytes(layout.source)
    load, read = whole, whole
    disk = 2 * 4 * layout.parameters  # the trained and the recovered adapter, in float32
    build, host = 0.0, PROCESS + layout.embedding + layout.streamed_bytes
    if layout.ranks:
        joint = joint_layers(layout.groups)
        moments = statistics_bytes(layout.compressed, inputs_only=layout.has_feedback, joint=joint)
        keeps_moments = moments <= budget.statistics_gib * GIB
        disk += layout.factors + (moments if keeps_moments else 0)
        read = (2 if keeps_moments else 1) * whole
        load = layout.factors + layout.uncompressed
        build = max(_build_seconds(layout, tokens, gpu), read / DISK)
    elif layout.has_feedback:
        disk += layout.packed_bytes
        load = layout.packed_bytes + whole - _packed_weights(layout)
        build = max(_feedback_seconds(layout, tokens, gpu), read / DISK)
    if layout.ranks or layout.has_feedback:  # the original runs block by block on the samples
        widest = max(columns for _, columns in layout.adapted.values())
        hidden_states = tokens * widest * layout.source.dtype.itemsize
        limits = state_limits(budget, gpu.memory_gib * GIB)
        host += limits.host_share(hidden_states) + next_block(layout.source)
    step = _step_seconds(layout, step_shape, operations, gpu)
    return TrainingCost(host, disk, read, load / DISK, build, step)


def weight_bytes(source: Source) -> int:
    """Bytes of all weights of the original."""
    return sum(source.sizes.values()) * source.dtype.itemsize


def _packed_weights(layout: TrainingLayout) -> int:
    """Bytes of the weights in the original that the layout packs."""
    linears = layout.source.linears
    elements = sum(rows * columns for rows, columns in (linears[n] for n in layout.packed_layers))
    return elements * layout.source.dtype.itemsize


def forward_seconds(layout: TrainingLayout, tokens: float, gpu: Gpu) -> float:
    """Estimate the time of a forward pass without gradients through all blocks."""
    multiplications = sum(layout.multiplications(layer) for layer in layout.adapted)
    arithmetic = 2 * multiplications * tokens / (STEP_UTILISATION * gpu.bf16 * 1e12)
    return arithmetic + ELEMENTWISE_FORWARD * _elementwise_seconds(layout, tokens, gpu)


def _elementwise_seconds(layout: TrainingLayout, tokens: float, gpu: Gpu) -> float:
    """Estimate the time of all operations of a pass with gradients that are no matrix products."""
    features = sum(rows + columns for rows, columns in layout.adapted.values())
    nbytes = ELEMENTWISE * features * tokens * layout.source.dtype.itemsize
    return nbytes / (gpu.bandwidth * 1e12)


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

    The longest of three times counts: of the device, of the launches by the host if the step is no
    CUDA graph, and of the blocks that come from host memory, forward and backward.
    """
    tokens = step_shape.batch * step_shape.length  # tokens of one forward pass
    passes = 3 if step_shape.checkpointing else 2
    multiplications = sum(layout.multiplications(layer) for layer in layout.adapted)
    device_seconds = 2 * multiplications * tokens * passes / (STEP_UTILISATION * gpu.bf16 * 1e12)
    device_seconds += passes / 2 * _elementwise_seconds(layout, tokens, gpu)
    device_seconds += layout.dequantised_bytes * passes / (UTILISATION * gpu.bandwidth * 1e12)
    if layout.precision is not None:  # the trace does not contain the dequantisation
        matrices = len(layout.adapted) * (2 if layout.ranks else 1)
        operations += layout.precision.dequantize_operations * passes * matrices
    copies = 2 * layout.streamed_bytes / (gpu.host_link * 1e12)
    launches = 0.0 if step_shape.captured else operations * SECONDS_PER_OPERATION
    return step_shape.accumulate * max(device_seconds, launches, copies)
