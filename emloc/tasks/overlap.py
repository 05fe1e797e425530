"""Rows that are trained on and evaluated on."""

from __future__ import annotations

from typing import Any

from emloc.data.examples import Example, Examples
from emloc.errors import ConfigError


def refuse_overlap(training: Examples, held_out: Examples) -> None:
    """Check that no training row is also an evaluation row.

    Two rows are the same if prompt, images, answer and references are. The tasks of this package
    leave such rows out of the training; a class of a plug-in may not.

    Raises:
        ConfigError: a row is in both; names the first one and the number of such rows.
    """
    held_out_ids = {_content(row): row.id for row in reversed(held_out.rows)}
    shared = [row for row in training if _content(row) in held_out_ids]
    if shared:
        first = shared[0]
        raise ConfigError(
            f"task {training.name}: {len(shared)} of {len(training)} training rows are also "
            f"evaluation rows, the first is {first.id} ({held_out_ids[_content(first)]}); "
            "correct the data, or set task"
        )


def _content(row: Example) -> tuple[Any, ...]:
    """Everything that two equal rows share."""
    return (row.prompt, tuple(image.key for image in row.images), row.target, row.references)
