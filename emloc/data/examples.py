"""An example of a data set (prompt, images and answer), and an ordered list of examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from emloc.data.image import LazyImage
from emloc.runtime.digest import digest


@dataclass(frozen=True)
class Example:
    """One prompt and its answer, made from one row of a data set."""

    id: str  # identifies the row in its data set, for instance test/17
    prompt: str
    target: str  # the answer to learn
    images: tuple[LazyImage, ...] = ()  # precede the prompt, in this order
    references: tuple[str, ...] = ()  # correct answers that a scorer compares with
    choices: tuple[str, ...] = ()  # options of a multiple-choice question
    group: str = ""  # group of rows that gets a score of its own; "": no group


@dataclass(frozen=True)
class Examples:
    """An ordered list of examples with a name."""

    name: str
    rows: tuple[Example, ...]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def pick(self, indices: Sequence[int]) -> Examples:
        """The examples at `indices`, in the order of `indices`."""
        return Examples(self.name, tuple(self.rows[index] for index in indices))

    def spread(self, count: int) -> Examples:
        """So many examples, or all if there are fewer, evenly spread over the list."""
        count = min(count, len(self))
        return self.pick([index * len(self) // count for index in range(count)])

    @cached_property
    def key(self) -> str:
        """Cache key of the examples: a digest of their contents in order, without ids."""
        return digest([_key(row) for row in self.rows])


def _key(row: Example) -> list[object]:
    """Content of an example for the digest; empty optional fields do not count."""
    optional = [[image.key for image in row.images], row.references, row.choices, row.group]
    return [row.prompt, row.target, *(optional if any(optional) else ())]
