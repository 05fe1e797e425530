"""The rows of `emloc plan`: memory, cost and gain of each method, at the same number of samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import yaml

from emloc.config.paths import choices
from emloc.config.presets import named_method
from emloc.config.settings import MODEL_BITS, Compression
from emloc.cost.plan.anchors import AnchorPlan, with_offsets
from emloc.cost.plan.cost import TrainingCost, cost_of, weight_bytes
from emloc.cost.plan.fit import (
    MemoryNeed,
    compressed_layout,
    factors_of,
    need_from_trace,
    usable_bytes,
)
from emloc.cost.plan.gains import Trained, measured_gain
from emloc.cost.plan.gpus import Gpu
from emloc.cost.plan.layout import StepShape, TrainingLayout
from emloc.cost.plan.trace import TraceResult
from emloc.precision import Precision, bits_of
from emloc.stages.polishing.exact_steps import ExactSteps
from emloc.stages.run_config import RunConfig, formats

# Ratio of the table's rows if `compression.ratio` is null.
DEFAULT_RATIO = 0.25
# Method -> the method that presets the same with a packed format.
PACKED_METHODS = {"lora": "qlora", "emloc": "emloc_nf4"}
# Method -> the method with the same emulator and nothing to recover, which anchors are added to.
ANCHORED_METHODS = {"lora": "qlora", "emloc": "emloc_uncorrected"}


@dataclass(frozen=True)
class PlanRow:
    """Memory and cost of one method: a row of the table."""

    method: str
    ratio: float | None
    bits: int
    need: MemoryNeed
    cost: TrainingCost
    seconds: float  # of everything up to the adapter
    gain: float | None  # share of LoRA's gain that such a training has kept; None: not measured


@dataclass(frozen=True)
class _Training:
    """A layout that is trained through, and how its steps are divided into passes."""

    method: str
    ratio: float | None
    layout: TrainingLayout
    shape: StepShape  # as the run has it
    least_accumulate: int  # fewest passes a step
    # rows of a pass -> trace of a pass, which hardly depends on the packed format
    traces: dict[int, TraceResult] = field(default_factory=dict)

    def fitting(
        self, precision: Precision | None, limit_gib: float
    ) -> tuple[StepShape, MemoryNeed]:
        """Return the step with the fewest passes that fits into the device, and its memory.

        If no step fits, it is that of the run.
        """
        own, rows = self.shape, self.shape.batch * self.shape.accumulate
        for count in range(self.least_accumulate, rows + 1):
            if rows % count == 0:
                shape = replace(own, batch=rows // count, accumulate=count)
                need = self.need(precision, shape)
                if need.peak <= usable_bytes(limit_gib):
                    return shape, need
        return own, self.need(precision, own)

    def need(self, precision: Precision | None, shape: StepShape) -> MemoryNeed:
        """Return the memory of a step of this shape."""
        if shape.batch not in self.traces:
            self.traces[shape.batch] = self.layout.trace_pass(shape)
        return need_from_trace(
            replace(self.layout, precision=precision), shape, self.traces[shape.batch]
        )


def plan_rows(
    run_config: RunConfig,
    full_layout: TrainingLayout,
    step_shape: StepShape,
    gpu: Gpu,
    limit_gib: float,
    anchors: AnchorPlan | None,
) -> Iterator[PlanRow]:
    """Yield the rows of LoRA, offloading and EMLoC in the model's dtype and in each packed format.

    With anchors, each emulator has a further row. Where a step of the run does not fit into the
    device, it is divided into more passes. Offloading has as few passes as fit, since its blocks
    come once for each pass.

    Args:
        run_config: settings of the run.
        full_layout: the original model.
        step_shape: a step of the run.
        gpu: the GPU to plan for.
        limit_gib: device memory that a training may take.
        anchors: those of the run, if it has some.
    """
    shared = factors_of(run_config).shared
    offload = _offload(full_layout, step_shape)
    polish = exact_steps_of(run_config, offload, gpu, limit_gib)
    for training in (
        _Training("lora", None, full_layout, step_shape, step_shape.accumulate),
        offload,
        _factors(run_config, full_layout, step_shape),
    ):
        for precision in (None, *formats(run_config.precision)):
            layout = replace(training.layout, precision=precision)
            shape, need = training.fitting(precision, limit_gib)
            samples = run_config.calibration.samples
            cost = cost_of(layout, shape, need.operations, gpu, samples, run_config.budget)
            name = _method_label(training.method, precision)
            is_factorised = training.ratio is not None
            is_original = not is_factorised and (precision is None or layout.streamed)
            kind = Trained(
                is_factorised, bits_of(precision), shared=shared if is_factorised else "none"
            )
            steps = None if is_original else polish
            label = name + _passes_label(shape, step_shape)
            alone = replace(kind, corrected=is_factorised)  # as method=emloc does
            yield _row(run_config, training, alone, label, need, cost, steps)
            if anchors and not is_original:
                with_anchors = replace(training, shape=with_offsets(step_shape, anchors))
                shape, need = with_anchors.fitting(precision, limit_gib)
                cost = cost_of(layout, shape, need.operations, gpu, samples, run_config.budget)
                cost = anchors.added_to(cost, layout, gpu)
                name = _anchored_label(name, training.method, precision, anchors)
                label = name + _passes_label(shape, step_shape)
                anchored = replace(kind, anchored=True)
                yield _row(run_config, training, anchored, label, need, cost, polish)


def exact_steps(
    run_config: RunConfig,
    full_layout: TrainingLayout,
    step_shape: StepShape,
    gpu: Gpu,
    limit_gib: float,
) -> TrainingCost | None:
    """Return the cost of a training by offloading as `polish` trains; None if it does not."""
    return exact_steps_of(run_config, _offload(full_layout, step_shape), gpu, limit_gib)


def exact_steps_of(
    run_config: RunConfig, offload: _Training, gpu: Gpu, limit_gib: float
) -> TrainingCost | None:
    """Return the cost of the training `offload` if the run polishes by exact steps, else None."""
    if not isinstance(run_config.polish, ExactSteps):
        return None
    shape, need = offload.fitting(None, limit_gib)
    return cost_of(offload.layout, shape, need.operations, gpu, 0, run_config.budget)


def _factors(
    run_config: RunConfig, full_layout: TrainingLayout, step_shape: StepShape
) -> _Training:
    """Return the training through factors at the ratio of the run, or at the default one."""
    compression = run_config.compression
    budget = Compression(compression.ratio or DEFAULT_RATIO, compression.of, MODEL_BITS)
    layout = compressed_layout(full_layout, run_config, budget)
    return _Training("emloc", budget.ratio, layout, step_shape, step_shape.accumulate)


def _offload(full_layout: TrainingLayout, step_shape: StepShape) -> _Training:
    """Return the training by offloading, whose blocks leave before the backward pass."""
    shape = replace(step_shape, checkpointing=True)
    return _Training("offload", None, replace(full_layout, streamed=True), shape, 1)


def _passes_label(shape: StepShape, own_shape: StepShape) -> str:
    """Return the settings that divide a step in another way than the run does."""
    if shape.accumulate == own_shape.accumulate:
        return ""
    return f" train.batch={shape.batch} train.accumulate={shape.accumulate}"


def _row(
    run_config: RunConfig,
    training: _Training,
    kind: Trained,
    label: str,
    need: MemoryNeed,
    cost: TrainingCost,
    polish: TrainingCost | None,
) -> PlanRow:
    """Return a row, with the exact steps behind the training if there are some."""
    gain = measured_gain(kind, training.ratio)
    if polish is not None:
        assert isinstance(run_config.polish, ExactSteps)
        seconds = polish.load_seconds + run_config.polish.steps * polish.step_seconds
        read = cost.read + weight_bytes(training.layout.source)
        host = max(cost.host, polish.host)
        cost = replace(cost, polish_seconds=seconds, read=read, host=host)
        gain = None  # not measured
    seconds = cost.seconds(run_config.train.steps)
    return PlanRow(label, training.ratio, kind.bits, need, cost, seconds, gain)


def _method_label(method: str, precision: Precision | None) -> str:
    """Return the method that presets the format's width, or else method and format."""
    if precision is None:
        return method
    if method in PACKED_METHODS:
        path = choices("method")[PACKED_METHODS[method]]
        preset = yaml.safe_load(path.read_text(encoding="utf-8"))
        if preset["compression"]["bits"] == precision.bits:
            return PACKED_METHODS[method]
    return f"{method} {precision.name}"


def _anchored_label(
    label: str, method: str, precision: Precision | None, anchors: AnchorPlan
) -> str:
    """Return the method that presets anchors and the format's width, or `label` with anchors."""
    if precision is not None and label.endswith(f" {precision.name}"):
        return f"{label} anchor={anchors.choice}"
    settings = {"anchor": anchors.choice, "compression.bits": str(bits_of(precision))}
    return named_method(ANCHORED_METHODS[method], settings)
