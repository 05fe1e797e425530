"""Read the rows of a data set as questions about images, and split them by image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

from emloc.data.examples import Example
from emloc.errors import ConfigError
from emloc.tasks.images import ImageSource, LazyRow, NoImageError, StoredImage
from emloc.tasks.marked_rows import MarkedRow, MissingValueError
from emloc.tasks.metrics import Scorer
from emloc.tasks.missing import IncompleteRows
from emloc.tasks.rows import Rows
from emloc.tasks.templates import RowExpression


class StoredQuestion(NamedTuple):
    """One row as an example, with its stored images; without images if their files are missing."""

    example: Example
    images: tuple[StoredImage, ...]

    def is_same(self, other: StoredQuestion) -> bool:
        """Whether both have the same prompt, and images with the same bytes."""
        same_prompt = self.example.prompt == other.example.prompt
        if not same_prompt or not self.images or len(self.images) != len(other.images):
            return False
        return all(a.is_same(b) for a, b in zip(self.images, other.images, strict=True))


class Incomplete(Enum):
    """Stands for a row that lacks a value."""

    ROW = "row"


INCOMPLETE = Incomplete.ROW


@dataclass
class ReadStats:
    """Counts of the rows of a split that were read or skipped; updated while rows are read."""

    rows: int = 0  # rows read
    unanswered: int = 0  # rows without an answer that can be scored
    unreadable: list[str] = field(default_factory=list)  # rows with unreadable images, and reasons
    missing: dict[str, None] = field(default_factory=dict)  # names of missing image files
    first_unanswered: str = ""  # name of the first row without such an answer
    incomplete: IncompleteRows = field(default_factory=IncompleteRows)  # rows that lack a value


@dataclass(frozen=True)
class Questions:
    """Turns the rows of a data set into questions, by the settings of a task."""

    task: str  # name of the task
    expressions: Mapping[str, RowExpression]  # setting of the task -> compiled expression
    image_source: ImageSource
    skip: bool  # decode all images and skip rows whose images cannot be read
    score: Scorer

    def read(self, rows: Rows, split: str, stats: ReadStats) -> Iterator[StoredQuestion]:
        """Yield the rows of `split` that have a usable answer, and count all rows in `stats`.

        A row is only read when the caller asks for it.

        Raises:
            ConfigError: a row has no image, or a setting does not fit the data set.
        """
        data = rows.of(split)
        # Identifies the content of a data set on the hub, even if no revision is set.
        version = None if rows.path is not None else data._fingerprint
        origin = [rows.origin, version, split, self.expressions["image"].source]
        table, columns, marks = data.data, tuple(data.column_names), rows.marks(split)
        for index in range(len(data)):
            stats.rows += 1
            name = f"{split}/{index}"
            try:
                row = marks.mark(LazyRow(table, columns, index), index)
                example = self._example(name, row, stats.incomplete)
                lazy_row = LazyRow(table, columns, index, keep_text_refs=True)
                has_answer = isinstance(example, Example)
                image_expression = self.expressions["image"]
                values = image_expression.evaluate_to_list(lazy_row) if has_answer else []
            except MissingValueError as error:
                stats.incomplete.add_column(name, error, "image")
                continue
            except ConfigError as error:
                raise ConfigError(f"task {self.task}: {name}: {error}") from error
            if example is None:
                stats.unanswered += 1
                stats.first_unanswered = stats.first_unanswered or name
            if not isinstance(example, Example):
                continue
            try:
                images = self.image_source.images(values, name, [*origin, index])
                if self.skip:
                    self.image_source.check_readable(images)
            except NoImageError as problem:
                if self.skip:
                    stats.unreadable.append(f"{name}: {problem}")
                elif problem.file is not None:
                    stats.missing[problem.file] = None
                    yield StoredQuestion(example, ())
                else:
                    raise ConfigError(
                        f"task {self.task}: {name}: {problem}; correct task.image, or set "
                        "task.unreadable=skip to leave such rows out"
                    ) from problem
            else:
                yield StoredQuestion(replace(example, images=images), images)

    def _example(
        self, name: str, row: MarkedRow, incomplete: IncompleteRows
    ) -> Example | Incomplete | None:
        """The row as an example without images; None if it has no answer that can be scored.

        A row that lacks another value is counted in `incomplete`.
        """
        expressions = self.expressions
        setting = "references"
        try:
            references = _texts(expressions["references"], row)
            if not references:
                return None
            setting = "choices"
            choices = _texts(expressions["choices"], row) if "choices" in expressions else ()
            try:
                self.score(references[0], references, choices)
            except ValueError:
                return None
            setting = "prompt"
            texts = {"prompt": expressions["prompt"].evaluate(row)}
            setting = "target"
            texts["target"] = expressions["target"].evaluate(row, references=references)
            setting = "group"
            group = expressions["group"].evaluate(row) if "group" in expressions else ""
            if group is None:
                raise MissingValueError(expressions["group"].source)
        except MissingValueError as error:
            incomplete.add_column(name, error, setting)
            return INCOMPLETE
        for setting, text in texts.items():
            if incomplete.add_if_empty(name, setting, expressions[setting].source, text):
                return INCOMPLETE
        return Example(id=name, **texts, references=references, choices=choices, group=str(group))


def _texts(expression: RowExpression, row: MarkedRow) -> tuple[str, ...]:
    """Values of the expression as texts, without missing and empty ones."""
    return tuple(
        str(value)
        for value in expression.evaluate_to_list(row)
        if value is not None and str(value).strip()
    )


def split_by_image(
    questions: Sequence[StoredQuestion],
) -> tuple[list[StoredQuestion], list[StoredQuestion], int]:
    """Split questions so that no image is in both halves; reads every image.

    Images that appear in one question together form one group of images.

    Returns:
        The questions about the first half of the image groups (in order of first appearance), the
        other questions, and the number of groups.
    """
    group_of: dict[str, int] = {}  # content of an image -> number of its group
    for number, question in enumerate(questions):
        contents = [image.content for image in question.images]
        joined = {group_of[content] for content in contents if content in group_of}
        first = min(joined, default=number)
        if len(joined) > 1:
            group_of = {
                content: first if group in joined else group for content, group in group_of.items()
            }
        group_of |= dict.fromkeys(contents, first)
    groups = list(dict.fromkeys(group_of[question.images[0].content] for question in questions))
    training_groups = set(groups[: len(groups) // 2])
    halves: tuple[list[StoredQuestion], list[StoredQuestion]] = ([], [])
    for question in questions:
        halves[group_of[question.images[0].content] not in training_groups].append(question)
    return (*halves, len(groups))
