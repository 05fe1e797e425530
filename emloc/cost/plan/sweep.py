"""Table of the memory and time of each run of a sweep, in which shared work counts once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emloc.cost.plan.advice import Machine, hours
from emloc.cost.plan.gpus import Gpu
from emloc.cost.plan.layout import StepShape
from emloc.cost.plan.rows import PlanRow, device_gib, planner_of
from emloc.cost.plan.table import HEADER, cells_of, notes_of
from emloc.report.markdown_table import markdown_table
from emloc.runtime.digest import digest
from emloc.runtime.keys import key_of
from emloc.stages.run_config import RunConfig


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep: the overrides that only some runs have, and its row."""

    overrides: str
    run_config: RunConfig
    row: PlanRow

    @property
    def build_key(self) -> str:
        """Key of the emulator: runs with the same key share its build."""
        config = self.run_config
        parts = (config.model, config.emulator, config.compression, config.precision)
        samples = (config.calibration, config.task.key)
        return digest([*(key_of(part) for part in (*parts, samples[0])), samples[1]])

    @property
    def pass_key(self) -> str:
        """Key of the first round's offsets: they depend on no adapter, rate or seed."""
        anchor = self.run_config.anchor
        return digest([self.build_key, anchor.offsets_key if anchor.anchors else None])

    @property
    def feature_key(self) -> str:
        """Key of stored features: they depend on the original and its images alone."""
        return digest([key_of(self.run_config.model), self.run_config.task.key])

    @property
    def shared_seconds(self) -> list[tuple[str, float]]:
        """Key and time of all work that other runs share."""
        cost = self.row.cost
        return [
            (self.build_key, cost.build_seconds),
            (self.pass_key, cost.first_pass_seconds),
            (self.feature_key, cost.feature_seconds),
        ]


def plan_sweep(
    runs: Sequence[tuple[str, RunConfig]],
    length: int,
    answer: int,
    gpu: Gpu,
    host_gib: float = float("inf"),
    disk_gib: float = float("inf"),
) -> str:
    """Return a table in Markdown with a row for each run, and the time of all runs together.

    Args:
        runs: the overrides that only some runs have, and the settings of each run.
        length: tokens of a sample.
        answer: answer tokens among them.
        gpu: the GPU to plan for; `budget.gpu_gib` of a run replaces its memory.
        host_gib: host memory of the machine.
        disk_gib: free disk of the machine.

    Raises:
        ConfigError: the training of a run cannot be planned.
    """
    planned = [
        planned_run(overrides, config, length, answer, gpu)
        for overrides, config in runs
        if config.adapter.trains
    ]

    def machine_of(config: RunConfig) -> Machine:
        return Machine(device_gib(config, gpu), host_gib, disk_gib)

    rows = [[run.overrides, *cells_of(run.row, machine_of(run.run_config))[1:]] for run in planned]
    machines = [machine_of(config) for _, config in runs]
    first = runs[0][1]
    notes = notes_of(first, StepShape.of(first.train, length, answer), machines)
    table = markdown_table(("run", *HEADER[1:]), rows)
    return "\n".join([table, "", *notes, _total(planned, len(runs))])


def planned_run(
    overrides: str, run_config: RunConfig, length: int, answer: int, gpu: Gpu
) -> PlannedRun:
    """Return a run with its row.

    Raises:
        ConfigError: its training cannot be planned.
    """
    shape = StepShape.of(run_config.train, length, answer)
    row = planner_of(run_config, shape, gpu).own_row()
    return PlannedRun(overrides, run_config, row)


def repeated_seconds(planned: Sequence[PlannedRun]) -> float:
    """Return the time of shared work that other runs have computed already."""
    shared = [part for run in planned for part in run.shared_seconds]
    return sum(seconds for _, seconds in shared) - sum(dict(shared).values())


def _total(planned: Sequence[PlannedRun], count: int) -> str:
    """Return the time of all runs, one after the other, in a sentence."""
    alone, repeated = sum(run.row.seconds for run in planned), repeated_seconds(planned)
    untrained = f", and {count - len(planned)} train nothing" if count > len(planned) else ""
    return (
        f"{len(planned)} trainings take {hours(alone - repeated)} one after the other{untrained}; "
        f"builds and first passes that they share are counted once, which is {hours(repeated)} less"
    )
