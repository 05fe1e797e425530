"""Table of the memory, time and disk space that each method would need (`emloc plan`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from emloc.cost.plan.advice import Machine, advice
from emloc.cost.plan.anchors import with_offsets
from emloc.cost.plan.cost import DISK
from emloc.cost.plan.fit import RESERVE, solve_emulator_compression
from emloc.cost.plan.gains import ORIGIN
from emloc.cost.plan.gpus import Gpu
from emloc.cost.plan.layout import StepShape, TrainingLayout
from emloc.cost.plan.rows import Planner, PlanRow, planner_of
from emloc.errors import ConfigError
from emloc.report.markdown_table import markdown_table
from emloc.runtime.memory import GIB
from emloc.stages.polishing.exact_steps import ExactSteps
from emloc.stages.run_config import RunConfig

HEADER = (
    *("method", "ratio", "bits", "weights", "adapter", "activations", "peak GiB", "fits"),
    *("host GiB", "disk GiB", "read GiB", "build s", "passes s", "step s", "hours", "gain"),
)


def plan(
    run_config: RunConfig,
    step_shape: StepShape,
    gpu: Gpu,
    host_gib: float = float("inf"),
    disk_gib: float = float("inf"),
) -> str:
    """Return the table in Markdown, with lines about anchors, `compression=auto`, and an advice.

    Args:
        run_config: settings of the run.
        step_shape: one optimizer step of it.
        gpu: the GPU to plan for; `budget.gpu_gib` replaces its memory.
        host_gib: host memory of the machine.
        disk_gib: free disk of the machine.

    Raises:
        ConfigError: the training cannot be planned; see `planner_of`.
    """
    planner = planner_of(run_config, step_shape, gpu)
    machine, anchors = Machine(planner.limit_gib, host_gib, disk_gib), planner.anchors
    rows = list(planner.rows())
    table = markdown_table(HEADER, [cells_of(row, machine) for row in rows])
    lines = [
        *notes_of(run_config, step_shape, [machine]),
        *(planner.features.lines() if planner.features else []),
        *(anchors.lines() if anchors else []),
        *_polish_lines(planner),
        _auto_line(run_config, planner.full_layout, with_offsets(step_shape, anchors)),
        advice(rows, machine, run_config.train.steps),
    ]
    return "\n".join([table, "", *lines])


def notes_of(
    run_config: RunConfig, step_shape: StepShape, machines: Sequence[Machine]
) -> list[str]:
    """Return what the columns mean, and what is planned for.

    `machines` differ at most in the memory of the GPU, which the runs of a sweep may set.
    """
    machine, sizes = machines[0], sorted({machine.gpu for machine in machines})
    passes = f"{step_shape.accumulate} x " if step_shape.accumulate > 1 else ""
    gpu = " or ".join(f"{size:g}" for size in sizes)
    bounds = [f"{gpu} GiB of the GPU with {RESERVE:.0%} to spare"]
    bounds += [f"{machine.host:.3g} GiB of host memory"] if machine.host < float("inf") else []
    bounds += [f"{machine.disk:.3g} GiB of disk"] if machine.disk < float("inf") else []
    return [
        f"{run_config.model.name}: {passes}{step_shape.batch} x {step_shape.length} tokens a step, "
        f"{run_config.train.steps} steps, LoRA rank {run_config.lora.rank}; fits: within "
        f"{', '.join(bounds)}",
        f"read: the original's weights from the disk, at {DISK / 1e9:g} GB/s; hours: all up to the "
        f"adapter; gain: share of LoRA's gain that such a training has kept, {ORIGIN}",
    ]


def cells_of(row: PlanRow, machine: Machine) -> list[str]:
    """Format a row for the columns of `HEADER`; sizes are in GiB."""
    need, cost = row.need, row.cost
    adapter = need.adapter + need.scratch
    sizes = (need.weights, adapter, need.activations, need.peak)
    lacking = machine.lacks(row)
    return [
        row.method,
        "" if row.ratio is None else f"{row.ratio:g}",
        str(row.bits),
        *(f"{size / GIB:.2f}" for size in sizes),
        "yes" if lacking is None else f"no: {lacking}",
        f"{cost.host / GIB:.1f}",
        f"{cost.disk / GIB:.1f}",
        f"{cost.read / GIB:.1f}",
        f"{cost.build_seconds:.0f}",
        f"{cost.pass_seconds:.0f}" if cost.pass_seconds else "",
        f"{cost.step_seconds:.2g}" if cost.step_seconds < 1 else f"{cost.step_seconds:.2f}",
        f"{row.seconds / 3600:.2f}",
        "" if row.gain is None else f"{row.gain:.3f}",
    ]


def _polish_lines(planner: Planner) -> list[str]:
    """Return a line about the exact steps behind a training, if the run has some."""
    cost, polish = planner.exact_steps, planner.run_config.polish
    if cost is None:
        return []
    assert isinstance(polish, ExactSteps)
    return [
        f"polish=exact_steps: {polish.steps} steps on the original take "
        f"{cost.load_seconds + polish.steps * cost.step_seconds:.0f} s and "
        f"{cost.host / GIB:.3g} GiB of host memory, which the rows of emulators contain"
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
