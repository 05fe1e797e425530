"""Names of a model's numbered blocks, such as `model.layers.3`."""

from __future__ import annotations

import re

# Regular expression: everything inside a numbered block.
IN_A_BLOCK = r".*\.\d+\..*"
# A block's name ends with the first number in the names of its modules.
_BLOCK = re.compile(r"(.*?\.\d+)(\.|$)")


def find_block(name: str) -> str | None:
    """Return the name of the block that is, or contains, the module `name`; None if none does."""
    match = _BLOCK.match(name)
    return match[1] if match else None
