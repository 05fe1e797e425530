"""Values that settings may have, declared at the fields of their classes.

    rank: Annotated[int, Range(least=1, usual=8)]

A number without a declaration must be finite, and a text must not be empty. The declarations are
plain calls with plain arguments, so that `emloc.config.declared` can read them from the source file
of a class that would import torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Protocol

from emloc.errors import ConfigError, one_line

# Largest whole number of settings without an upper bound: counts are also stored in 32 bits.
LARGEST_COUNT = 2**31 - 1


class Rule(Protocol):
    """Declaration of the values that a setting may have."""

    def fault(self, key: str, value: Any, *, or_null: bool) -> str | None:
        """Return the line that refuses `value` of the setting `key`; None: the value is right.

        `or_null` says whether the setting may also be null.
        """


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds, or a word in place of a number."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    usual: float | None = 1  # a right value, which the refusal suggests; None: null
    word: str | None = None  # is right, too

    def fault(self, key: str, value: Any, *, or_null: bool) -> str | None:
        """Return the line that refuses a number outside the bounds."""
        if isinstance(value, str):
            if value == self.word:
                return None
            word = f" and not {self.word}" if self.word else ""
            return f"{key}={value} is no number{word}; set {key}={_number(self.usual)}"
        most = self.most
        if isinstance(value, int) and most is None and self.below is None:
            most = LARGEST_COUNT
        inside = (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (most is None or value <= most)
            and (self.below is None or value < self.below)
        )
        if inside:
            return None
        bounds = [self._bounds] if self._bounds else []
        if not math.isfinite(value) and most is None and self.below is None:
            bounds.append("finite")
        elif most != self.most and value > LARGEST_COUNT:
            bounds.append(f"at most {LARGEST_COUNT}")
        phrase = " and ".join(bounds)
        if phrase.startswith("between"):
            phrase = f"lie {phrase}"
        else:
            word = f" or {self.word}" if self.word else ""
            phrase = f"be {phrase}{word}" + " or null" * or_null
        return f"{key} must {phrase}, got {_number(value)}; set {key}={_number(self.usual)}"

    @property
    def _bounds(self) -> str:
        """The bounds as a phrase that follows `must be`, or `must lie`; empty if there are none."""
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if low is not None and high is not None:
            if self.above is not None and self.below is not None:
                return f"between {_number(low)} and {_number(high)}"
            left, right = "(["[self.above is None], ")]"[self.below is None]
            return f"in {left}{_number(low)}, {_number(high)}{right}"
        if low is not None:
            return f"{'at least' if self.above is None else 'above'} {_number(low)}"
        if high is not None:
            return f"{'at most' if self.below is None else 'below'} {_number(high)}"
        return ""


# Seeds of Python, NumPy and torch alike.
SEED = Range(least=0, below=2**32, usual=0)


@dataclass(frozen=True, init=False)
class OneOf:
    """One of several words or numbers; the refusal suggests the nearest or else the first."""

    options: tuple[Any, ...]

    def __init__(self, *options: Any) -> None:
        object.__setattr__(self, "options", options)

    def fault(self, key: str, value: Any, *, or_null: bool) -> str | None:
        """Return the line that refuses any other value."""
        if value in self.options:
            return None
        words = [str(option) for option in self.options]
        near = difflib.get_close_matches(str(value).lower(), words, n=1, cutoff=0.6)
        null = " or null" * or_null
        return (
            f"{key}={value} is none of {', '.join(words)}{null}; "
            f"set {key}={near[0] if near else words[0]}"
        )


@dataclass(frozen=True)
class Text:
    """A text that is not empty, unless `may_be_empty`."""

    may_be_empty: bool = False

    def fault(self, key: str, value: Any, *, or_null: bool) -> str | None:
        """Return the line that refuses an empty text."""
        if self.may_be_empty or str(value).strip():
            return None
        null = f"set {key}=null, or " * or_null
        return f"{key} is empty; {null}give it a text, as in {key}=..."


@dataclass(frozen=True)
class Pattern:
    """A regular expression that is valid and not empty."""

    def fault(self, key: str, value: Any, *, or_null: bool) -> str | None:
        """Return the line that refuses the expression."""
        if not str(value).strip():
            return (
                f"{key} is empty, which names no layer; set {key}='.*layers.*' or "
                "another regular expression"
            )
        try:
            re.compile(value)
        except re.error as error:
            return f"{key}: {value} is no valid regular expression: {error}; correct {key}"
        return None


class Checked:
    """Base class of settings whose values are checked whenever an instance is made."""

    section: ClassVar[str] = ""  # of the configuration, such as `lora`

    def __post_init__(self) -> None:
        refuse_wrong_values(self.section, self)


def refuse_wrong_values(section: str, settings: Any) -> None:
    """Check the fields of a dataclass against their declarations.

    A class can also declare `conflicts`: pairs of values that its fields must not have together,
    and of the line that refuses them.

    Raises:
        ConfigError: names the setting, its value and one that is right.
    """
    cls: type = type(settings)
    for name in field_rules(cls):
        key = f"{section}.{name}" if section else name
        refuse_wrong_value(cls, name, getattr(settings, name), key)
    for combination, line in getattr(settings, "conflicts", ()):
        if all(getattr(settings, name) == value for name, value in combination.items()):
            raise ConfigError(line)


def refuse_wrong_value(cls: type, name: str, value: Any, key: str) -> None:
    """Check the value of the field `name` of a class. Of a mapping, the keys are checked.

    Raises:
        ConfigError: names the setting `key`, its value and one that is right.
    """
    rule, is_optional = field_rules(cls)[name]
    if isinstance(value, list | tuple) and not value:
        raise ConfigError(f"{key} is an empty list; set {key}=[...] with at least one item")
    for item in [*value] if isinstance(value, dict | list | tuple) else [value]:
        if fault := _fault(rule, key, item, or_null=is_optional):
            raise ConfigError(one_line(fault))


def _fault(rule: Rule | None, key: str, value: Any, *, or_null: bool) -> str | None:
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return (rule or Range()).fault(key, value, or_null=or_null)
    if isinstance(value, str):
        return (rule or Text()).fault(key, value, or_null=or_null)
    return None


@cache
def field_rules(cls: type) -> Mapping[str, tuple[Rule | None, bool]]:
    """Return field -> (its declaration if it has one, whether the field may be None)."""
    hints = typing.get_type_hints(cls, include_extras=True)
    rules = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        rule = next(iter(_metadata(hint)), None)
        rules[field.name] = (rule, NoneType in _alternatives(hint))
    return rules


def _metadata(hint: Any) -> Iterator[Rule]:
    """Yield what `Annotated` adds to a type, in the type or in one of its arguments."""
    yield from getattr(hint, "__metadata__", ())
    for argument in typing.get_args(hint):
        yield from _metadata(argument)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the types of `a | b`, also of `Annotated[a | b, ...]`."""
    if typing.get_origin(hint) is typing.Annotated:
        return _alternatives(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (UnionType, typing.Union):
        return typing.get_args(hint)
    return (hint,)


def _number(value: float | None) -> str:
    """The number as it is written on a command line."""
    if value is None:
        return "null"
    return str(value) if isinstance(value, int) else f"{value:g}"
