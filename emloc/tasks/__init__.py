"""Data sets as prompts and answers; `Task` is all the rest of the package knows of them."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from emloc.data.examples import Examples
from emloc.tasks.metrics import Scorer


class Task(Protocol):
    """What a class named by a `conf/task/*.yaml` has to offer."""

    @property
    def name(self) -> str:
        """Word for run folders and reports; the stem of its YAML file."""

    @property
    def metric(self) -> str:
        """Name of the headline score among those that evaluation returns."""

    @property
    def lm_eval(self) -> str | None:
        """Name of lm-eval's own task to score with, or None: our greedy match alone."""

    @property
    def key(self) -> dict[str, Any]:
        """What tells this data apart from any other, for stage keys; JSON can name it."""

    def train(self) -> Examples:
        """Rows to calibrate and train on; none of their prompts is an evaluation prompt."""

    def held_out(self, limit: int | None) -> Examples:
        """The first `limit` rows to evaluate on, or all of them."""


@runtime_checkable
class GenerativeTask(Protocol):
    """What a task has besides, whose answers are written freely and scored one by one."""

    @property
    def metric(self) -> str:
        """As every task's."""

    def held_out(self, limit: int | None) -> Examples:
        """As every task's."""

    @property
    def name(self) -> str:
        """As every task's."""

    @property
    def answer_tokens(self) -> int:
        """Tokens of an answer at most."""

    @property
    def score(self) -> Scorer:
        """The numbers of one answer, by metric."""
