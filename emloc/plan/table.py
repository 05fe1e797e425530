"""`emloc plan`: what each method would need, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from emloc.config import Cell
from emloc.errors import ConfigError
from emloc.memory import GIB
from emloc.plan.cost import Cost, cost_of
from emloc.plan.fit import RESERVE, Need, fitting, need_of, scheme_of
from emloc.plan.gpus import Gpu
from emloc.plan.scheme import Work
from emloc.source import Source

HEADER = (
    *("method", "ratio", "bits", "weights", "adapter", "activations", "logits", "peak GiB"),
    *("fits", "host GiB", "disk GiB", "build s", "step s"),
)
# Where the configuration leaves the ratio open and gives no budget to solve for it.
USUAL_RATIO = 0.25


@dataclass(frozen=True)
class Line:
    """One method's row."""

    method: str
    ratio: float | None
    bits: int
    need: Need
    cost: Cost
    logits: int
    fits: bool


def plan(cell: Cell, work: Work, gpu: Gpu) -> str:
    """The table, and in a last line what `compression=auto` would choose.

    Raises:
        ConfigError: the model's shape is not known, or a pattern matches nothing.
    """
    source = cell.model.shape_source()
    limit = cell.budget.gpu_gib or gpu.memory_gib
    lines = list(_lines(cell, source, work, gpu, limit))
    rows = [list(HEADER), *(_cells(line) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    padded = [[cell.ljust(width) for cell, width in zip(r, widths, strict=True)] for r in rows]
    padded.insert(1, ["-" * width for width in widths])
    table = "\n".join("| " + " | ".join(row) + " |" for row in padded)
    notes = (
        f"{cell.model.name}: {work.batch} x {work.length} tokens a step, LoRA rank "
        f"{cell.lora.rank}; all in GiB; fits: within {limit:g} GiB with {RESERVE:.0%} to spare"
    )
    return "\n".join([table, "", notes, _auto(cell, source, work)])


def _lines(cell: Cell, source: Source, work: Work, gpu: Gpu, limit: float) -> Iterator[Line]:
    ratio = cell.compression.ratio or USUAL_RATIO
    for method, share, bits in (
        ("lora", None, 16),
        ("qlora", None, 4),
        ("emloc", ratio, 16),
        ("emloc_nf4", ratio, 4),
    ):
        scheme = scheme_of(cell, source, share, bits)
        need = need_of(scheme, work)
        cost = cost_of(scheme, work, need.operations, gpu, cell.calibration.samples, cell.budget)
        yield Line(
            method,
            share,
            bits,
            need,
            cost,
            scheme.logits(work),
            need.peak <= limit * GIB * (1 - RESERVE),
        )


def _cells(line: Line) -> list[str]:
    need, cost = line.need, line.cost
    adapter = need.adapter + need.scratch
    sizes = (need.weights, adapter, need.activations, line.logits, need.peak)
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


def _auto(cell: Cell, source: Source, work: Work) -> str:
    if cell.budget.gpu_gib is None:
        return "compression=auto: set budget.gpu_gib to see what it would choose"
    try:
        chosen = fitting(cell, source, work)
    except ConfigError as error:
        return f"compression=auto: {error}"
    return f"compression=auto: compression.ratio={chosen.ratio:g} compression.bits={chosen.bits}"
