"""`emloc plan`: what each method would need, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import yaml

from emloc.config.paths import choices
from emloc.config.settings import MODEL_BITS, Compression
from emloc.cost.plan.cost import TrainingCost, cost_of
from emloc.cost.plan.fit import (
    RESERVE,
    MemoryNeed,
    factored,
    fitting_emulator,
    need_from_trace,
    refuse_unplanned,
    scheme_of,
    usable,
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
# Where the configuration leaves the ratio open and gives no budget to solve for it.
USUAL_RATIO = 0.25
# Method -> the one that presets the same in a packed format.
PACKED = {"lora": "qlora", "emloc": "emloc_nf4"}


@dataclass(frozen=True)
class PlanRow:
    """One method's row."""

    method: str
    ratio: float | None
    bits: int
    need: MemoryNeed
    cost: TrainingCost
    logits: int
    fits: bool


def plan(run_config: RunConfig, work: StepShape, gpu: Gpu) -> str:
    """The table, and in a last line what `compression=auto` would choose.

    Raises:
        ConfigError: the model's shape is not known, a pattern matches nothing, or the training is
            not the lean one.
    """
    refuse_unplanned(run_config.model, "model=smollm2_135m")
    limit = run_config.budget.gpu_gib or gpu.memory_gib
    whole = scheme_of(run_config, run_config.model.shape_source(), None, None)
    lines = list(_lines(run_config, whole, work, gpu, limit))
    table = markdown_table(HEADER, [_cells(line) for line in lines])
    passes = f"{work.accumulate} x " if work.accumulate > 1 else ""
    notes = (
        f"{run_config.model.name}: {passes}{work.batch} x {work.length} tokens a step, LoRA rank "
        f"{run_config.lora.rank}; all in GiB, logits within activations; fits: within {limit:g} "
        f"GiB with {RESERVE:.0%} to spare"
    )
    return "\n".join([table, "", notes, _auto(run_config, whole, work)])


def _lines(
    run_config: RunConfig, whole: TrainingLayout, work: StepShape, gpu: Gpu, limit: float
) -> Iterator[PlanRow]:
    budget = Compression(
        run_config.compression.ratio or USUAL_RATIO, run_config.compression.of, MODEL_BITS
    )
    for method, ratio, scheme in (
        ("lora", None, whole),
        ("emloc", budget.ratio, factored(whole, run_config, budget)),
    ):
        traced = scheme.traced(work)
        for precision in (None, *formats(run_config.precision)):
            held = replace(scheme, precision=precision)
            found = need_from_trace(held, work, traced)
            samples = run_config.calibration.samples
            cost = cost_of(held, work, found.operations, gpu, samples, run_config.budget)
            fits = found.peak <= usable(limit)
            name = method if precision is None else _called(method, precision)
            yield PlanRow(name, ratio, bits_of(precision), found, cost, held.logits(work), fits)


def _called(method: str, precision: Precision) -> str:
    """The method that presets this width, or the one that `precision` is set beside."""
    preset = yaml.safe_load(choices("method")[PACKED[method]].read_text(encoding="utf-8"))
    same = preset["compression"]["bits"] == precision.bits
    return PACKED[method] if same else f"{method} {precision.name}"


def _cells(line: PlanRow) -> list[str]:
    needed, cost = line.need, line.cost
    adapter = needed.adapter + needed.scratch
    sizes = (needed.weights, adapter, needed.activations, line.logits, needed.peak)
    return [
        line.method,
        "." if line.ratio is None else f"{line.ratio:g}",
        str(line.bits),
        *(f"{size / GIB:.2f}" for size in sizes),
        "yes" if line.fits else "no",
        f"{cost.host / GIB:.1f}",
        f"{cost.disk / GIB:.1f}",
        f"{cost.build_seconds:.0f}",
        f"{cost.step_seconds:.2f}",
    ]


def _auto(run_config: RunConfig, whole: TrainingLayout, work: StepShape) -> str:
    """Of an emulator whatever the method, with nothing given but the budget."""
    if run_config.budget.gpu_gib is None:
        return "compression=auto: set budget.gpu_gib to see what it would choose"
    left_open = replace(
        run_config, compression=replace(run_config.compression, ratio=None, bits=None)
    )
    try:
        chosen = fitting_emulator(left_open, whole, work)
    except ConfigError as error:
        return f"compression=auto: {error}"
    return f"compression=auto: compression.ratio={chosen.ratio:g} compression.bits={chosen.bits}"
