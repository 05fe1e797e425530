"""Definitions of classes, read from their source files.

The files are parsed and not imported: help and the first checks of settings must not wait for
torch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Module:
    """The parsed source file of a module."""

    name: str
    text: str
    tree: ast.Module

    @property
    def imports(self) -> Mapping[str, str]:
        """Name in the module -> dotted name of the object that it imports from elsewhere."""
        return {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in self.tree.body
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }

    def constant(self, name: str) -> Any:
        """Return the plain value that the module assigns to a name, or imports under it.

        Raises:
            ValueError: there is none.
        """
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and [ast.unparse(one) for one in node.targets] == [
                name
            ]:
                return ast.literal_eval(node.value)
        home, _, original = self.imports.get(name, "").rpartition(".")
        module = read_module(home) if home else None
        if module is None:
            raise ValueError(f"{self.name} has no plain value {name}")
        return module.constant(original)


@dataclass(frozen=True)
class ClassSource:
    """The definition of a class in its module."""

    module: Module
    node: ast.ClassDef

    @property
    def bases(self) -> Iterator[ClassSource]:
        """Yield the definitions of the base classes, as far as they have source files."""
        for base in self.node.bases:
            word = ast.unparse(base)
            source = find_class(self.module.imports.get(word, f"{self.module.name}.{word}"))
            if source is not None:
                yield source

    @property
    def fields(self) -> Iterator[tuple[str, ast.AnnAssign]]:
        """Yield name and definition of each field, without those of the bases."""
        for node in self.node.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            if not ast.unparse(node.annotation).startswith("ClassVar"):
                yield node.target.id, node


@cache
def find_class(name: str) -> ClassSource | None:
    """Return the definition of a class by its dotted name; None if it has no source file."""
    home, _, word = name.rpartition(".")
    module = read_module(home)
    if module is None:
        return None
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef) and node.name == word:
            return ClassSource(module, node)
    original = module.imports.get(word)  # the package of a class may only import it
    return find_class(original) if original else None


@cache
def read_module(name: str) -> Module | None:
    """Return the parsed source file of a module; None if it has none."""
    path = _source_file(name)
    if path is None or path.suffix != ".py":
        return None
    text = path.read_text(encoding="utf-8")
    return Module(name, text, ast.parse(text))


def _source_file(module: str) -> Path | None:
    """The file of a module. Unlike `importlib.util.find_spec`, this imports no parent package."""
    path: list[str] | None = None
    spec = None
    for depth in range(1, module.count(".") + 2):
        name = ".".join(module.split(".")[:depth])
        spec = PathFinder.find_spec(name, path) if name else None
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return Path(spec.origin) if spec is not None and spec.origin else None
