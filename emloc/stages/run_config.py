"""From Hydra's composed configuration to the frozen objects the pipeline works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emloc.adapters import Adapter
from emloc.adapters.none import NoAdapter
from emloc.config.formats import format_of, widths
from emloc.config.paths import choices, plugin_folders
from emloc.config.settings import (
    MODEL_BITS,
    Budget,
    Calibration,
    Compression,
    EvalSettings,
    LoraSettings,
    TrainSettings,
)
from emloc.config.stage_order import in_order
from emloc.emulators import Emulator
from emloc.errors import ConfigError
from emloc.models.family import ModelFamily
from emloc.precision import Precision
from emloc.recovery import Recovery
from emloc.report.tracking.trackers import Tracker
from emloc.stages import Stage
from emloc.tasks import Task


@dataclass(frozen=True)
class RunConfig:
    """One run: the frozen settings of every part. Hydra's types end here."""

    name: str
    method: str
    seed: int
    model: ModelFamily
    task: Task
    calibration: Calibration
    compression: Compression
    precision: Precision | None  # None: the model's dtype, or left open as compression.bits is
    lora: LoraSettings
    emulator: Emulator
    adapter: Adapter | NoAdapter
    recovery: Recovery
    stage: Mapping[str, Stage]  # by name, in the order they run in
    train: TrainSettings
    eval: EvalSettings
    budget: Budget
    tracker: Tracker


def build(cfg: DictConfig) -> RunConfig:
    """The frozen objects a configuration means.

    Raises:
        ConfigError: a key, a type or a value cannot be right.
    """
    names = [field.name for field in fields(RunConfig)]
    unknown = [str(key) for key in cfg if key not in names]
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such setting")
    values = {name: _value(cfg, name) for name in names}
    order = in_order({name: one.after for name, one in values["stage"].items()})
    run_config = RunConfig(**values | {"stage": {name: values["stage"][name] for name in order}})
    return replace(
        run_config, precision=precision_of(run_config.compression.bits, run_config.precision)
    )


def precision_of(bits: int | None, named: Precision | None = None) -> Precision | None:
    """The packed format of `compression.bits`; None for the model's own dtype.

    `named`: what `precision` says. Where the bits are left open, it is left as it is.

    Raises:
        ConfigError: there is no format of that width, more than one, or `named` is of another.
    """
    if named is not None and bits not in (None, named.bits):
        raise ConfigError(
            f"precision={named.name} is a format of {named.bits} bits, and "
            f"compression.bits={bits}; set compression.bits={named.bits}"
            + (", or precision=null" if bits == MODEL_BITS else "")
        )
    if named is not None or bits in (None, MODEL_BITS):
        return named
    assert bits is not None
    return _format(format_of(bits))


def formats(named: Precision | None = None) -> list[Precision]:
    """One packed format of each width there is, from the most bits to the fewest.

    Raises:
        ConfigError: two have one width, and `named` is neither.
    """
    known = {named.name: named} if named else {}
    names = [
        named.name if named is not None and named.bits == bits else format_of(bits)
        for bits in dict.fromkeys(widths().values())
    ]
    return [known.get(name) or _format(name) for name in names]


def _format(name: str) -> Precision:
    """The format as its YAML file says it."""
    node = OmegaConf.load(choices("precision")[name])
    made = _value(OmegaConf.create({"precision": node}), "precision")
    assert isinstance(made, Precision)
    return made


def _value(cfg: DictConfig, name: str) -> Any:
    try:
        node = cfg[name]
        if name == "stage":
            return {str(one): instantiate(below) for one, below in node.items()}
        return instantiate(node) if isinstance(node, DictConfig) else node
    except OmegaConfBaseException as error:
        key = str(error.full_key or error.key)
        key = key if key.split(".")[0] == name else f"{name}.{key}"
        raise ConfigError(f"{key}: {(error.msg or str(error)).splitlines()[0]}") from error
    except ImportError as error:
        why = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"{name}._target_={cfg[name]._target_}: {why}") from error


def instantiate(node: DictConfig) -> Any:
    """The object of the class a part's `_target_` names, its keys checked against the fields.

    A section without `_target_` is of the class its schema says. A mapping of parts becomes one of
    objects. Classes of plug-ins are found in the folders of `EMLOC_PLUGINS`.
    """
    plugin_folders()
    cls = (
        get_class(current_target(node._target_)) if "_target_" in node else OmegaConf.get_type(node)
    )
    values = {key: value for key, value in node.items() if key != "_target_"}
    parts = {
        str(key): {name: instantiate(one) for name, one in value.items()}
        for key, value in values.items()
        if isinstance(value, DictConfig) and any(_is_part(one) for one in value.values())
    }
    # Objects cannot be merged into a schema, but the keys they stand under are checked by it.
    plain = values | {key: {} for key in parts}
    made: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), plain))
    return replace(made, **parts)


# Where classes lay that run folders and settings of users name -> where they lie now.
_MOVED = {"emloc.tracking.track.": "emloc.report.tracking.trackers."}


def current_target(target: str) -> str:
    """The dotted name of a class today, of a name that may be from before it was moved."""
    for before, now in _MOVED.items():
        if target.startswith(before):
            return now + target.removeprefix(before)
    return target


def _is_part(value: Any) -> bool:
    return isinstance(value, DictConfig) and "_target_" in value
