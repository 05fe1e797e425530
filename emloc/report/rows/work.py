"""The arithmetic of a run and the weights that it reads, with the run's part of shared stages."""

from __future__ import annotations

from collections.abc import Sequence

from emloc.report.rows.gain import StoredRun

FORWARDS = "row_forwards/"
WEIGHTS = "weights_read/"
_TRAINING = "train"


def work_numbers(run: StoredRun, runs: Sequence[StoredRun]) -> dict[str, float]:
    """Row forwards and weights of each stage, and trained rows, where the run has recorded them.

    Runs of one artifact share what the artifact took, in equal parts: one calibration serves all
    learning rates and seeds. A training is shared by none, since it is what a method costs, even
    if two recoveries start from it.
    """
    metrics = run.metrics
    work = {
        f"{kind}{stage}": number / _sharers(stage, run, runs)
        for kind in (FORWARDS, WEIGHTS)
        for stage, number in metrics.get(kind.rstrip("/"), {}).items()
    }
    rows = {"trained_rows": metrics["trained_rows"]} if "trained_rows" in metrics else {}
    return rows | work


def _sharers(stage: str, run: StoredRun, runs: Sequence[StoredRun]) -> int:
    """How many of `runs`, which include `run`, have the same artifact of this stage."""
    if stage == _TRAINING:
        return 1
    key = run.metrics["stages"][stage]
    return sum(one.metrics.get("stages", {}).get(stage) == key for one in runs)
