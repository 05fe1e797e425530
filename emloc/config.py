"""From Hydra's composed configuration to the frozen objects the pipeline works with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emloc.adapters import Adapter
from emloc.emulators import Emulator
from emloc.errors import ConfigError
from emloc.models.text import TextModel
from emloc.recovery import Recovery
from emloc.settings import Calibration, Compression, EvalSettings, LoraSettings, TrainSettings
from emloc.tasks import Task
from emloc.track import Tracker


@dataclass(frozen=True)
class Cell:
    """One run: the frozen settings of every part. Hydra's types end here."""

    name: str
    method: str
    seed: int
    model: TextModel
    task: Task
    calibration: Calibration
    compression: Compression
    lora: LoraSettings
    emulator: Emulator
    adapter: Adapter
    recovery: Recovery
    train: TrainSettings
    eval: EvalSettings
    tracker: Tracker


def build(cfg: DictConfig) -> Cell:
    """The frozen objects a configuration means.

    Raises:
        ConfigError: a key, a type or a value cannot be right.
    """
    return Cell(**{field.name: _value(cfg, field.name) for field in fields(Cell)})


def _value(cfg: DictConfig, name: str) -> Any:
    node = cfg[name]
    if not isinstance(node, DictConfig):
        return node
    try:
        return part(node) if "_target_" in node else OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        key = f"{name}.{error.full_key or error.key}"
        raise ConfigError(f"{key}: {(error.msg or str(error)).splitlines()[0]}") from error


def part(node: DictConfig) -> Any:
    """The object of the class a part's `_target_` names, its keys checked against the fields."""
    cls = get_class(node._target_)
    values = {key: value for key, value in node.items() if key != "_target_"}
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
