"""Rows that lack a value: they are counted, and refused or left out."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from emloc.errors import ConfigError
from emloc.tasks.marked_rows import MissingValueError

log = logging.getLogger(__name__)

FAIL, SKIP = "fail", "skip"


@dataclass
class IncompleteRows:
    """Rows of one split that lack a value, by what they lack; updated while rows are read."""

    rows: dict[str, list[str]] = field(default_factory=dict)  # what is missing -> names of rows

    def add(self, name: str, lack: str) -> None:
        """Count the row `name`, which lacks `lack`."""
        self.rows.setdefault(lack, []).append(name)

    def add_column(self, name: str, error: MissingValueError, setting: str) -> None:
        """Count the row `name`, where the template in `task.<setting>` writes a missing value."""
        self.add(name, f"no value in the column {error.column}, which task.{setting} writes")

    def add_if_empty(self, name: str, setting: str, template: str, text: str) -> bool:
        """Count the row `name` if its `text` is empty and the `template` is not; return whether."""
        is_empty = not text.strip() and bool(template.strip())
        if is_empty:
            self.add(name, f"an empty text for task.{setting}")
        return is_empty

    def report(self, task: str, split: str, total: int, policy: str) -> None:
        """Refuse incomplete rows, or log that they are skipped, as the setting `policy` says.

        Raises:
            ConfigError: there are such rows and `policy` is `fail`; names columns, rows and counts.
        """
        if not self.rows:
            return
        lacks = "; ".join(
            f"{len(names)} of {total} rows of {split} have {lack} (the first is {names[0]})"
            for lack, names in self.rows.items()
        )
        if policy == FAIL:
            raise ConfigError(
                f"task {task}: {lacks}; correct the rows, or set task.missing=skip to leave them "
                "out"
            )
        log.warning("task %s: left out: %s", task, lacks)
