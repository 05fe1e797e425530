"""EMLoC: train a LoRA on a small emulator of a large model, then correct it for that model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Imported at once: resolved later, the function would be hidden by a module of the same name. The
# import is cheap.
from emloc.config.compose import compose

if TYPE_CHECKING:
    from emloc.adapters.fold import merge
    from emloc.adapters.saved import SavedLora, read_lora
    from emloc.errors import ConfigError, StageError
    from emloc.library.anchor import anchor
    from emloc.library.correct import correct
    from emloc.library.emulate import build_emulator
    from emloc.library.storage import load_emulator, save_emulator
    from emloc.pipeline import run
    from emloc.report.markdown import table
    from emloc.runtime.stage_cache import Store
    from emloc.stages.run_config import build
    from emloc.tensors.nn.factorized import Factorized

# Public name -> its module. A module is imported at first use, so that `emloc --help` does not wait
# for torch. No public name may be the name of a module of this package, which would hide it once
# imported.
_MODULES = {
    "ConfigError": "emloc.errors",
    "Factorized": "emloc.tensors.nn.factorized",
    "SavedLora": "emloc.adapters.saved",
    "StageError": "emloc.errors",
    "Store": "emloc.runtime.stage_cache",
    "anchor": "emloc.library.anchor",
    "build": "emloc.stages.run_config",
    "build_emulator": "emloc.library.emulate",
    "correct": "emloc.library.correct",
    "load_emulator": "emloc.library.storage",
    "merge": "emloc.adapters.fold",
    "read_lora": "emloc.adapters.saved",
    "run": "emloc.pipeline",
    "save_emulator": "emloc.library.storage",
    "table": "emloc.report.markdown",
}

__all__ = [
    "ConfigError",
    "Factorized",
    "SavedLora",
    "StageError",
    "Store",
    "anchor",
    "build",
    "build_emulator",
    "compose",
    "correct",
    "load_emulator",
    "merge",
    "read_lora",
    "run",
    "save_emulator",
    "table",
]


def __getattr__(name: str) -> Any:
    """Import the module of a public name and return the object of that name."""
    if name not in _MODULES:
        raise AttributeError(f"module 'emloc' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
