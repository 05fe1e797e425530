"""Stand-ins for the classes of parts: their fields and traits, read without importing them.

A stand-in is a dataclass with the fields of the class, the values that these may have, and the
plain class attributes. It has none of the methods.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import field, make_dataclass
from functools import cache
from typing import Annotated, Any

from emloc.config.class_source import ClassSource, Module, find_class
from emloc.config.values import SEED, OneOf, Pattern, Range, Text

_TYPES: Mapping[str, Any] = {
    **{cls.__name__: cls for cls in (int, str, float, bool, dict, list)},
    "Any": Any,
    "SEED": SEED,
}
_RULES: Mapping[str, Any] = {rule.__name__: rule for rule in (Range, OneOf, Text, Pattern)}


@cache
def declared_class(name: str) -> type | None:
    """Return the stand-in for the class with this dotted name; None if it has no source file.

    A field of a type that cannot be read takes any value.
    """
    source = find_class(name)
    if source is None:
        return None
    fields, traits = _fields_of(source), _traits_of(source)
    stand_in = make_dataclass(
        source.node.name,
        [(word, hint, default) for word, (hint, default) in fields.items()],
        namespace={"__module__": source.module.name, **traits},
        frozen=True,
        kw_only=True,
    )
    stand_in.__module__ = source.module.name
    return stand_in


def _fields_of(source: ClassSource) -> dict[str, tuple[Any, Any]]:
    """Field -> (its type, its default), those of the bases first."""
    fields: dict[str, tuple[Any, Any]] = {}
    for base in source.bases:
        fields |= _fields_of(base)
    for name, node in source.fields:
        try:
            default = _default(node.value, source.module)
            fields[name] = (_evaluate(node.annotation, source.module), default)
        except (ValueError, TypeError):  # such as "Name" | None
            fields[name] = (Any, field() if node.value is None else field(default=None))
    return fields


def _default(value: ast.expr | None, module: Module) -> Any:
    """The default of a field, as `make_dataclass` takes it.

    Raises:
        ValueError: it is no plain value.
    """
    if value is None:
        return field()
    if isinstance(value, ast.Call):
        word = ast.unparse(value.func)
        factories = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
        if word == "neutral":
            return field(default=_evaluate(value.args[0], module))
        if word == "field" and factories.get("default_factory") in ("dict", "list"):
            return field(default_factory=_TYPES[factories["default_factory"]])
    return field(default=_evaluate(value, module))


def _traits_of(source: ClassSource) -> dict[str, Any]:
    """Class attribute -> its plain value; attributes that are computed are left out."""
    traits: dict[str, Any] = {}
    for base in source.bases:
        traits |= _traits_of(base)
    own_fields = {name for name, _ in source.fields}
    for node in source.node.body:
        if isinstance(node, ast.FunctionDef):
            traits.pop(node.name, None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name = ast.unparse(target)
            traits.pop(name, None)
            if name not in own_fields and not name.startswith("__"):
                try:
                    traits[name] = ast.literal_eval(node.value)
                except ValueError:
                    continue
    return traits


def _evaluate(node: ast.expr, module: Module) -> Any:
    """The value of an annotation or of a default, which calls nothing but declarations.

    Raises:
        ValueError: the expression holds anything else.
    """
    if isinstance(node, ast.Name):
        return _TYPES[node.id] if node.id in _TYPES else module.constant(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _evaluate(node.left, module) | _evaluate(node.right, module)
    if isinstance(node, ast.Call) and ast.unparse(node.func) in _RULES:
        arguments = [one for argument in node.args for one in _arguments(argument, module)]
        keywords = {str(one.arg): _evaluate(one.value, module) for one in node.keywords}
        return _RULES[ast.unparse(node.func)](*arguments, **keywords)
    if isinstance(node, ast.Subscript):
        return _subscript(node, module)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.Sub):
        left, right = _evaluate(node.left, module), _evaluate(node.right, module)
        return left**right if isinstance(node.op, ast.Pow) else left - right
    return ast.literal_eval(node)


def _subscript(node: ast.Subscript, module: Module) -> Any:
    """The value of `Annotated[...]`, `dict[...]` or `list[...]`."""
    word = ast.unparse(node.value)
    items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if word == "Annotated":
        return Annotated[tuple(_evaluate(item, module) for item in items)]
    if word not in ("dict", "list"):
        raise ValueError(f"{word} is no type of a setting")
    return _TYPES[word][tuple(_type_or_any(item, module) for item in items)]


def _type_or_any(node: ast.expr, module: Module) -> Any:
    try:
        return _evaluate(node, module)
    except (ValueError, TypeError):
        return Any


def _arguments(node: ast.expr, module: Module) -> list[Any]:
    if isinstance(node, ast.Starred):
        return list(_evaluate(node.value, module))
    return [_evaluate(node, module)]
