"""Host memory, disk and time of a training, by counting; times are estimates."""

from __future__ import annotations

from dataclasses import dataclass

from emloc.calibration.calibrate import statistics_bytes
from emloc.config.settings import Budget
from emloc.cost.plan.gpus import Gpu
from emloc.cost.plan.layout import StepShape, TrainingLayout
from emloc.runtime.memory import GIB

# Of the makers' rates, what long products and streams of a transformer reach.
USED = 0.4
# Of an operation on the side of the host, Python and launch included: it bounds short steps.
SECONDS_OF_AN_OPERATION = 22e-6
# Products with the energy matrix until a subspace has converged.
ITERATIONS = 12
# A Python process with its libraries and the driver.
PROCESS = 3 * GIB


@dataclass(frozen=True)
class TrainingCost:
    """What a training takes beside device memory."""

    host: int  # bytes, anonymous
    disk: int  # bytes in the store
    build_seconds: float  # of the emulator, calibration included
    step_seconds: float


def cost_of(
    scheme: TrainingLayout, work: StepShape, operations: int, gpu: Gpu, samples: int, budget: Budget
) -> TrainingCost:
    """Estimates for `samples` calibration samples as long as those trained on.

    `operations` of one forward and backward pass.
    """
    tokens = samples * work.length
    disk = 2 * 4 * scheme.parameters  # the adapter as trained and as carried
    build, host = 0.0, PROCESS + scheme.embedding
    if scheme.ranks:
        moments = statistics_bytes(scheme.compressed, whole=False)
        disk += scheme.factors + (moments if moments <= budget.statistics_gib * GIB else 0)
        widest = max(columns for _, columns in scheme.adapted.values())
        waiting = tokens * widest * scheme.source.dtype.itemsize
        host += min(waiting, int(budget.host_gib * GIB))
        build = _build_seconds(scheme, tokens, gpu)
    return TrainingCost(host, disk, build, _step_seconds(scheme, work, operations, gpu))


def _build_seconds(scheme: TrainingLayout, tokens: int, gpu: Gpu) -> float:
    """Two passes through the model, the sums of second moments, and the factors."""
    sizes = sum(rows * columns for rows, columns in scheme.compressed.values())
    passes = 2 * 2 * sizes * tokens / (USED * gpu.bf16 * 1e12)
    # In float64 where a chip is as fast at it as in float32, else in float32.
    wide = max(gpu.fp64, gpu.bf16 / 15)
    sums = sum(2 * tokens * min(m, n) ** 2 for m, n in scheme.compressed.values())
    sums += sum(2 * tokens * m * n for m, n in scheme.compressed.values() if m < n)
    work = 0.0
    for layer, k in scheme.ranks.items():
        m, n = scheme.compressed[layer]
        p = min(m, n)
        work += 2 * m * n * p + 4 * p**3 + ITERATIONS * 8 * p * p * k + 4 * m * n * k
    return passes + sums / (USED * wide * 1e12) + work / (USED * gpu.fp64 * 1e12)


def _step_seconds(scheme: TrainingLayout, work: StepShape, operations: int, gpu: Gpu) -> float:
    """The longer of what the device has to multiply and what the host has to launch."""
    tokens = work.batch * work.length  # of each pass
    passes = 3 if work.checkpointing else 2
    multiplied = sum(scheme.multiplied(layer) for layer in scheme.adapted)
    device = 2 * multiplied * tokens * passes / (USED * gpu.bf16 * 1e12)
    device += scheme.formed * passes / (USED * gpu.bandwidth * 1e12)
    if scheme.precision is not None:  # the trace has its matrices whole
        matrices = len(scheme.adapted) * (2 if scheme.ranks else 1)
        operations += scheme.precision.dequantize_operations * passes * matrices
    return work.accumulate * max(device, operations * SECONDS_OF_AN_OPERATION)
