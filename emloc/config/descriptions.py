"""Explanations of settings, read from the comments at the fields of their classes."""

from __future__ import annotations

import ast
import io
import tokenize
from functools import cache

from emloc.config.class_source import ClassSource, find_class


@cache
def field_comments(cls: str) -> dict[str, str]:
    """Name -> comment of each field of a dataclass, those of its bases first.

    The comment of a field stands behind it, or else in the lines above it.

    Args:
        cls: dotted name, such as `emloc.emulators.svd.Svd`; a class that is not found has no
            fields.
    """
    source = find_class(cls)
    return _comments_of(source) if source else {}


def _comments_of(source: ClassSource) -> dict[str, str]:
    explanations: dict[str, str] = {}
    for base in source.bases:
        explanations |= _comments_of(base)
    comments = _comments(source.module.text)
    return explanations | {name: _comment_of(field, comments) for name, field in source.fields}


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
