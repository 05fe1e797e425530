"""Convert values to the JSON that cache keys and names of run folders are computed from.

A key does not depend on the folder of a module. A class appears under the name of its file and its
own name, such as `svd.Svd`. A class whose file or name changes keeps the former name as `key_name`.

A new setting must not change the keys of older artifacts. It is declared with `neutral(value)`,
where `value` stands for the behaviour before the setting existed. While a setting has its neutral
value, it is left out of keys and folder names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

_NEUTRAL = "neutral"

Value = TypeVar("Value")


def neutral(value: Value) -> Value:
    """Return a dataclass field with default `value`, left out of keys while it has that value.

    The neutral value must never change, since existing keys without the field stand for it.
    """
    field: Value = dataclasses.field(default=value, metadata={_NEUTRAL: value})
    return field


def neutral_values(cls: type) -> dict[str, Any]:
    """Return field name -> neutral value, for the fields of a dataclass that have one."""
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return {field.name: field.metadata[_NEUTRAL] for field in fields if _NEUTRAL in field.metadata}


def class_name(cls: type) -> str:
    """Return the name of a class in keys: `key_name` from its own body, or `<file>.<class>`.

    Raises:
        TypeError: the class is defined inside a function, so its name does not identify it.
    """
    if "key_name" in vars(cls):
        return str(vars(cls)["key_name"])
    if "<" in cls.__qualname__:
        raise TypeError(f"{cls.__qualname__} cannot be part of a stage's key")
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__qualname__}"


def without_neutral(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Return the values of a dataclass's fields without those that are neutral."""
    neutral_by_name = neutral_values(cls)
    return {
        name: value
        for name, value in values.items()
        if name not in neutral_by_name
        or type(value) is not type(neutral_by_name[name])
        or value != neutral_by_name[name]
    }


def key_of(item: Any) -> Any:
    """Return the JSON value of `item` in the cache key of a stage.

    Raises:
        TypeError: `item` has no `key` and is neither a dataclass nor a plain value. Functions and
            classes are refused, since their names do not tell when their code changes; the stage
            has a version for this.
    """
    if item is None or isinstance(item, str | int | float | bool):
        return item
    if isinstance(item, type) or callable(item):
        name = getattr(item, "__qualname__", type(item).__name__)
        raise TypeError(f"{name} cannot be part of a stage's key")
    if hasattr(item, "key"):
        return item.key
    if dataclasses.is_dataclass(item):
        values = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
        settings = without_neutral(values, type(item))
        return {"part": class_name(type(item)), **{k: key_of(v) for k, v in settings.items()}}
    if isinstance(item, dict):
        return {str(name): key_of(value) for name, value in item.items()}
    if isinstance(item, list | tuple):
        return [key_of(value) for value in item]
    raise TypeError(f"{type(item).__name__} cannot be part of a stage's key")
