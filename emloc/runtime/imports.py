"""Import large libraries in less time."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module

_NO_COMPILER = "TORCHDYNAMO_DISABLE"  # with it torch compiles nothing


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


def import_without_compiler(name: str) -> None:
    """Import the library `name`, but not the compiler of torch for what it compiles when imported.

    A library that is not installed is left out.
    """
    if name in sys.modules:
        return
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        with suppress(ImportError):
            import_module(name)
    finally:
        del os.environ[_NO_COMPILER]
        if before is not None:
            os.environ[_NO_COMPILER] = before
