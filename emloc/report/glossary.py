"""What each column of the table of runs means, in one sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from emloc.report.rows import Row, metric_of

_MEANINGS = {
    "experiment": "Experiment file that the run belongs to.",
    "cell": "Name of the run's line in its experiment.",
    "method": "Method: which emulator is trained through, and how the LoRA is recovered.",
    "model": "Model that is fine-tuned.",
    "task": "Task that the model is trained and scored on.",
    "seeds": "Seeds of the runs in this line. Numbers are mean ± standard deviation over them.",
    "loss": "Loss of the held-out answers in nats per token; lower is better.",
    "gain kept": "Share of the loss that LoRA on the original model removes, and that this method "
    "removes as well: 0% is the untrained model, 100% is LoRA.",
    "loss as trained": "Loss of the same answers by the emulator with its LoRA, before the LoRA "
    "is recovered for the original model.",
    "through MB": "Size of the model that is trained through, the emulator or the original, in MB.",
    "train GiB": "Peak memory of training in GiB; of several seeds the largest.",
    "step s": "Seconds of one training step, the median.",
    "peak GB": "Peak memory of training in GB, the paper's unit.",
    "build h": "Hours of calibrating and building the emulator.",
}
_STAGE = "Seconds of the stage {} when it was computed. A cached stage keeps this time."
_PAPER = "The paper's number for the same model, task and method{}."
_DIFFERENCE = "Our number less the paper's{}."


def column_meanings(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str]:
    """Return column -> meaning, in the order of the columns.

    Args:
        columns: of the table of runs.
        rows: the runs in it, which decide what columns of scores and settings are called.
    """
    metric = metric_of(rows)
    kinds = {
        name.removeprefix(f"scores/{metric}/")
        for row in rows
        for name in row.numbers
        if name.startswith(f"scores/{metric}/")
    }
    return {column: _meaning(column, metric, kinds, rows) for column in columns}


def _meaning(column: str, metric: str, kinds: set[str], rows: Sequence[Row]) -> str:
    if column in _MEANINGS:
        return _MEANINGS[column]
    if column in (metric, f"{metric} %"):
        unit = " in percent" if column.endswith("%") else ""
        return (
            f"Score of the held-out rows{unit}; higher is better. OOM: the run was out of memory."
        )
    if column in kinds:
        return f"The same score, over the held-out rows of the kind {column}."
    head, _, unit = column.partition(" ")
    if head in ("paper", "difference"):
        text = _PAPER if head == "paper" else _DIFFERENCE
        return text.format(f" in {unit}" if unit else "")
    if unit == "s" and any(head in row.stages for row in rows):
        return _STAGE.format(head)
    return f"Setting {column}, in which the runs differ."
