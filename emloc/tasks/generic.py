"""Generic text for calibration: plain text that belongs to no task."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from emloc.data.examples import Example, Examples
from emloc.tasks.stdlib_module import generic_docstrings

log = logging.getLogger(__name__)

_ID, _CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
# Minimum characters of a sample, about 1,500 tokens of English. Rows of WikiText are paragraphs.
_SAMPLE_CHARACTERS = 6000


def generic_text() -> Examples:
    """The training split of WikiText-2, or docstrings of Python modules if the hub is offline.

    The name of the examples says which text was used. The log and the run's record show the name.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(_ID, _CONFIG, split="train")
    except (ConnectionError, OSError, ValueError):
        log.warning(
            "calibration: cannot load %s from the hub; using docstrings of Python's library", _ID
        )
        return generic_docstrings()
    return Examples("wikitext-2", tuple(join_paragraphs(rows["text"])))


def join_paragraphs(paragraphs: Iterable[str]) -> Iterator[Example]:
    """Join consecutive paragraphs to samples of at least 6,000 characters without a prompt.

    The id of a sample is the index of its first paragraph. A shorter rest is dropped.
    """
    sample: list[str] = []
    first = size = 0
    for index, paragraph in enumerate(paragraphs):
        if not sample:
            first, size = index, 0
        sample.append(paragraph)
        size += len(paragraph)
        if size >= _SAMPLE_CHARACTERS:
            yield Example(str(first), "", "".join(sample).strip())
            sample = []
