"""Keep remarks of libraries that no user of this program can act on off the screen."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Silence them; to be called before anything heavy is imported, which some remark upon."""
    # It asks for one more package, when it is imported, for inference on some CPUs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # each file of a checkpoint
    # One library calling another by a name that has just become the older of two.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)

    import datasets
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()  # each retry; our own line says what to do
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
