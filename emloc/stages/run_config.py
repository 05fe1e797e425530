"""Build the frozen objects of a run from the configuration that Hydra has composed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emloc.adapters import Adapter
from emloc.adapters.none import NoAdapter
from emloc.config.folder_words import require_word
from emloc.config.formats import format_of, widths
from emloc.config.named_class import import_named
from emloc.config.paths import choices
from emloc.config.settings import (
    MODEL_BITS,
    Budget,
    Calibration,
    Compression,
    EvalSettings,
    LoraSettings,
    TrainSettings,
)
from emloc.config.stage_order import order_stages
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
    """Configuration of one run: the frozen settings of every part, without types of Hydra."""

    name: str
    method: str
    seed: int
    model: ModelFamily
    task: Task
    calibration: Calibration
    compression: Compression
    precision: (
        Precision | None
    )  # None: the model's dtype, or not chosen yet (compression.bits=null)
    lora: LoraSettings
    emulator: Emulator
    adapter: Adapter | NoAdapter
    recovery: Recovery
    stage: Mapping[str, Stage]  # by name, in the order in which they run
    train: TrainSettings
    eval: EvalSettings
    budget: Budget
    tracker: Tracker


def build(cfg: DictConfig) -> RunConfig:
    """Return the frozen objects that the composed configuration describes.

    Raises:
        ConfigError: a key is unknown, or a value has a wrong type or is out of range.
    """
    names = [field.name for field in fields(RunConfig)]
    unknown = [str(key) for key in cfg if key not in names]
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such setting")
    values = {name: section_of(cfg, name) for name in names}
    _require_folder_words(values)
    order = order_stages({name: stage.after for name, stage in values["stage"].items()})
    run_config = RunConfig(**values | {"stage": {name: values["stage"][name] for name in order}})
    return replace(
        run_config, precision=precision_of(run_config.compression.bits, run_config.precision)
    )


def _require_folder_words(values: Mapping[str, Any]) -> None:
    """Check the settings that are part of the names of folders.

    Raises:
        ConfigError: one of them is no name of a folder.
    """
    require_word("name", values["name"], "demo")
    require_word("method", values["method"], "emloc")
    require_word("model.name", values["model"].name, "my_model")
    require_word("task.name", values["task"].name, "my_task")
    for stage in values["stage"]:
        require_word("stage", stage, "standard")


def precision_of(bits: int | None, named: Precision | None = None) -> Precision | None:
    """Return the packed format of `compression.bits`; None for the model's own dtype.

    `named` is the format that the setting `precision` names. It is returned if `bits` is None.

    Raises:
        ConfigError: no format or more than one has that width, or `named` has another width.
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
    return _read_format(format_of(bits))


def formats(named: Precision | None = None) -> list[Precision]:
    """Return one packed format for each available width, from the most bits to the fewest.

    `named` is preferred among the formats of its width.

    Raises:
        ConfigError: several formats have the same width, and `named` is none of them.
    """
    named_formats = {named.name: named} if named else {}
    names = [
        named.name if named is not None and named.bits == bits else format_of(bits)
        for bits in dict.fromkeys(widths().values())
    ]
    return [named_formats.get(name) or _read_format(name) for name in names]


def _read_format(name: str) -> Precision:
    """Return the packed format that `precision/<name>.yaml` describes."""
    node = OmegaConf.load(choices("precision")[name])
    precision = section_of(OmegaConf.create({"precision": node}), "precision")
    assert isinstance(precision, Precision)
    return precision


def section_of(cfg: DictConfig, name: str) -> Any:
    """Return the value or the object of the section `name`, with errors that name the setting.

    Raises:
        ConfigError: the section is missing or wrong, or its class cannot or may not be imported.
    """
    try:
        node = cfg[name]
        if name == "stage":
            return {str(stage): instantiate(settings) for stage, settings in node.items()}
        return instantiate(node) if isinstance(node, DictConfig) else node
    except OmegaConfBaseException as error:
        key = str(error.full_key or error.key)
        key = key if key.split(".")[0] == name else f"{name}.{key}"
        raise ConfigError(f"{key}: {(error.msg or str(error)).splitlines()[0]}") from error
    except ImportError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"{name}._target_={cfg[name]._target_}: {reason}") from error


def instantiate(node: DictConfig) -> Any:
    """Return the object that a section of the configuration describes.

    Its class is the one that `_target_` names, or else the class of the section's schema. The keys
    of the section are checked against the fields of the class. A mapping of parts becomes a mapping
    of objects. Classes of plug-ins are found in the folders of `EMLOC_PLUGINS`.
    """
    cls = _class_of(str(node._target_)) if "_target_" in node else OmegaConf.get_type(node)
    values = {key: value for key, value in node.items() if key != "_target_"}
    parts = {
        str(key): {name: instantiate(part) for name, part in value.items()}
        for key, value in values.items()
        if isinstance(value, DictConfig) and any(_is_part(item) for item in value.values())
    }
    # OmegaConf cannot merge objects into a schema. Empty mappings in their place let the schema
    # check the keys.
    plain_values = values | {key: {} for key in parts}
    instance: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), plain_values))
    return replace(instance, **parts)


def _class_of(target: str) -> type:
    """Return the class with today's or a former dotted name.

    Raises:
        ImportError: there is no such class, or it is of code that is not trusted.
    """
    try:
        cls = import_named(current_target(target))
    except AttributeError as error:
        raise ImportError(f"No module named {target!r}, and no such class: {error}") from None
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise ImportError("it is no class with fields")
    return cls


# Former module -> module today, of classes that older run folders and settings name.
_MOVED_MODULES = {"emloc.tracking.track.": "emloc.report.tracking.trackers."}


def current_target(target: str) -> str:
    """Return today's dotted name of a class, given its present or its former name."""
    for former, current in _MOVED_MODULES.items():
        if target.startswith(former):
            return current + target.removeprefix(former)
    return target


def _is_part(value: Any) -> bool:
    """Return whether a value of the configuration is a section with a class (`_target_`)."""
    return isinstance(value, DictConfig) and "_target_" in value
