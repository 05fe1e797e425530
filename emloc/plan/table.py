"""`emloc plan`: what each method would need, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from emloc.config import Cell
from emloc.errors import ConfigError
from emloc.memory import GIB
from emloc.plan.cost import Cost, cost_of
from emloc.plan.fit import (
    RESERVE,
    Need,
    factored,
    fitting_emulator,
    need,
    refuse_unplanned,
    scheme_of,
    usable,
)
from emloc.plan.gpus import Gpu
from emloc.plan.scheme import Scheme, Work
from emloc.settings import Compression

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
        ConfigError: the model's shape is not known, a pattern matches nothing, or the training is
            not the lean one.
    """
    refuse_unplanned(cell.model, "model=smollm2_135m")
    limit = cell.budget.gpu_gib or gpu.memory_gib
    whole = scheme_of(cell, cell.model.shape_source(), None, 16)
    lines = list(_lines(cell, whole, work, gpu, limit))
    rows = [list(HEADER), *(_cells(line) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    padded = [[cell.ljust(width) for cell, width in zip(r, widths, strict=True)] for r in rows]
    padded.insert(1, ["-" * width for width in widths])
    table = "\n".join("| " + " | ".join(row) + " |" for row in padded)
    passes = f"{work.accumulate} x " if work.accumulate > 1 else ""
    notes = (
        f"{cell.model.name}: {passes}{work.batch} x {work.length} tokens a step, LoRA rank "
        f"{cell.lora.rank}; all in GiB, logits within activations; fits: within {limit:g} GiB with "
        f"{RESERVE:.0%} to spare"
    )
    return "\n".join([table, "", notes, _auto(cell, whole, work)])


def _lines(cell: Cell, whole: Scheme, work: Work, gpu: Gpu, limit: float) -> Iterator[Line]:
    budget = Compression(cell.compression.ratio or USUAL_RATIO, cell.compression.of, 16)
    for names, ratio, scheme in (
        (("lora", "qlora"), None, whole),
        (("emloc", "emloc_nf4"), budget.ratio, factored(whole, cell, budget)),
    ):
        traced = scheme.traced(work)
        for method, bits in zip(names, (16, 4), strict=True):
            held = replace(scheme, bits=bits)
            found = need(held, work, traced)
            samples = cell.calibration.samples
            cost = cost_of(held, work, found.operations, gpu, samples, cell.budget)
            fits = found.peak <= usable(limit)
            yield Line(method, ratio, bits, found, cost, held.logits(work), fits)


def _cells(line: Line) -> list[str]:
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


def _auto(cell: Cell, whole: Scheme, work: Work) -> str:
    """Of an emulator whatever the method, with nothing given but the budget."""
    if cell.budget.gpu_gib is None:
        return "compression=auto: set budget.gpu_gib to see what it would choose"
    left_open = replace(cell, compression=replace(cell.compression, ratio=None, bits=None))
    try:
        chosen = fitting_emulator(left_open, whole, work)
    except ConfigError as error:
        return f"compression=auto: {error}"
    return f"compression=auto: compression.ratio={chosen.ratio:g} compression.bits={chosen.bits}"
