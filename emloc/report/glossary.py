"""What each column of the table of runs means. Meanings of measured numbers are in `run_table`."""

from __future__ import annotations

import pandas as pd

from emloc.report.notes import sentence
from emloc.report.run_table import COST_NOTES, NOTES, Column, columns_of
from emloc.report.table import Table

_LABELS = {
    "experiment": "Experiment file that the run belongs to.",
    "cell": "Name of the run in its experiment.",
    "method": "Method: which emulator is trained through, whether anchors put it back onto the "
    "original, and how the LoRA is recovered.",
    "model": "Model that is fine-tuned.",
    "task": "Task that the model is trained and scored on.",
    "compression": "Share of the parameters and format of the weights that are trained through.",
    "seeds": "Seeds of the runs in this line.",
}
_SCORE = "Score of the held-out rows{}; higher is better."
_KIND = "The same score, of the held-out rows of the kind {}."
_STAGE = "Seconds of the stage {}; a reused stage has the seconds of its computation."
_COMPARED = {
    "ours": "Our number in the paper's unit.",
    "paper": "The paper's number for the same model, task and method{}.",
    "difference": "Our number less the paper's{}.",
}


def column_meanings(summary: pd.DataFrame, table: Table) -> dict[str, str]:
    """Return column -> meaning in one sentence, in the order of the table of runs.

    Args:
        summary: the runs in the table, as `summary_of` returns them.
        table: of the summary.
    """
    score, *numbers = columns_of(summary)
    meanings = {score.head: _SCORE.format(" in percent" if score.head.endswith("%") else "")}
    meanings |= {column.head: _meaning(column) for column in numbers}
    meanings |= _LABELS
    return {
        name: meanings.get(name, f"Setting {name}, in which the runs differ.")
        for name in table.columns
    }


def _meaning(column: Column) -> str:
    kind, _, name = column.name.partition("/")
    if kind == "seconds":
        return _STAGE.format(name)
    if kind in _COMPARED:
        unit = column.head.partition(" ")[2]
        return _COMPARED[kind].format(f" in {unit}" if unit else "")
    note = (NOTES | COST_NOTES).get(column.head)
    return sentence(note) if note else _KIND.format(name.rpartition("/")[2])
