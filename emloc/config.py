"""From Hydra's composed configuration to the frozen objects the pipeline works with."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emloc.adapters import Adapter
from emloc.adapters.none import NoAdapter
from emloc.emulators import Emulator
from emloc.errors import ConfigError
from emloc.models.checkpointed import Checkpointed
from emloc.recovery import Recovery
from emloc.settings import (
    Budget,
    Calibration,
    Compression,
    EvalSettings,
    LoraSettings,
    TrainSettings,
)
from emloc.tasks import Task
from emloc.tracking.track import Tracker


@dataclass(frozen=True)
class Cell:
    """One run: the frozen settings of every part. Hydra's types end here."""

    name: str
    method: str
    seed: int
    model: Checkpointed
    task: Task
    calibration: Calibration
    compression: Compression
    lora: LoraSettings
    emulator: Emulator
    adapter: Adapter | NoAdapter
    recovery: Recovery
    train: TrainSettings
    eval: EvalSettings
    budget: Budget
    tracker: Tracker


def build(cfg: DictConfig) -> Cell:
    """The frozen objects a configuration means.

    Raises:
        ConfigError: a key, a type or a value cannot be right.
    """
    names = [field.name for field in fields(Cell)]
    unknown = [str(key) for key in cfg if key not in names]
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such setting")
    return Cell(**{name: _value(cfg, name) for name in names})


def _value(cfg: DictConfig, name: str) -> Any:
    try:
        node = cfg[name]
        return part(node) if isinstance(node, DictConfig) else node
    except OmegaConfBaseException as error:
        key = str(error.full_key or error.key)
        key = key if key.split(".")[0] == name else f"{name}.{key}"
        raise ConfigError(f"{key}: {(error.msg or str(error)).splitlines()[0]}") from error
    except ImportError as error:
        why = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"{name}._target_={cfg[name]._target_}: {why}") from error


def part(node: DictConfig) -> Any:
    """The object of the class a part's `_target_` names, its keys checked against the fields.

    A section without `_target_` is of the class its schema says. A mapping of parts becomes one of
    objects.
    """
    cls = get_class(node._target_) if "_target_" in node else OmegaConf.get_type(node)
    values = {key: value for key, value in node.items() if key != "_target_"}
    parts = {
        str(key): {name: part(one) for name, one in value.items()}
        for key, value in values.items()
        if isinstance(value, DictConfig) and any(_is_part(one) for one in value.values())
    }
    # Objects cannot be merged into a schema, but the keys they stand under are checked by it.
    plain = values | {key: {} for key in parts}
    made: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), plain))
    return replace(made, **parts)


def _is_part(value: Any) -> bool:
    return isinstance(value, DictConfig) and "_target_" in value
