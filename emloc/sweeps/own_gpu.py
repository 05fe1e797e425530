"""The GPU of a job, or its share of one, as `budget.jobs_per_gpu` says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from emloc.cost.expected_memory import PeakRecords, expected_bytes, largest_peak, memory_key
from emloc.pipeline import Result
from emloc.runtime.gpu_ledger import own_share
from emloc.runtime.gpu_lock import own_slot
from emloc.runtime.kept_memory import KEPT_MEMORY
from emloc.runtime.memory import is_out_of_memory
from emloc.stages.run_config import RunConfig


def run_on_own_gpu(run_config: RunConfig, folder: Path, work: Callable[[], Result]) -> Result:
    """Wait for a GPU, and run all stages on it.

    With `budget.jobs_per_gpu=auto` the peak of the run is recorded for later runs. If the run ran
    out of memory, the next run with such settings has a GPU alone. A run that fails leaves no
    memory to later runs.

    Args:
        run_config: settings of the run.
        folder: holds the locks of all GPUs of this machine.
        work: runs the stages.
    """
    try:
        return _with_share(run_config, folder, work)
    except Exception:  # why: whatever failed, a later run gets all memory
        KEPT_MEMORY.give_back()
        raise


def _with_share(run_config: RunConfig, folder: Path, work: Callable[[], Result]) -> Result:
    jobs = run_config.budget.jobs_per_gpu
    if isinstance(jobs, int):
        with own_slot(jobs, folder):
            return work()
    records = PeakRecords(folder / "peaks")
    with own_share(partial(expected_bytes, run_config, records), folder) as share:
        try:
            result = work()
        except Exception as error:
            if share and is_out_of_memory(error):
                records.add(memory_key(run_config), None)
            raise
        if share:
            records.add(memory_key(run_config), largest_peak(result.stages.values()))
        return result
