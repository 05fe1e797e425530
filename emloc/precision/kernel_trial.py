"""Try a GPU kernel before it is used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)

Kernel = TypeVar("Kernel")


def tried(trial: Callable[[], tuple[Kernel, bool]], otherwise: str) -> Kernel | None:
    """Return a kernel that works on this machine; None, with a log line, if it does not.

    Args:
        trial: imports and runs the kernel; returns it, and whether its result is right.
        otherwise: what happens without it, for the log.
    """
    try:
        kernel, is_right = trial()
    except Exception as error:  # why: whatever Triton lacks on this machine, there is another way
        log.info("%s, since Triton does not work here: %s", otherwise, error)
        return None
    if is_right:
        return kernel
    log.warning("%s, since Triton gives other numbers here", otherwise)
    return None
