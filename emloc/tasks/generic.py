"""Running text that belongs to no task, to build an emulator from something else than the task."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from emloc.data.examples import Example, Examples
from emloc.tasks.stdlib_module import generic_docstrings

log = logging.getLogger(__name__)

_ID, _CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
# Characters of a sample, whose rows are single paragraphs there: some 1,500 tokens of English.
_PIECE = 6000


def generic_text() -> Examples:
    """WikiText-2 train; without the hub, documentation of Python modules that no task uses.

    The name of the result, the log and so the run's record say which of the two it is.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(_ID, _CONFIG, split="train")
    except (ConnectionError, OSError, ValueError):
        log.warning(
            "calibration: %s cannot be loaded, so Python's documentation takes its place", _ID
        )
        return generic_docstrings()
    return Examples("wikitext-2", tuple(pieces(rows["text"])))


def pieces(texts: Iterable[str]) -> Iterator[Example]:
    """Consecutive texts put together until they are long enough; an id names the first of them."""
    held: list[str] = []
    first = size = 0
    for index, text in enumerate(texts):
        if not held:
            first, size = index, 0
        held.append(text)
        size += len(text)
        if size >= _PIECE:
            yield Example(str(first), "", "".join(held).strip())
            held = []
