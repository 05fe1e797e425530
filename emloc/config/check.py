"""First check of a composed configuration, which imports neither torch nor the classes of parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emloc.config.compatibility import check_compatible, refuse_training_in_float16, required_budget
from emloc.config.declared import declared_class
from emloc.config.folder_words import require_words
from emloc.config.formats import format_of
from emloc.config.settings import MODEL_BITS, Config
from emloc.config.stage_order import order_stages
from emloc.config.targets import current_target
from emloc.config.values import refuse_wrong_value, refuse_wrong_values
from emloc.errors import ConfigError

# Traits of parts that decide whether these work together.
_TRAITS = {
    "emulator": ("keeps_weights", "same_shapes", "recomputes", "unanchored"),
    "adapter": ("trains", "nonlinear", "needs_weight"),
    "recovery": ("reads_pairs", "scatters", "subtracts"),
    "anchor": ("anchors",),
    "polish": ("polishes",),
}


def check_settings(cfg: DictConfig) -> None:
    """Refuse settings that can be seen to be wrong from their names and values alone.

    Raises:
        ConfigError: a key is unknown, a value is wrong, or choices do not go together.
    """
    sections = check_values(cfg)
    parts = {group: sections[group] for group in _TRAITS}
    # A class may compute a trait, or have no source file; and no adapter has no further traits.
    if all(hasattr(parts[group], name) for group, names in _TRAITS.items() for name in names):
        check_compatible(**parts, recipe=sections["train"])
        refuse_training_in_float16(getattr(sections["model"], "dtype", ""), parts["adapter"])
        compression = sections["compression"]
        if parts["adapter"].trains and None in (compression.ratio, compression.bits):
            required_budget(sections["budget"].gpu_gib)


def check_values(cfg: DictConfig) -> dict[str, Any]:
    """Check each setting by itself; return section -> stand-in for its object, or its plain value.

    Classes are read from their source files. What only their own code can check is left to
    `emloc.stages.run_config.build`.

    Raises:
        ConfigError: a key is unknown, or a value is wrong.
    """
    refuse_unknown_sections(cfg)
    sections = {field.name: _section(cfg, field.name) for field in fields(Config)}
    require_words(sections)
    refuse_width(sections["compression"].bits, sections["precision"])
    stages = {name: stage for name, stage in sections["stage"].items() if stage is not None}
    if len(stages) == len(sections["stage"]):
        order_stages({name: stage.after for name, stage in stages.items()})
    return sections


def refuse_unknown_sections(cfg: DictConfig) -> None:
    """Check the names of the sections.

    Raises:
        ConfigError: there is no such section.
    """
    names = [field.name for field in fields(Config)]
    unknown = [str(key) for key in cfg if key not in names]
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such setting")


def refuse_width(bits: int | None, precision: Any) -> None:
    """Check that `compression.bits` and the packed format of `precision` agree.

    Raises:
        ConfigError: no format or more than one has that width, or the format has another width.
    """
    if precision is not None and bits not in (None, precision.bits):
        raise ConfigError(
            f"precision={precision.name} is a format of {precision.bits} bits, and "
            f"compression.bits={bits}; set compression.bits={precision.bits}"
            + (", or precision=null" if bits == MODEL_BITS else "")
        )
    if precision is None and bits not in (None, MODEL_BITS):
        format_of(bits)


@contextmanager
def errors_of(section: str) -> Iterator[None]:
    """Turn errors of OmegaConf into one line that begins with the setting."""
    try:
        yield
    except OmegaConfBaseException as error:
        key = str(error.full_key or error.key)
        key = key if key.split(".")[0] == section else f"{section}.{key}"
        raise ConfigError(f"{key}: {(error.msg or str(error)).splitlines()[0]}") from error


def fill(cls: type, values: Mapping[str, Any], section: str) -> Any:
    """Return an instance of a dataclass with these values, which are converted and checked.

    Raises:
        ConfigError: a value is wrong.
        OmegaConfBaseException: a key is unknown or missing, or a value has a wrong type.
    """
    instance = OmegaConf.to_object(OmegaConf.merge(_schema_of(cls), values))
    refuse_wrong_values(section, instance)
    return instance


@cache
def _schema_of(cls: type) -> DictConfig:
    """The fields of a class as OmegaConf reads them; a merge copies this node."""
    schema: DictConfig = OmegaConf.structured(cls)
    return schema


def parts_in(values: Mapping[str, Any]) -> dict[str, Mapping[str, DictConfig]]:
    """Return the values that are mappings of parts, such as `siblings` of a model."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, DictConfig) and any(is_part(item) for item in value.values())
    }


def is_part(value: Any) -> bool:
    """Return whether a value of the configuration is a section with a class (`_target_`)."""
    return isinstance(value, DictConfig) and "_target_" in value


def _section(cfg: DictConfig, name: str) -> Any:
    """The value of a section: a stand-in for its class, a mapping of them, or a plain value."""
    with errors_of(name):
        node = cfg[name]
        if name == "stage":
            return {str(stage): _stand_in(part, f"stage.{stage}") for stage, part in node.items()}
        if isinstance(node, DictConfig):
            return _stand_in(node, name)
        refuse_wrong_value(Config, name, node, name)
        return node


def _stand_in(node: DictConfig, section: str) -> Any:
    """A stand-in with the values of a section; None if the source of its class is not found."""
    if "_target_" in node:
        cls = declared_class(current_target(str(node._target_)))
    else:
        cls = OmegaConf.get_type(node)
    if cls is None:
        return None
    values = {str(key): value for key, value in node.items() if key != "_target_"}
    nested = parts_in(values)
    for key, parts in nested.items():
        for name, part in parts.items():
            _stand_in(part, f"{section}.{key}.{name}")
    return fill(cls, values | {key: {} for key in nested}, section)
