"""Silence messages of libraries that a user of this program cannot act on."""

from __future__ import annotations

import logging
import sys
import warnings
from functools import cache
from multiprocessing import current_process
from typing import Any

from emloc.runtime.distributed import is_first
from emloc.runtime.imports import exempt_imports, import_without_compiler


def quiet() -> None:
    """Silence the libraries; call this before they are imported, as some log while they are.

    Only the first process of a launch draws progress bars, and only on a terminal.
    """
    if not _may_draw_bars():
        _draw_no_bars()
    # Its import logs that another package would help inference on some CPUs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # logs each file of a checkpoint
    # One library calls another one by a name that is deprecated.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)

    # tqdm asks for a package that draws bars in notebooks, where none are drawn.
    warnings.filterwarnings("ignore", "IProgress not found")

    # PEFT imports it. It compiles optimizers, and kernels for devices that it has none for. Nothing
    # here uses those, and the compiler takes a second and 40 MB to load.
    with exempt_imports():
        import_without_compiler("bitsandbytes")
        import datasets
        import huggingface_hub
        import transformers

    huggingface_hub.logging.set_verbosity_error()  # it logs each retry; our error helps
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _may_draw_bars() -> bool:
    """Whether this process has a terminal to itself: no file, and no other workers beside it."""
    return is_first() and sys.stderr.isatty() and current_process().name == "MainProcess"


@cache
def _draw_no_bars() -> None:
    from tqdm import tqdm

    # Libraries that pass `disable=False`, as lm-eval does, ignore TQDM_DISABLE.
    initialize = tqdm.__init__

    def initialize_disabled(self: Any, *args: Any, **settings: Any) -> None:
        initialize(self, *args, **settings | {"disable": True})

    tqdm.__init__ = initialize_disabled  # type: ignore[method-assign]
