"""Rows of a data set as questions about images, and which of them are about the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from emloc.data.examples import Example
from emloc.errors import ConfigError
from emloc.tasks.images import ImageSource, LazyRow, NoImageError, StoredImage
from emloc.tasks.metrics import Scorer
from emloc.tasks.rows import Rows
from emloc.tasks.templates import RowExpression


class StoredQuestion(NamedTuple):
    """A row, and its pictures as they are stored; none where their files are missing."""

    example: Example
    pictures: tuple[StoredImage, ...]

    def same(self, other: StoredQuestion) -> bool:
        """Whether both have the same prompt and the same images, byte for byte."""
        alike = self.example.prompt == other.example.prompt
        if not alike or not self.pictures or len(self.pictures) != len(other.pictures):
            return False
        return all(a.same(b) for a, b in zip(self.pictures, other.pictures, strict=True))


@dataclass
class ReadStats:
    """What a pass over a split came across, while it goes on."""

    seen: int = 0
    unanswered: int = 0
    unreadable: list[str] = field(default_factory=list)  # rows and reasons
    missing: dict[str, None] = field(default_factory=dict)  # names of files, each once


@dataclass(frozen=True)
class Questions:
    """How rows are read."""

    task: str
    formulas: Mapping[str, RowExpression]
    album: ImageSource
    skip: bool  # leave out rows whose image cannot be read, which is then tried for every row
    score: Scorer

    def read(self, rows: Rows, split: str, account: ReadStats) -> Iterator[StoredQuestion]:
        """The rows of `split` that have an answer and an image, as far as they are asked for.

        Raises:
            ConfigError: a row has no image, or a setting cannot be right.
        """
        data = rows.of(split)
        # A revision may be none, and names no content then.
        version = None if rows.path is not None else data._fingerprint
        origin = [rows.origin, version, split, self.formulas["image"].source]
        table, columns = data.data, tuple(data.column_names)
        for index in range(len(data)):
            account.seen += 1
            name = f"{split}/{index}"
            try:
                example = self._question(name, LazyRow(table, columns, index))
                shown = LazyRow(table, columns, index, views=True)
                values = self.formulas["image"].values(shown) if example is not None else []
            except ConfigError as error:
                raise ConfigError(f"task {self.task}: {name}: {error}") from error
            if example is None:
                account.unanswered += 1
                continue
            try:
                pictures = self.album.pictures(values, name, [*origin, index])
                if self.skip:
                    self.album.try_all(pictures)
            except NoImageError as problem:
                if self.skip:
                    account.unreadable.append(f"{name}: {problem}")
                elif problem.file is not None:
                    account.missing[problem.file] = None
                    yield StoredQuestion(example, ())
                else:
                    raise ConfigError(
                        f"task {self.task}: {name}: {problem}; correct task.image, or set "
                        "task.unreadable=skip to leave such rows out"
                    ) from problem
            else:
                yield StoredQuestion(replace(example, images=pictures), pictures)

    def _question(self, name: str, row: LazyRow) -> Example | None:
        """A row without its images; None where there is no answer that can be scored."""
        formulas = self.formulas
        references = _texts(formulas["references"], row)
        if not references:
            return None
        choices = _texts(formulas["choices"], row) if "choices" in formulas else ()
        try:
            self.score(references[0], references, choices)
        except ValueError:
            return None
        return Example(
            id=name,
            prompt=formulas["prompt"].of(row),
            target=formulas["target"].of(row, references=references),
            references=references,
            choices=choices,
            group=str(formulas["group"].of(row)) if "group" in formulas else "",
        )


def _texts(formula: RowExpression, row: LazyRow) -> tuple[str, ...]:
    """What a formula gives as texts; there is nothing in an empty one."""
    return tuple(str(one) for one in formula.values(row) if one not in (None, ""))


def by_image(
    found: Sequence[StoredQuestion],
) -> tuple[list[StoredQuestion], list[StoredQuestion], int]:
    """Rows on the first half of the images, those on the rest, and how many images there are.

    Images are in order of first appearance; what is shown together in one row counts as one. Reads
    every image.
    """
    group: dict[str, int] = {}  # content -> number of its group
    for number, one in enumerate(found):
        shown = [picture.content for picture in one.pictures]
        joined = {group[content] for content in shown if content in group}
        first = min(joined, default=number)
        if len(joined) > 1:
            group = {content: first if of in joined else of for content, of in group.items()}
        group |= dict.fromkeys(shown, first)
    order = list(dict.fromkeys(group[one.pictures[0].content] for one in found))
    training = set(order[: len(order) // 2])
    sides: tuple[list[StoredQuestion], list[StoredQuestion]] = ([], [])
    for one in found:
        sides[group[one.pictures[0].content] not in training].append(one)
    return (*sides, len(order))
