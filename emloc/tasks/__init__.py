"""Tasks: data sets as prompts and answers, behind the protocol `Task`."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from emloc.data.examples import Examples
from emloc.tasks.metrics import Scorer


class Task(Protocol):
    """Interface of a task; a `conf/task/*.yaml` names a class with these members."""

    @property
    def name(self) -> str:
        """Short name of the task for run folders and reports: the stem of its YAML file."""

    @property
    def metric(self) -> str:
        """Name of the main score among the scores that the evaluation returns."""

    @property
    def lm_eval(self) -> str | None:
        """Name of the lm-eval task that scores this task; None: greedy exact match is used."""

    @property
    def key(self) -> dict[str, Any]:
        """Cache key of the data, with values that JSON can represent."""

    def train(self) -> Examples:
        """Rows for calibration and training; none has the prompt of an evaluation row."""

    def held_out(self, limit: int | None) -> Examples:
        """The first `limit` evaluation rows; all of them if `limit` is None."""


@runtime_checkable
class GenerativeTask(Protocol):
    """A task whose answers are generated as text, and scored one by one by a scorer."""

    @property
    def metric(self) -> str:
        """Name of the main score among the scores that the evaluation returns."""

    def held_out(self, limit: int | None) -> Examples:
        """The first `limit` evaluation rows; all of them if `limit` is None."""

    @property
    def name(self) -> str:
        """Short name of the task for run folders and reports."""

    @property
    def answer_tokens(self) -> int:
        """Maximum number of tokens to generate per answer."""

    @property
    def score(self) -> Scorer:
        """The scorer: a function that returns the scores of one answer, by metric."""
