"""What a task makes of a row: Jinja templates, and expressions whose value is more than text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import (
    Environment,
    StrictUndefined,
    Template,
    TemplateError,
    TemplateSyntaxError,
    Undefined,
    UndefinedError,
    meta,
)

from emloc.errors import ConfigError

# lm-eval's own settings, so that a template means the same text in both places.
_JINJA = Environment(undefined=StrictUndefined, keep_trailing_newline=True)


def compile_template(field: str, source: str) -> Template:
    """The template of `field`; a syntax error becomes a ConfigError that names the field."""
    try:
        return _JINJA.from_string(source)
    except TemplateSyntaxError as err:
        raise _misspelt(field, source, err) from err


def render_template(field: str, template: Template, row: Mapping[str, Any]) -> str:
    """One row through a template; an unknown column is refused, never rendered as nothing."""
    try:
        return template.render(row)
    except UndefinedError as err:
        raise _wrong(field, str(err.message), row) from err


@dataclass(frozen=True)
class RowExpression:
    """A template or an expression of a task, and the names of all that it reads.

    Only the columns it names are taken from a row: others may be large. `row` is the whole row, for
    columns whose names are no identifiers.
    """

    field: str
    source: str
    reads: frozenset[str]
    work: Callable[[dict[str, Any]], Any]

    def of(self, row: Mapping[str, Any], **further: Any) -> Any:
        """Its value for one row, in which `further` names stand beside the columns.

        Raises:
            ConfigError: it names a column that is not there, or asks for what a value cannot do.
        """
        seen = {name: row[name] for name in self.reads if name in row}
        try:
            value = self.work(seen | {"row": row} | further)
            if isinstance(value, Undefined):
                str(value)  # raises, and says what is missing
        except (TemplateError, TypeError, ValueError, LookupError) as err:
            raise _wrong(self.field, " ".join(str(err).split()), row) from err
        return value

    def values(self, row: Mapping[str, Any]) -> list[Any]:
        """Its value as a list: of one element where it is no list, of none where it is None."""
        value = self.of(row)
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            return [] if value is None else [value]
        return list(value)


def template(field: str, source: str) -> RowExpression:
    """The text that a row gives.

    Raises:
        ConfigError: a syntax error.
    """
    return RowExpression(
        field, source, _names(field, source), compile_template(field, source).render
    )


def expression(field: str, source: str) -> RowExpression:
    """The value that a row gives, of any type.

    Raises:
        ConfigError: a syntax error.
    """
    try:
        work = _JINJA.compile_expression(source, undefined_to_none=False)
    except TemplateSyntaxError as err:
        raise _misspelt(field, source, err) from err
    return RowExpression(field, source, _names(field, f"{{{{ {source} }}}}"), work)


def _names(field: str, source: str) -> frozenset[str]:
    try:
        return frozenset(meta.find_undeclared_variables(_JINJA.parse(source)))
    except TemplateSyntaxError as err:
        raise _misspelt(field, source, err) from err


def _misspelt(field: str, source: str, err: TemplateSyntaxError) -> ConfigError:
    return ConfigError(f"task.{field}: {err.message} in {source!r}; correct task.{field}")


def _wrong(field: str, message: str, row: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        f"task.{field}: {message}; the columns are {', '.join(row)}; correct task.{field}"
    )
