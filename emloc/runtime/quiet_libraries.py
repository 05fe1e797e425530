"""Keep remarks of libraries that no user of this program can act on off the screen."""

from __future__ import annotations

import logging
import sys
import warnings
from functools import cache
from multiprocessing import current_process
from typing import Any

from emloc.runtime.distributed import is_first


def quiet() -> None:
    """Silence them; to be called before anything heavy is imported, which some remark upon.

    Bars are drawn by the first process of a launch alone, and on a terminal alone.
    """
    if not _watched():
        _draw_no_bars()
    # It asks for one more package, when it is imported, for inference on some CPUs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # each file of a checkpoint
    # One library calling another by a name that has just become the older of two.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)

    # It asks for bars as widgets, in a notebook, where none are drawn.
    warnings.filterwarnings("ignore", "IProgress not found")

    import datasets
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()  # each retry; our own line says what to do
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _watched() -> bool:
    """Whether somebody may look at a bar: not in a file, nor among those of other workers."""
    return is_first() and sys.stderr.isatty() and current_process().name == "MainProcess"


@cache
def _draw_no_bars() -> None:
    from tqdm import tqdm

    # Libraries that ask for a bar outright, as lm-eval does, are deaf to TQDM_DISABLE.
    begin = tqdm.__init__

    def undrawn(self: Any, *args: Any, **settings: Any) -> None:
        begin(self, *args, **settings | {"disable": True})

    tqdm.__init__ = undrawn  # type: ignore[method-assign]
