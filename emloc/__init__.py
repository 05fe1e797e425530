"""EMLoC: fine-tune a large model through a small emulator, then correct the LoRA."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# At once, and light enough for it: resolved later, it would be hidden by the module of its name.
from emloc.config.compose import compose

if TYPE_CHECKING:
    from emloc.adapters.fold import merge
    from emloc.adapters.saved import SavedLora, read_lora
    from emloc.errors import ConfigError, StageError
    from emloc.library import build_emulator, correct
    from emloc.pipeline import run
    from emloc.report.markdown import table
    from emloc.runtime.stage_cache import Store
    from emloc.stages.run_config import build
    from emloc.tensors.nn.factorized import Factorized

# Name -> module. Resolved when asked for, so that `emloc --help` never waits for torch. None may be
# called as a module of this package is: once imported, that module would be found in its place.
_HOMES = {
    "ConfigError": "emloc.errors",
    "Factorized": "emloc.tensors.nn.factorized",
    "SavedLora": "emloc.adapters.saved",
    "StageError": "emloc.errors",
    "Store": "emloc.runtime.stage_cache",
    "build": "emloc.stages.run_config",
    "build_emulator": "emloc.library",
    "correct": "emloc.library",
    "merge": "emloc.adapters.fold",
    "read_lora": "emloc.adapters.saved",
    "run": "emloc.pipeline",
    "table": "emloc.report.markdown",
}

__all__ = [
    "ConfigError",
    "Factorized",
    "SavedLora",
    "StageError",
    "Store",
    "build",
    "build_emulator",
    "compose",
    "correct",
    "merge",
    "read_lora",
    "run",
    "table",
]


def __getattr__(name: str) -> Any:
    """The public name, from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'emloc' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
