"""Device memory that a run will take, which is known before it starts (`budget.jobs_per_gpu=auto`).

The best figure is the peak of an earlier run with the same settings, whatever its seed and learning
rate, since it holds all stages as they are. Each run that ends records its own. Without such a run
it is the plan of a LoRA training of the whole original, which takes more than a training through
any emulator, and more than the evaluation, which has the whole original on the device, too. A plan
counts tensors alone and not what torch reserves around them, so it has a larger margin.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from emloc.cost.plan.features import trained_source
from emloc.cost.plan.fit import layout_of, need_of
from emloc.cost.plan.solve import longest_step
from emloc.errors import ConfigError
from emloc.runtime.atomic import write_json
from emloc.runtime.digest import digest
from emloc.runtime.keys import key_of
from emloc.runtime.memory import GIB
from emloc.runtime.stage_cache import Artifact
from emloc.stages.run_config import RunConfig

# What a run may reserve over the recorded peak, such as for rows of another seed; over its plan.
MARGIN, PLAN_MARGIN = 1.1, 1.5
# Bytes of a process on the device that torch does not count: the context of CUDA and its kernels.
CONTEXT = 3 * GIB // 4
# Sections that the memory of a run depends on, and their settings that change no size.
SECTIONS = (
    *("model", "task", "calibration", "compression", "precision", "lora", "emulator", "adapter"),
    *("recovery", "anchor", "polish", "stage", "train", "eval"),
)
WITHOUT_SIZE = {
    "calibration": ("seed",),
    "train": (
        *("learning_rate", "schedule", "warmup", "weight_decay", "clip"),
        *("log_every", "save_every"),
    ),
}


@dataclass(frozen=True)
class PeakRecords:
    """Recorded peaks of runs: one file for all runs with the same memory."""

    folder: Path

    def has(self, key: str) -> bool:
        """Return whether there is a record."""
        return self._file(key).exists()

    def read(self, key: str) -> int | None:
        """Return the largest peak in bytes; None if the last run ran out of memory."""
        peak: int | None = json.loads(self._file(key).read_text())["bytes"]
        return peak

    def add(self, key: str, peak: int | None) -> None:
        """Record the peak of a run; None: it ran out of memory."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "record.lock"):
            former = self.read(key) if self.has(key) else None
            largest = None if peak is None else max(peak, former or 0)
            write_json(self._file(key), {"bytes": largest})

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def memory_key(run_config: RunConfig) -> str:
    """Return the name of all runs that take the same memory as this one."""
    budget = run_config.budget
    return digest(
        {
            "gpu_gib": budget.gpu_gib,
            "gpu_states_gib": budget.gpu_states_gib,
            **{name: _sizes_of(name, getattr(run_config, name)) for name in SECTIONS},
        }
    )


def _sizes_of(name: str, section: Any) -> Any:
    """The key of a section without the settings that change no size."""
    if name == "stage":  # a new version of a stage may take other memory
        return [[stage, part.version, key_of(part)] for stage, part in section.items()]
    key = key_of(section)
    if name not in WITHOUT_SIZE:
        return key
    return {setting: value for setting, value in key.items() if setting not in WITHOUT_SIZE[name]}


def expected_bytes(run_config: RunConfig, records: PeakRecords) -> int | None:
    """Return the bytes of device memory that a run will take; None if they are not known.

    They are not known if the training cannot be planned, or if such a run ran out of memory. A run
    with `budget.gpu_gib` never takes more than that.

    Raises:
        ConfigError: the model or the data cannot be read.
    """
    key, limit = memory_key(run_config), run_config.budget.gpu_gib
    if records.has(key):
        peak, margin = records.read(key), MARGIN
    else:
        peak, margin = planned_peak(run_config), PLAN_MARGIN
    bounds = [] if peak is None else [need_of_peak(peak, margin)]
    bounds += [] if limit is None else [int(limit * GIB) + CONTEXT]
    return min(bounds, default=None)


def need_of_peak(peak: int, margin: float = MARGIN) -> int:
    """Return the bytes to reserve for a run with such a peak."""
    return int(margin * peak) + CONTEXT


def planned_peak(run_config: RunConfig) -> int | None:
    """Return the peak, in bytes, of a LoRA training of the whole model on the longest rows.

    A batch has as many rows as the larger one of training and evaluation. None: the training of
    this model family, or with these settings, cannot be planned.

    Raises:
        ConfigError: the model or the data cannot be read.
    """
    model = run_config.emulator.model(run_config.model, run_config.compression)
    if model.unplanned is not None:
        return None
    run_config, source = replace(run_config, model=model), model.open()
    step_shape = longest_step(run_config, source)
    batch = max(step_shape.batch, run_config.eval.batch)
    try:
        trained = trained_source(run_config.train, source)
        layout = layout_of(run_config, trained, None, None)
    except ConfigError:  # such as train.lean=false
        return None
    return need_of(layout, replace(step_shape, batch=batch)).peak


def largest_peak(stages: Iterable[Artifact]) -> int:
    """Return the largest peak of all stages of a run, in bytes, also of those from the cache."""
    return int(GIB * max(stage.facts["peak_gib"] for stage in stages))
