"""What each column of the table of runs means. Meanings of measured numbers are in `run_table`."""

from __future__ import annotations

import pandas as pd

from emloc.report.run_table import columns_of
from emloc.report.table import Table

_LABELS = {
    "experiment": "Experiment file that the run belongs to.",
    "cell": "Name of the run in its experiment.",
    "method": "Method: which emulator is trained through, and how the LoRA is recovered.",
    "model": "Model that is fine-tuned.",
    "task": "Task that the model is trained and scored on.",
    "compression": "Share of the parameters and format of the weights that are trained through.",
    "seeds": "Seeds of the runs in this line.",
}
_SCORE = "Score of the held-out rows{}; higher is better."
_KIND = "The same score, of the held-out rows of the kind {}."
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
    for column in numbers:
        kind, _, name = column.name.partition("/")
        unit = column.head.partition(" ")[2]
        if column.note:
            meaning = column.note.partition(": ")[2]
            meanings[column.head] = f"{meaning[0].upper()}{meaning[1:]}."
        elif kind in _COMPARED:
            meanings[column.head] = _COMPARED[kind].format(f" in {unit}" if unit else "")
        else:
            meanings[column.head] = _KIND.format(name.rpartition("/")[2])
    return {
        name: _LABELS.get(name)
        or meanings.get(name)
        or f"Setting {name}, in which the runs differ."
        for name in table.columns
    }
