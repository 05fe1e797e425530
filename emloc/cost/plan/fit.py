"""Device memory that a training needs, and the largest emulator whose training fits a budget."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import yaml

from emloc.calibration.blockwise import by_block
from emloc.config.compatibility import required_budget
from emloc.config.paths import choices
from emloc.config.settings import MODEL_BITS, Compression
from emloc.cost.plan.blocks import DecoderBlocks
from emloc.cost.plan.gains import Trained, measured_gain
from emloc.cost.plan.layout import StepShape, TrainingLayout
from emloc.cost.plan.trace import TraceResult
from emloc.emulators.full import Full
from emloc.emulators.size import uniform_ranks
from emloc.emulators.svd import Svd
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.models.coverage import require_linear_blocks
from emloc.models.family import ModelFamily
from emloc.precision import Precision, bits_of
from emloc.runtime.memory import GIB
from emloc.stages.run_config import RunConfig, formats
from emloc.stages.training.lean_setup import required_override

log = logging.getLogger(__name__)

# Share of a budget that is left free: memory of the driver, and fragmentation.
RESERVE = 0.06
# Bytes that the libraries for matrix products and attention allocate for themselves.
WORKSPACE = 64 * 2**20
# A ratio this large is good enough: fewer bits are not chosen to reach a larger one.
NEARLY_ALL = 0.9
# With fewer bits than this, factors of such a ratio lose more than smaller ones with more bits.
LEAST_FOR_ALL = 4
RATIOS = [count / 100 for count in range(1, 100)]
# Bytes of a parameter or a gradient in float32, and of the two moments of AdamW for a parameter.
FLOAT, MOMENTS = 4, 8


@dataclass(frozen=True)
class MemoryNeed:
    """Device memory of a training in bytes, at its peak and by its parts.

    The peak is in a step, mostly at the start of the backward pass, or before the first step. Then
    the token embedding is still on the device, but no moments of the optimizer or activations. Or
    it is in a pass of the original, which has no moments either.
    """

    weights: int  # frozen weights
    adapter: int  # parameters, optimizer state, and gradients if they are accumulated over passes
    activations: int  # temporary tensors of a pass, with its gradients and anchor offsets
    scratch: int  # buffers for dequantised matrices, and memory of libraries
    opening: int  # embedding and adapter before the first step
    operations: int  # operations that one pass dispatches
    anchoring: int = 0  # adapter, and what a pass of the original takes; 0 without anchors

    @property
    def peak(self) -> int:
        """Peak memory in bytes."""
        step = self.adapter + self.activations + self.scratch
        return self.weights + max(step, self.opening, self.anchoring)


def need_of(layout: TrainingLayout, step_shape: StepShape) -> MemoryNeed:
    """Return the device memory that a training with this layout needs."""
    return need_from_trace(layout, step_shape, layout.trace_pass(step_shape))


def need_from_trace(
    layout: TrainingLayout, step_shape: StepShape, trace: TraceResult
) -> MemoryNeed:
    """Return the device memory of a training whose pass has been traced already.

    The trace hardly depends on the packed format, so one trace serves for all formats.
    """
    adapter = layout.copies + FLOAT * layout.parameters
    accumulated = FLOAT * layout.parameters if step_shape.accumulate > 1 else 0
    anchoring = adapter + layout.scratch + WORKSPACE + step_shape.pass_bytes
    return MemoryNeed(
        weights=layout.weights,
        adapter=adapter + MOMENTS * layout.parameters + accumulated,
        activations=trace.peak + step_shape.offsets,
        scratch=layout.scratch + WORKSPACE,
        opening=adapter + layout.embedding,
        operations=trace.operations,
        anchoring=anchoring if step_shape.pass_bytes else 0,
    )


def layout_of(
    run_config: RunConfig, source: Source, ratio: float | None, precision: Precision | None
) -> TrainingLayout:
    """Return the layout of the run's model and adapter, compressed to `ratio` in `precision`.

    `ratio` is a share of the parameters that `compression.of` names; None factorises no layer.

    Raises:
        ConfigError: the training does not use the memory-saving path, a pattern matches no layer,
            or the ratio leaves a layer without rank.
    """
    override = required_override(run_config.lora) if run_config.train.lean else "train.lean=true"
    if override:
        raise ConfigError(
            f"only the memory-saving training (train.lean) can be planned; set {override}"
        )
    full_layout = TrainingLayout(
        DecoderBlocks(source),
        run_config.model.adapted_layers(source),
        run_config.model.compressible_layers(source),
        run_config.lora,
        {},
        (),
        precision,
    )
    if ratio is None:
        return full_layout
    return compressed_layout(
        full_layout, run_config, Compression(ratio, run_config.compression.of, bits_of(precision))
    )


def compressed_layout(
    full_layout: TrainingLayout, run_config: RunConfig, budget: Compression
) -> TrainingLayout:
    """Return `full_layout` with its compressed layers factorised at the ratio of `budget`.

    Raises:
        ConfigError: the ratio leaves a layer without rank.
    """
    emulator, layers = factors_of(run_config), full_layout.compressed
    groups = emulator.groups(full_layout.source, layers)
    ranks = uniform_ranks(full_layout.source, layers, budget, emulator.multiple, groups)
    return replace(full_layout, ranks=ranks, groups=groups)


def factors_of(run_config: RunConfig) -> Svd:
    """Return the emulator of the run if it is one of factors, else the default one."""
    if isinstance(run_config.emulator, Svd):
        return run_config.emulator
    settings = yaml.safe_load(choices("emulator")["svd"].read_text(encoding="utf-8"))
    return Svd(**{name: value for name, value in settings.items() if name != "_target_"})


def candidate_precisions(run_config: RunConfig) -> list[Precision | None]:
    """Return the formats that compression=auto may choose, from the most bits to the fewest.

    None stands for the model's dtype, and each available width has one packed format. A run that
    sets `compression.bits` or `precision` restricts the choice.

    Raises:
        ConfigError: several formats have the same width, and `precision` names none of them.
    """
    if run_config.compression.bits is not None:
        return [run_config.precision]
    return [None, *([run_config.precision] if run_config.precision else formats())]


def solve_compression(run_config: RunConfig, source: Source, step_shape: StepShape) -> Compression:
    """Return the largest compression whose training fits into `budget.gpu_gib`.

    With emulator=full it has the most bits that fit. With emulator=svd see
    `solve_emulator_compression`.

    Raises:
        ConfigError: `budget.gpu_gib` is missing, nothing fits into it, or the training with this
            emulator or adapter cannot be planned.
    """
    budget_bytes(run_config)  # refuses a missing budget before the model is traced
    if type(run_config.emulator) not in (Full, Svd):
        raise ConfigError(
            "compression=auto is solved for emulator=svd and emulator=full; with others "
            "set compression=r50"
        )
    if run_config.adapter.trains and run_config.adapter.nonlinear:
        raise ConfigError(
            "compression=auto is solved for adapters whose update is s B A, while this adapter "
            f"{run_config.adapter.nonlinear}; set adapter=lora, or compression=r50"
        )
    if isinstance(run_config.emulator, Svd):
        require_plannable(run_config.model, source)
    full_layout = layout_of(run_config, source, None, None)
    if isinstance(run_config.emulator, Full):
        return _solve_model_bits(run_config, full_layout, step_shape)
    return solve_emulator_compression(run_config, full_layout, step_shape)


def solve_emulator_compression(
    run_config: RunConfig, full_layout: TrainingLayout, step_shape: StepShape
) -> Compression:
    """Return the largest ratio of the linear layers, and its bits, whose training fits the budget.

    The choice is the most bits, at least four, at which nearly all parameters can be kept. Else it
    is the pair that has kept most of LoRA's gain so far, with or without anchors as in the run.

    Raises:
        ConfigError: `budget.gpu_gib` is missing, or nothing fits into it.
    """
    limit, requested_bits = budget_bytes(run_config), run_config.compression.bits
    layouts = dict(_layouts_by_ratio(run_config, full_layout))
    trace_at = _interpolated_traces(layouts, step_shape)

    def too_large(ratio: float, precision: Precision | None) -> bool:
        layout = replace(layouts[ratio], precision=precision)
        return need_from_trace(layout, step_shape, trace_at(ratio)).peak > limit

    ratios_by_bits: dict[int, float] = {}
    for precision in candidate_precisions(run_config):
        ratios = list(layouts)
        count = bisect_left(ratios, True, key=partial(too_large, precision=precision))
        if count:
            ratios_by_bits[bits_of(precision)] = ratios[count - 1]
    gib = run_config.budget.gpu_gib
    if not ratios_by_bits:
        parts = (
            "adapter, activations and passes"
            if step_shape.pass_bytes
            else "adapter and activations"
        )
        raise ConfigError(
            f"budget.gpu_gib={gib:g}: no ratio fits{_at_bits(requested_bits)}; weights that are "
            f"never compressed need {full_layout.uncompressed / GIB:.1f} GiB, the {parts} the "
            "rest; set budget.gpu_gib higher, or train.batch or lora.rank lower"
        )
    whole = [b for b, r in ratios_by_bits.items() if r >= NEARLY_ALL and b >= LEAST_FOR_ALL]
    bits = whole[0] if whole else _best_measured(run_config, ratios_by_bits)
    ratio = ratios_by_bits[bits]
    log.info(
        "compression=auto: ratio %.2f at %d bits is the largest within budget.gpu_gib=%g",
        *(ratio, bits, gib),
    )
    return replace(run_config.compression, ratio=ratio, bits=bits, of="linears")


def _best_measured(run_config: RunConfig, ratios_by_bits: Mapping[int, float]) -> int:
    """Return the bits with which factors of these ratios have kept most of LoRA's gain.

    Where nothing was measured, they are the fewest bits: packing loses less than leaving out.
    """
    shared, anchored = factors_of(run_config).shared, run_config.anchor.anchors

    def rank(bits: int) -> tuple[float, int]:
        gain = measured_gain(Trained(True, bits, anchored, shared), ratios_by_bits[bits])
        return gain or 0.0, -bits

    return max(ratios_by_bits, key=rank)


def _layouts_by_ratio(
    run_config: RunConfig, full_layout: TrainingLayout
) -> Iterator[tuple[float, TrainingLayout]]:
    """Yield ratio and layout for each of `RATIOS` that leaves every layer a rank, upwards.

    Raises:
        ConfigError: no ratio leaves every layer a rank.
    """
    for ratio in RATIOS:
        with suppress(ConfigError) if ratio < RATIOS[-1] else nullcontext():
            yield (
                ratio,
                compressed_layout(
                    full_layout, run_config, Compression(ratio, "linears", MODEL_BITS)
                ),
            )


def _interpolated_traces(
    layouts: Mapping[float, TrainingLayout], step_shape: StepShape
) -> Callable[[float], TraceResult]:
    """Return a function from a ratio to an upper bound of its trace, with only two ratios traced.

    The memory at each moment of a pass grows linearly with the ranks, and the peak is the maximum
    over these moments. It is convex in the ratio and lies below the line between the two traces.
    """
    low, high = min(layouts), max(layouts)
    first, last = (layouts[ratio].trace_pass(step_shape) for ratio in (low, high))

    def trace_at(ratio: float) -> TraceResult:
        share = (ratio - low) / (high - low or 1)
        return TraceResult(ceil(first.peak + share * (last.peak - first.peak)), first.operations)

    return trace_at


def _solve_model_bits(
    run_config: RunConfig, full_layout: TrainingLayout, step_shape: StepShape
) -> Compression:
    """Return the most bits at which the training on the uncompressed model fits the budget.

    Raises:
        ConfigError: `budget.gpu_gib` is missing, or no format fits into it.
    """
    limit, gib = budget_bytes(run_config), run_config.budget.gpu_gib
    candidates = candidate_precisions(run_config)
    if run_config.anchor.anchors:  # they have nothing to put back in the model's own dtype
        candidates = [precision for precision in candidates if precision is not None]
    for precision in candidates:
        if need_of(replace(full_layout, precision=precision), step_shape).peak <= limit:
            bits = bits_of(precision)
            log.info(
                "compression=auto: the whole model at %d bits fits budget.gpu_gib=%g", bits, gib
            )
            return replace(run_config.compression, bits=bits)
    raise ConfigError(
        f"budget.gpu_gib={gib:g}: the whole model does not fit{_at_bits(bits_of(candidates[-1]))}; "
        "set method=emloc or budget.gpu_gib higher"
    )


def refuse_unplanned(model: ModelFamily, override: str) -> None:
    """Check that the training of the model's family can be planned.

    Raises:
        ConfigError: it cannot; names the family's reason and the override that needs no plan.
    """
    if model.unplanned is not None:
        raise ConfigError(
            "only the training of models that write text is planned, and "
            f"model={model.name} {model.unplanned}; set {override}"
        )


def require_plannable(model: ModelFamily, source: Source) -> None:
    """Check that most parameters of the blocks are in linear layers, which an emulator compresses.

    Raises:
        ConfigError: they are not.
    """
    blocks = by_block(model.compressible_layers(source))
    require_linear_blocks(source.meta_model, blocks, "emulator=svd", "set model to another")


def budget_bytes(run_config: RunConfig) -> int:
    """Return the usable bytes of `budget.gpu_gib`.

    Raises:
        ConfigError: `budget.gpu_gib` is null.
    """
    return usable_bytes(required_budget(run_config.budget.gpu_gib))


def usable_bytes(gib: float) -> int:
    """Return the bytes that a plan may use of `gib` GiB of device memory, without the reserve."""
    return int(gib * GIB * (1 - RESERVE))


def _at_bits(bits: int | None) -> str:
    """Return ` at <bits> bits` for an error message; empty if the bits are not set."""
    return "" if bits is None else f" at {bits} bits"
