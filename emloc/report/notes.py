"""Notes below a table that are about its runs, not about its columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emloc.config.run_folder import Run
from emloc.report.rows import Row
from emloc.report.rows.run_files import run_folder


def left_out(rows: Sequence[Row]) -> list[str]:
    """A note that names the runs without results; a published table has no lines of them."""
    several = are_of_several(rows)
    names: dict[str, dict[str, None]] = {}
    for row in rows:
        if not row.done:
            column = f" on {row.model}, {row.task}" if several else ""
            names.setdefault(row.state, {})[f"{row.cell or row.named_method}{column}"] = None
    by_state = ". ".join(f"{state}: {'; '.join(of_state)}" for state, of_state in names.items())
    return [f"left out, without results: {by_state}"] if by_state else []


def data_digests(rows: Sequence[Row]) -> list[str]:
    """A digest of the data of each task, because local copies of a data set may differ."""
    digests = sorted({(row.task, row.data) for row in rows if row.done})
    return [f"data of {task}: {digest}" for task, digest in digests]


def how_to_serve(place: Path, rows: Sequence[Row]) -> list[str]:
    """A note for models whose checkpoint has its authors' layers, which no adapter fits.

    Args:
        place: a folder of runs, one run, or a file of rows, beside which no runs lie.
        rows: the rows of `place`.
    """
    folders = [(row.model, run_folder(place, row)) for row in rows if row.done]
    models = {
        model
        for model, folder in folders
        if (folder / "adapter").exists() and Run(folder).metrics.get("authors_format")
    }
    return [
        f"to serve {model}, merge first (emloc merge RUN): its checkpoint has the authors' layers, "
        "such as a fused wqkv, so vLLM and PEFT cannot load the adapter beside it"
        for model in sorted(models)
    ]


def sentence(note: str) -> str:
    """The note as a sentence of its own."""
    return f"{note[:1].upper()}{note[1:]}."


def are_of_several(rows: Sequence[Row]) -> bool:
    """Whether the runs are on several models or tasks."""
    return len({(row.model, row.task) for row in rows}) > 1
