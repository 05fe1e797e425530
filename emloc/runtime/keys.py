"""What stands for a value in a stage's key and in a run folder's name.

A key holds meanings and no places: moving a module to another folder changes no key. A class counts
by the name of its file and its own name, `svd.Svd`. Where either has to change, the class keeps its
old word as `key_name`.

A setting that is added later must not change the keys of what was made before it: it is declared
with `neutral(value)`, the value that means "as before there was this setting", and is left out of
keys and folder names while it has that value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

_NEUTRAL = "neutral"

Value = TypeVar("Value")


def neutral(value: Value) -> Value:
    """A dataclass field whose default is `value`, left out of keys while it has that value.

    Never change the value: keys that were made without the field mean it for ever.
    """
    made: Value = dataclasses.field(default=value, metadata={_NEUTRAL: value})
    return made


def neutral_values(cls: type) -> dict[str, Any]:
    """Field name -> neutral value, of the fields of a dataclass that have one."""
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return {one.name: one.metadata[_NEUTRAL] for one in fields if _NEUTRAL in one.metadata}


def class_name(cls: type) -> str:
    """The name that a class has in keys: `key_name` in its own body, else `<file>.<class>`.

    Raises:
        TypeError: the class is defined within a function, so that its name says nothing.
    """
    if "key_name" in vars(cls):
        return str(vars(cls)["key_name"])
    if "<" in cls.__qualname__:
        raise TypeError(f"{cls.__qualname__} cannot be part of a stage's key")
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__qualname__}"


def without_neutral(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """The values of a dataclass's fields, less those that are neutral."""
    unset = neutral_values(cls)
    return {
        name: value
        for name, value in values.items()
        if name not in unset or type(value) is not type(unset[name]) or value != unset[name]
    }


def key_of(item: Any) -> Any:
    """The JSON value that stands for `item` in a stage's key.

    Raises:
        TypeError: `item` has no `key`, and is neither a settings dataclass nor a plain value. A
            function or class is none: what it does is said by the stage's name and version.
    """
    if item is None or isinstance(item, str | int | float | bool):
        return item
    if isinstance(item, type) or callable(item):
        name = getattr(item, "__qualname__", type(item).__name__)
        raise TypeError(f"{name} cannot be part of a stage's key")
    if hasattr(item, "key"):
        return item.key
    if dataclasses.is_dataclass(item):
        values = {one.name: getattr(item, one.name) for one in dataclasses.fields(item)}
        kept = without_neutral(values, type(item))
        return {"part": class_name(type(item)), **{name: key_of(one) for name, one in kept.items()}}
    if isinstance(item, dict):
        return {str(name): key_of(value) for name, value in item.items()}
    if isinstance(item, list | tuple):
        return [key_of(value) for value in item]
    raise TypeError(f"{type(item).__name__} cannot be part of a stage's key")
