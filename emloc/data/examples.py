"""A prompt with its answer, and an ordered set of them: what every stage reads of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from emloc.data.image import LazyImage
from emloc.runtime.digest import digest


@dataclass(frozen=True)
class Example:
    """One prompt and the answer to learn; `id` names the row in its data set."""

    id: str
    prompt: str
    target: str
    images: tuple[LazyImage, ...] = ()  # shown before the prompt, in this order
    references: tuple[str, ...] = ()  # what a scorer compares an answer to
    choices: tuple[str, ...] = ()  # what the prompt offers to choose from
    group: str = ""  # kind of row, for scores of its own; "": of no kind


@dataclass(frozen=True)
class Examples:
    """An ordered, named set of examples. Its key is the digest of all that is in them, in order."""

    name: str
    rows: tuple[Example, ...]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def pick(self, indices: Sequence[int]) -> Examples:
        """The rows at `indices`, in that order."""
        return Examples(self.name, tuple(self.rows[index] for index in indices))

    @cached_property
    def key(self) -> str:
        """What a stage that reads these rows depends on."""
        return digest([_key(row) for row in self.rows])


def _key(row: Example) -> list[object]:
    rest = [[one.key for one in row.images], row.references, row.choices, row.group]
    return [row.prompt, row.target, *(rest if any(rest) else ())]
