"""The rows of `emloc plan`: memory, cost and gain of each method, at the same number of samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import yaml

from emloc.config.paths import choices
from emloc.config.presets import named_method
from emloc.config.settings import MODEL_BITS, Compression
from emloc.cost.plan.anchors import AnchorPlan, anchor_plan, with_offsets
from emloc.cost.plan.cost import TrainingCost, cost_of, weight_bytes
from emloc.cost.plan.features import FeaturePlan, feature_plan, trained_source
from emloc.cost.plan.fit import (
    MemoryNeed,
    compressed_layout,
    factors_of,
    layout_of,
    need_of,
    refuse_unplanned,
    require_plannable,
    usable_bytes,
)
from emloc.cost.plan.gains import Trained, measured_gain
from emloc.cost.plan.gpus import Gpu
from emloc.cost.plan.layout import StepShape, TrainingLayout
from emloc.emulators.full import Full
from emloc.emulators.offload import Offload
from emloc.emulators.svd import Svd
from emloc.errors import ConfigError
from emloc.precision import Precision, bits_of
from emloc.recovery.correction import Correction
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

    def fitting(
        self, precision: Precision | None, limit_gib: float
    ) -> tuple[StepShape, MemoryNeed]:
        """Return the step with the fewest passes that fits into the device, and its memory.

        If no step fits, it is that of the run.
        """
        layout = replace(self.layout, precision=precision)
        own, rows = self.shape, self.shape.batch * self.shape.accumulate
        for count in range(self.least_accumulate, rows + 1):
            if rows % count == 0:
                batch = rows // count
                offsets = own.offsets * batch // own.batch
                shape = replace(own, batch=batch, accumulate=count, offsets=offsets)
                need = need_of(layout, shape)
                if need.peak <= usable_bytes(limit_gib):
                    return shape, need
        return own, need_of(layout, own)


@dataclass(frozen=True)
class Planner:
    """What all rows of a plan have in common."""

    run_config: RunConfig
    full_layout: TrainingLayout  # the original model
    step_shape: StepShape  # a step of the run
    gpu: Gpu
    limit_gib: float  # device memory that a training may take
    anchors: AnchorPlan | None  # those of the run, if it has some
    features: FeaturePlan | None = None  # the stored features of the run, if it has some

    def rows(self) -> Iterator[PlanRow]:
        """Yield the rows of LoRA, offloading and EMLoC, in the model's dtype and packed.

        With anchors, each emulator has a further row. Where a step of the run does not fit into the
        device, it is divided into more passes. Offloading has as few passes as fit, since its
        blocks come once for each pass.
        """
        for training in (self._whole, self._offload, self._factors):
            for precision in (None, *formats(self.run_config.precision)):
                # Factors without anchors are corrected, as in method=emloc.
                yield self._row(training, precision, anchored=False, corrected=True)
                if self.anchors and not self._is_original(training, precision):
                    yield self._row(training, precision, anchored=True, corrected=False)

    def own_row(self) -> PlanRow:
        """Return the row of the run itself.

        Raises:
            ConfigError: its emulator is not planned.
        """
        emulator = self.run_config.emulator
        by_class = {Full: self._whole, Offload: self._offload, Svd: self._factors}
        training = by_class.get(type(emulator))
        if training is None:
            raise ConfigError(
                f"method={self.run_config.method}: only trainings through the whole model or "
                "through factors are planned; set method=lora, offload or emloc"
            )
        return self._row(
            training,
            self.run_config.precision,
            anchored=self.anchors is not None,
            corrected=isinstance(self.run_config.recovery, Correction),
        )

    @cached_property
    def exact_steps(self) -> TrainingCost | None:
        """Cost of a training by offloading as `polish` trains; None if the run does not polish."""
        if not isinstance(self.run_config.polish, ExactSteps):
            return None
        shape, need = self._offload.fitting(None, self.limit_gib)
        return self._cost(self._offload.layout, shape, need, samples=0)

    @cached_property
    def _whole(self) -> _Training:
        return _Training(
            "lora", None, self.full_layout, self.step_shape, self.step_shape.accumulate
        )

    @cached_property
    def _offload(self) -> _Training:
        """The training by offloading, whose blocks leave before the backward pass."""
        shape = replace(self.step_shape, checkpointing=True)
        return _Training("offload", None, replace(self.full_layout, streamed=True), shape, 1)

    @cached_property
    def _factors(self) -> _Training:
        """The training through factors at the ratio of the run, or at the default one."""
        compression = self.run_config.compression
        budget = Compression(compression.ratio or DEFAULT_RATIO, compression.of, MODEL_BITS)
        layout = compressed_layout(self.full_layout, self.run_config, budget)
        return _Training("emloc", budget.ratio, layout, self.step_shape, self.step_shape.accumulate)

    @staticmethod
    def _is_original(training: _Training, precision: Precision | None) -> bool:
        """Whether it trains the original itself, so that anchors and exact steps add nothing."""
        return training.ratio is None and (precision is None or training.layout.streamed)

    def _row(
        self,
        training: _Training,
        precision: Precision | None,
        *,
        anchored: bool,
        corrected: bool,
    ) -> PlanRow:
        """Return the row of a training in a packed format, with the anchors of the run or without.

        Only the LoRA of factors without anchors is ever `corrected`. The exact steps of the run are
        behind every training but that of the original.
        """
        layout = replace(training.layout, precision=precision)
        name = _method_label(training.method, precision)
        anchors = self.anchors if anchored else None
        if anchors is not None:
            shape = with_offsets(training.shape, anchors)
            training = replace(training, shape=shape)
            name = _anchored_label(name, training.method, precision, anchors)
        shape, need = training.fitting(precision, self.limit_gib)
        cost = self._cost(layout, shape, need, self.run_config.calibration.samples)
        if anchors is not None:
            cost = anchors.added_to(cost, layout, self.gpu)
        is_factorised = training.ratio is not None
        gain = measured_gain(
            Trained(
                is_factorised,
                bits_of(precision),
                anchored=anchored,
                shared=factors_of(self.run_config).shared if is_factorised else "none",
                corrected=is_factorised and not anchored and corrected,
            ),
            training.ratio,
        )
        if self.exact_steps is not None and not self._is_original(training, precision):
            cost, gain = self._polished(cost), None  # the gain was not measured
        label = name + _passes_label(shape, self.step_shape)
        seconds = cost.seconds(self.run_config.train.steps)
        return PlanRow(label, training.ratio, bits_of(precision), need, cost, seconds, gain)

    def _cost(
        self, layout: TrainingLayout, shape: StepShape, need: MemoryNeed, samples: int
    ) -> TrainingCost:
        budget, gpu = self.run_config.budget, replace(self.gpu, memory_gib=self.limit_gib)
        cost = cost_of(layout, shape, need.operations, gpu, samples, budget)
        return cost if self.features is None else self.features.added_to(cost, self.gpu)

    def _polished(self, cost: TrainingCost) -> TrainingCost:
        """Return the cost of a training with the exact steps behind it."""
        steps, polish = self.exact_steps, self.run_config.polish
        assert steps is not None
        assert isinstance(polish, ExactSteps)
        return replace(
            cost,
            polish_seconds=steps.load_seconds + polish.steps * steps.step_seconds,
            read=cost.read + weight_bytes(self.full_layout.source),
            host=max(cost.host, steps.host),
        )


def planner_of(run_config: RunConfig, step_shape: StepShape, gpu: Gpu) -> Planner:
    """Return the planner of a run; `budget.gpu_gib` replaces the memory of the GPU.

    Raises:
        ConfigError: the model's shape is unknown, a pattern matches no layer, the training does
            not use the memory-saving path, most parameters of the blocks are in no linear layer, or
            the emulator cannot be put back onto the original although there are anchors.
    """
    refuse_unplanned(run_config.model, "model=smollm2_135m")
    source = run_config.model.shape_source()
    require_plannable(run_config.model, source)
    limit_gib = device_gib(run_config, gpu)
    anchors = anchor_plan(run_config, source, step_shape, limit_gib)
    features = feature_plan(run_config.train, source, step_shape)
    trained = trained_source(run_config.train, source)
    return Planner(
        run_config,
        layout_of(run_config, trained, None, None),
        step_shape,
        gpu,
        limit_gib,
        anchors,
        features,
    )


def device_gib(run_config: RunConfig, gpu: Gpu) -> float:
    """Return the device memory that a run may take: `budget.gpu_gib`, or all of the GPU's."""
    return run_config.budget.gpu_gib or gpu.memory_gib


def _passes_label(shape: StepShape, own_shape: StepShape) -> str:
    """Return the settings that divide a step in another way than the run does."""
    if shape.accumulate == own_shape.accumulate:
        return ""
    return f" train.batch={shape.batch} train.accumulate={shape.accumulate}"


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
