"""Explanations of settings, read from the comments at their fields in the classes of the package.

The source files are parsed and not imported: `emloc --help` must not wait for torch.
"""

from __future__ import annotations

import ast
import io
import tokenize
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path


@cache
def field_comments(cls: str) -> dict[str, str]:
    """Name -> comment of each field of a dataclass, those of its bases first.

    The comment of a field stands behind it, or else in the lines above it.

    Args:
        cls: dotted name, such as `emloc.emulators.svd.Svd`; a class that is not found has no
            fields.
    """
    module, _, name = cls.rpartition(".")
    path = _source_file(module)
    if path is None:
        return {}
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if node is None:  # the package of a class may only import it
        home = _imports(tree).get(name)
        return field_comments(home) if home else {}
    explanations: dict[str, str] = {}
    imports = _imports(tree)
    for base in node.bases:
        word = ast.unparse(base)
        explanations |= field_comments(imports.get(word, f"{module}.{word}"))
    comments = _comments(text)
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if not ast.unparse(field.annotation).startswith("ClassVar"):
            explanations[field.target.id] = _comment_of(field, comments)
    return explanations


def _source_file(module: str) -> Path | None:
    """The file of a module. Unlike `importlib.util.find_spec`, this imports no parent package."""
    path: list[str] | None = None
    spec = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:depth]), path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return Path(spec.origin) if spec is not None and spec.origin else None


def _imports(tree: ast.Module) -> dict[str, str]:
    """Name in the module -> dotted name of what it imports from elsewhere."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def _comments(text: str) -> dict[int, tuple[str, bool]]:
    """Line -> the comment in it, and whether the line holds nothing else."""
    by_line = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            is_alone = token.line.lstrip().startswith("#")
            by_line[token.start[0]] = (token.string.lstrip("# ").strip(), is_alone)
    return by_line


def _comment_of(field: ast.AnnAssign, comments: dict[int, tuple[str, bool]]) -> str:
    lines = range(field.lineno, (field.end_lineno or field.lineno) + 1)
    behind = [comments[line][0] for line in lines if line in comments]
    if behind:
        return " ".join(behind)
    above: list[str] = []
    line = field.lineno - 1
    while line in comments and comments[line][1]:
        above.insert(0, comments[line][0])
        line -= 1
    return " ".join(above)
