"""Import large libraries in less time."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def exempt_imports() -> Iterator[None]:
    """Pause garbage collection in this block, and exempt from it what the block imports.

    The libraries make half a million objects, which stay. Without this, Python searches them for
    garbage during the imports and around every stage, for seconds in all. Only the first import of
    torch is exempt: before it no tensor exists, so that no memory of a model can be exempt with it.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_bitsandbytes() -> None:
    """Import bitsandbytes without the compiler of torch, which takes a second and 40 MB to load.

    bitsandbytes compiles its optimizers for the CPU, and kernels for devices that have none of
    their own. Nothing here uses those. PEFT imports bitsandbytes, so this has to come before PEFT.
    """
    if "bitsandbytes" in sys.modules:
        return
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        # Without bitsandbytes PEFT works, too, and only 4 bits are refused.
        with suppress(ImportError):
            import bitsandbytes  # noqa: F401
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
