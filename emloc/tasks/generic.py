"""Running text that belongs to no task, to build an emulator from something else than the task."""

from __future__ import annotations

import logging

from emloc.examples import Example, Examples
from emloc.tasks.stdlib_module import generic_docstrings

log = logging.getLogger(__name__)

_ID, _CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
_SHORTEST = 200  # characters; headings and blank lines are rows of their own there


def generic_text() -> Examples:
    """WikiText-2 train; without the hub, documentation of Python modules that no task uses.

    The name of the result, the log and so the run's record say which of the two it is.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(_ID, _CONFIG, split="train")
    except (ConnectionError, OSError, ValueError):
        log.warning("calibration: no hub for %s; using Python's own documentation", _ID)
        return generic_docstrings()
    texts = (text.strip() for text in rows["text"])
    kept = [Example(str(i), "", text) for i, text in enumerate(texts) if len(text) >= _SHORTEST]
    return Examples("wikitext-2", tuple(kept))
