"""Task for a text data set on the hub or in a local copy, with prompts and answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar

from emloc.config.values import Checked, OneOf, Range, Text
from emloc.data.examples import Example, Examples
from emloc.errors import ConfigError
from emloc.runtime.keys import neutral
from emloc.tasks.marked_rows import MarkedRow, MissingValueError
from emloc.tasks.missing import SKIP, IncompleteRows
from emloc.tasks.rows import Rows
from emloc.tasks.templates import RowExpression, text_expression

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TextTask(Checked):
    """A text data set: templates turn each row into a prompt and an answer."""

    section: ClassVar[str] = "task"

    name: str  # short name for run folders and reports; the stem of the YAML file
    id: str | None = None  # data set on the hub; not used if `path` is set
    config: str | None = None  # configuration (subset) of the data set; null if it has only one
    revision: str | None = None  # commit, tag or branch on the hub; null: the newest
    path: str | None = None  # local copy: a copied hub folder, or a folder of <split>.jsonl files
    train_split: str  # split for calibration and training
    eval_split: str  # split for evaluation
    # Jinja template of the prompt, over the columns of a row
    prompt: Annotated[str, Text(may_be_empty=True)]
    target: str  # Jinja template of the answer to learn
    metric: str  # main score: exact_match (greedy exact match), or lm-eval's "metric,filter"
    lm_eval: str | None = None  # lm-eval task that scores; null: only greedy exact match
    # solved examples that lm-eval puts before each question
    shots: Annotated[int, Range(least=0, usual=0)] = 0
    # maximum number of training rows, the first ones; null: all
    limit: Annotated[int | None, Range(least=1, usual=None)] = None
    # if a row has no value that a template writes: fail | skip
    missing: Annotated[str, OneOf("fail", "skip")] = neutral("fail")

    conflicts: ClassVar[Any] = (
        (
            {"id": None, "path": None},
            "task.id and task.path are both null; set task.path=/path/to/copy",
        ),
    )

    def __post_init__(self) -> None:
        """Check the settings, as far as possible without reading data."""
        super().__post_init__()
        if self.train_split == self.eval_split:
            raise ConfigError(
                f"task.train_split and task.eval_split are both {self.eval_split}: evaluation rows "
                "would be trained on; set task.train_split=train"
            )
        if self.shots and self.lm_eval is None:
            raise ConfigError(
                f"task.shots={self.shots} needs lm-eval, but task.lm_eval is null; set task.shots=0"
            )
        text_expression("prompt", self.prompt)
        text_expression("target", self.target)

    @property
    def key(self) -> dict[str, Any]:
        """Cache key of the task: origin of the rows (content of a local copy) and templates."""
        names = ("train_split", "eval_split", "prompt", "target", "lm_eval", "shots")
        skipped = {"missing": SKIP} if self.missing == SKIP else {}
        written = self._stored.written_columns()
        read = skipped | ({"written": written} if written else {})
        return self._stored.origin | {name: getattr(self, name) for name in names} | read

    def train(self) -> Examples:
        """The first `limit` training rows whose prompt is no prompt of an evaluation row."""
        return Examples(self.name, self._train_rows[: self.limit])

    @cached_property
    def _train_rows(self) -> tuple[Example, ...]:
        """Training rows that are no evaluation rows, read once."""
        eval_prompts = {_question(row) for row in self._eval_rows}
        rows = self._examples(self.train_split)
        examples = tuple(row for row in rows if _question(row) not in eval_prompts)
        if len(examples) < len(rows):
            log.warning(
                "task %s: dropped %d of %d training rows whose prompt is also an evaluation "
                "prompt, the first is %s",
                self.name,
                len(rows) - len(examples),
                len(rows),
                next(row.id for row in rows if _question(row) in eval_prompts),
            )
        if not examples:
            raise ConfigError(
                f"task {self.name}: every row of task.train_split={self.train_split} is also in "
                f"task.eval_split={self.eval_split}; set task.train_split to another split"
            )
        return examples

    def held_out(self, limit: int | None) -> Examples:
        """The first `limit` rows of the evaluation split in file order; all if `limit` is None."""
        return Examples(self.name, self._eval_rows[:limit])

    def derived_columns(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Extra columns for the template `target`; None if the row has no usable answer.

        Subclasses override this method. Rows without a usable answer are skipped.
        """
        return {}

    def lm_eval_templates(self) -> dict[str, str]:
        """Templates that replace the lm-eval task's own, so that both use the same prompts."""
        return {"doc_to_text": self.prompt, "doc_to_target": self.target}

    def source(self) -> dict[str, Any]:
        """Arguments of `datasets.load_dataset` for these rows; lm-eval loads them with the same."""
        return self._stored.source()

    @cached_property
    def _stored(self) -> Rows:
        """The data set's rows as they are stored."""
        return Rows(
            name=self.name,
            id=self.id,
            config=self.config,
            revision=self.revision,
            path=self.path,
            splits={"train_split": self.train_split, "eval_split": self.eval_split},
        )

    @cached_property
    def _eval_rows(self) -> tuple[Example, ...]:
        """Evaluation rows, read once."""
        return self._examples(self.eval_split)

    def _examples(self, split: str) -> tuple[Example, ...]:
        """Read a split and render its rows; rows without a usable answer are skipped.

        Raises:
            ConfigError: no row is left, or rows lack a value and `missing` is `fail`.
        """
        field = "eval_split" if split == self.eval_split else "train_split"
        stored = self._stored.of(split)
        incomplete, examples, unusable = IncompleteRows(), [], 0
        marks = self._stored.marks(split)
        for index, row in enumerate(stored):
            name = f"{split}/{index}"
            columns = self.derived_columns(row)
            if columns is None:
                unusable += 1
            elif pair := self._render(name, marks.mark(row, index), columns, incomplete):
                examples.append(Example(name, *pair))
        total = len(stored)
        incomplete.report(self.name, split, total, self.missing)
        is_read_by_lm_eval = self.lm_eval is not None and (
            split == self.eval_split or self.shots > 0
        )
        if incomplete.rows and is_read_by_lm_eval:
            raise ConfigError(
                f"task.missing=skip: lm-eval reads {split} itself, with the rows without a value; "
                "correct the rows, or set task.lm_eval=null task.shots=0 task.metric=exact_match"
            )
        if unusable:
            log.warning("task %s: left out %d of %d rows of %s that have no usable answer",
                        self.name, unusable, total, split)  # fmt: skip
        if not examples:
            raise ConfigError(
                f"task.{field}: split {split} of {self.name} has no rows; "
                f"set task.{field} to another split"
            )
        return tuple(examples)

    def _render(
        self, name: str, row: MarkedRow, columns: Mapping[str, Any], incomplete: IncompleteRows
    ) -> tuple[str, str] | None:
        """Prompt and answer of a row; None for a row that lacks a value, which is counted."""
        setting = "prompt"
        try:
            # The prompt gets no derived columns, because lm-eval renders it without them.
            prompt = str(self._templates["prompt"].evaluate(row))
            setting = "target"
            answer = str(self._templates["target"].evaluate(row, **columns))
        except MissingValueError as error:
            incomplete.add_column(name, error, setting)
            return None
        for setting, text in (("prompt", prompt), ("target", answer)):
            if incomplete.add_if_empty(name, setting, getattr(self, setting), text):
                return None
        return prompt, answer

    @cached_property
    def _templates(self) -> dict[str, RowExpression]:
        """Setting -> compiled template."""
        return {name: text_expression(name, getattr(self, name)) for name in ("prompt", "target")}


def _question(row: Example) -> str:
    """The prompt of a row, or the text itself if the task has no prompt."""
    return row.prompt or row.target
