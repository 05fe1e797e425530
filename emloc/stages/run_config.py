"""Build the frozen objects of a run from the configuration that Hydra has composed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from emloc.adapters import Adapter
from emloc.adapters.none import NoAdapter
from emloc.anchors import Anchor
from emloc.anchors.none import NoAnchor
from emloc.config.check import errors_of, fill, parts_in, refuse_unknown_sections, refuse_width
from emloc.config.folder_words import require_words
from emloc.config.formats import format_of, widths
from emloc.config.named_class import import_named
from emloc.config.paths import choices
from emloc.config.settings import (
    MODEL_BITS,
    Budget,
    Calibration,
    Compression,
    Config,
    EvalSettings,
    LoraSettings,
    TrainSettings,
)
from emloc.config.stage_order import order_stages
from emloc.config.targets import current_target
from emloc.config.values import refuse_wrong_value
from emloc.emulators import Emulator
from emloc.errors import ConfigError
from emloc.models.family import ModelFamily
from emloc.precision import Precision
from emloc.recovery import Recovery
from emloc.report.tracking.trackers import Tracker
from emloc.stages import Stage
from emloc.stages.polishing import Polish
from emloc.stages.polishing.none import NoPolish
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
    anchor: Anchor | NoAnchor
    polish: Polish | NoPolish
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
    refuse_unknown_sections(cfg)
    values = {field.name: section_of(cfg, field.name) for field in fields(RunConfig)}
    require_words(values)
    order = order_stages({name: stage.after for name, stage in values["stage"].items()})
    run_config = RunConfig(**values | {"stage": {name: values["stage"][name] for name in order}})
    return replace(
        run_config, precision=precision_of(run_config.compression.bits, run_config.precision)
    )


def precision_of(bits: int | None, named: Precision | None = None) -> Precision | None:
    """Return the packed format of `compression.bits`; None for the model's own dtype.

    `named` is the format that the setting `precision` names. It is returned if `bits` is None.

    Raises:
        ConfigError: no format or more than one has that width, or `named` has another width.
    """
    refuse_width(bits, named)
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
        with errors_of(name):
            node = cfg[name]
            if name == "stage":
                return {
                    str(stage): instantiate(settings, f"stage.{stage}")
                    for stage, settings in node.items()
                }
            if isinstance(node, DictConfig):
                return instantiate(node, name)
            refuse_wrong_value(Config, name, node, name)
            return node
    except ImportError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"{name}._target_={cfg[name]._target_}: {reason}") from error


def instantiate(node: DictConfig, section: str = "") -> Any:
    """Return the object that a section of the configuration describes.

    Its class is the one that `_target_` names, or else the class of the section's schema. The keys
    of the section are checked against the fields of the class. A mapping of parts becomes a mapping
    of objects. Classes of plug-ins are found in the folders of `EMLOC_PLUGINS`.

    `section` is the name that begins the names of settings in errors.
    """
    cls: Any = _class_of(str(node._target_)) if "_target_" in node else OmegaConf.get_type(node)
    values = {str(key): value for key, value in node.items() if key != "_target_"}
    parts = {
        key: {name: instantiate(part, f"{section}.{key}.{name}") for name, part in parts.items()}
        for key, parts in parts_in(values).items()
    }
    # OmegaConf cannot merge objects into a schema. Empty mappings in their place let the schema
    # check the keys.
    return replace(fill(cls, values | {key: {} for key in parts}, section), **parts)


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
