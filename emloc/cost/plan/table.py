"""Table of the memory, time and disk space that each method would need (`emloc plan`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import yaml

from emloc.config.paths import choices
from emloc.config.presets import named_method
from emloc.config.settings import MODEL_BITS, Compression
from emloc.cost.plan.anchors import AnchorPlan, anchor_plan, with_offsets
from emloc.cost.plan.cost import TrainingCost, cost_of
from emloc.cost.plan.fit import (
    RESERVE,
    MemoryNeed,
    compressed_layout,
    layout_of,
    need_from_trace,
    refuse_unplanned,
    require_plannable,
    solve_emulator_compression,
    usable_bytes,
)
from emloc.cost.plan.gpus import Gpu
from emloc.cost.plan.layout import StepShape, TrainingLayout
from emloc.errors import ConfigError
from emloc.precision import Precision, bits_of
from emloc.report.markdown_table import markdown_table
from emloc.runtime.memory import GIB
from emloc.stages.run_config import RunConfig, formats

HEADER = (
    *("method", "ratio", "bits", "weights", "adapter", "activations", "logits", "peak GiB"),
    *("fits", "host GiB", "disk GiB", "build s", "step s"),
)
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
    logits: int


def plan(run_config: RunConfig, step_shape: StepShape, gpu: Gpu) -> str:
    """Return the table in Markdown, with a last line about the choice of `compression=auto`.

    Raises:
        ConfigError: the model's shape is unknown, a pattern matches no layer, the training does
            not use the memory-saving path, most parameters of the blocks are in no linear layer, or
            the emulator cannot be put back onto the original although there are anchors.
    """
    refuse_unplanned(run_config.model, "model=smollm2_135m")
    limit = run_config.budget.gpu_gib or gpu.memory_gib
    source = run_config.model.shape_source()
    require_plannable(run_config.model, source)
    anchors = anchor_plan(run_config, source, step_shape)
    full_layout = layout_of(run_config, source, None, None)
    rows = list(_plan_rows(run_config, full_layout, step_shape, gpu, anchors))
    table = markdown_table(HEADER, [_cells(row, limit) for row in rows])
    passes = f"{step_shape.accumulate} x " if step_shape.accumulate > 1 else ""
    notes = (
        f"{run_config.model.name}: {passes}{step_shape.batch} x {step_shape.length} tokens a step, "
        f"LoRA rank {run_config.lora.rank}; all in GiB, logits within activations; fits: "
        f"within {limit:g} GiB with {RESERVE:.0%} to spare"
    )
    anchor_lines = anchors.lines() if anchors else []
    auto_line = _auto_line(run_config, full_layout, with_offsets(step_shape, anchors))
    return "\n".join([table, "", notes, *anchor_lines, auto_line])


def _plan_rows(
    run_config: RunConfig,
    full_layout: TrainingLayout,
    step_shape: StepShape,
    gpu: Gpu,
    anchors: AnchorPlan | None,
) -> Iterator[PlanRow]:
    """Yield the rows of LoRA, offloading and EMLoC in the model's dtype and in each packed format.

    With anchors, each emulator has a further row.
    """
    budget = Compression(
        run_config.compression.ratio or DEFAULT_RATIO, run_config.compression.of, MODEL_BITS
    )
    offload_shape = replace(step_shape, checkpointing=True)  # blocks leave before the backward pass
    for method, ratio, layout, shape in (
        ("lora", None, full_layout, step_shape),
        ("offload", None, replace(full_layout, streamed=True), offload_shape),
        ("emloc", budget.ratio, compressed_layout(full_layout, run_config, budget), step_shape),
    ):
        trace = layout.trace_pass(shape)
        for precision in (None, *formats(run_config.precision)):
            packed_layout = replace(layout, precision=precision)
            need = need_from_trace(packed_layout, shape, trace)
            samples = run_config.calibration.samples
            cost = cost_of(packed_layout, shape, need.operations, gpu, samples, run_config.budget)
            name = method if precision is None else _method_label(method, precision)
            logits, bits = packed_layout.logits(step_shape), bits_of(precision)
            yield PlanRow(name, ratio, bits, need, cost, logits)
            is_original = ratio is None and (precision is None or layout.streamed)
            if anchors and not is_original:
                need = need_from_trace(packed_layout, with_offsets(shape, anchors), trace)
                name = _anchored_label(name, method, precision, anchors)
                yield PlanRow(name, ratio, bits, need, anchors.added_to(cost), logits)


def _method_label(method: str, precision: Precision) -> str:
    """Return the method that presets the format's width, or else method and format."""
    if method not in PACKED_METHODS:
        return f"{method} {precision.name}"
    preset = yaml.safe_load(choices("method")[PACKED_METHODS[method]].read_text(encoding="utf-8"))
    is_preset = preset["compression"]["bits"] == precision.bits
    return PACKED_METHODS[method] if is_preset else f"{method} {precision.name}"


def _anchored_label(
    label: str, method: str, precision: Precision | None, anchors: AnchorPlan
) -> str:
    """Return the method that presets anchors and the format's width, or `label` with anchors."""
    if precision is not None and label.endswith(f" {precision.name}"):
        return f"{label} anchor={anchors.choice}"
    settings = {"anchor": anchors.choice, "compression.bits": str(bits_of(precision))}
    return named_method(ANCHORED_METHODS[method], settings)


def _cells(row: PlanRow, limit: float) -> list[str]:
    """Format a row for the columns of `HEADER`; sizes and the device's limit are in GiB."""
    need, cost = row.need, row.cost
    adapter = need.adapter + need.scratch
    sizes = (need.weights, adapter, need.activations, row.logits, need.peak)
    return [
        row.method,
        "" if row.ratio is None else f"{row.ratio:g}",
        str(row.bits),
        *(f"{size / GIB:.2f}" for size in sizes),
        "yes" if need.peak <= usable_bytes(limit) else "no",
        f"{cost.host / GIB:.1f}",
        f"{cost.disk / GIB:.1f}",
        f"{cost.build_seconds:.0f}",
        f"{cost.step_seconds:.2f}",
    ]


def _auto_line(run_config: RunConfig, full_layout: TrainingLayout, step_shape: StepShape) -> str:
    """Return the line about compression=auto: ratio and bits of an emulator within the budget."""
    if run_config.budget.gpu_gib is None:
        return "compression=auto: set budget.gpu_gib to see what it would choose"
    unsolved = replace(
        run_config, compression=replace(run_config.compression, ratio=None, bits=None)
    )
    try:
        solution = solve_emulator_compression(unsolved, full_layout, step_shape)
    except ConfigError as error:
        return f"compression=auto: {error}"
    return (
        f"compression=auto: compression.ratio={solution.ratio:g} compression.bits={solution.bits}"
    )
