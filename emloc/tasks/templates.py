"""Jinja templates and expressions of a task, evaluated on the rows of a data set."""

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

from emloc.errors import ConfigError, one_line
from emloc.tasks.marked_rows import MarkedRow, MissingValue, unmark_missing

# The settings of lm-eval's Jinja environment, so that a template gives the same text in both.
_JINJA = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
_JINJA.tests["none"] = lambda value: value is None or isinstance(value, MissingValue)


def compile_template(field: str, source: str) -> Template:
    """Compile the template in the setting `task.<field>`.

    Raises:
        ConfigError: the template has a syntax error.
    """
    try:
        return _JINJA.from_string(source)
    except TemplateSyntaxError as err:
        raise _syntax_error(field, source, err) from err


def render_template(field: str, template: Template, row: Mapping[str, Any]) -> str:
    """Render the template of the setting `task.<field>` with the columns of a row.

    Raises:
        ConfigError: the template uses a column that the row does not have.
    """
    try:
        return template.render(row)
    except UndefinedError as err:
        raise _evaluation_error(field, str(err.message), row) from err


@dataclass(frozen=True)
class RowExpression:
    """A compiled template or expression over the columns of a row.

    Only the columns that the expression names are read, as other columns may be large. The name
    `row` stands for the whole row, for columns whose names are no identifiers.
    """

    field: str  # name of the setting in `task`
    source: str
    names: frozenset[str]  # names that the expression uses
    function: Callable[[dict[str, Any]], Any]

    def evaluate(self, row: Mapping[str, Any], **extra: Any) -> Any:
        """Value of the expression for one row; `extra` adds names beside the columns.

        Raises:
            ConfigError: a column is missing, or the value does not support an operation.
            MissingValueError: the row has no value in a column that the expression writes.
        """
        row = row if isinstance(row, MarkedRow) else MarkedRow(row)
        columns = {name: row[name] for name in self.names if name in row}
        try:
            value = self.function(columns | {"row": row} | extra)
            if isinstance(value, Undefined):
                str(value)  # raises an error with the missing name
        except (TemplateError, TypeError, ValueError, LookupError) as err:
            raise _evaluation_error(self.field, one_line(err), row) from err
        return unmark_missing(value)

    def evaluate_to_list(self, row: Mapping[str, Any]) -> list[Any]:
        """Value of the expression as a list: [value] for a single value, [] for None."""
        value = self.evaluate(row)
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            return [] if value is None else [value]
        return list(value)


def text_expression(field: str, source: str) -> RowExpression:
    """Compile a Jinja template whose value is a text.

    Raises:
        ConfigError: the template has a syntax error.
    """
    return RowExpression(
        field, source, _variable_names(field, source), compile_template(field, source).render
    )


def value_expression(field: str, source: str) -> RowExpression:
    """Compile a Jinja expression whose value can have any type.

    Raises:
        ConfigError: the expression has a syntax error.
    """
    try:
        function = _JINJA.compile_expression(source, undefined_to_none=False)
    except TemplateSyntaxError as err:
        raise _syntax_error(field, source, err) from err
    return RowExpression(field, source, _variable_names(field, f"{{{{ {source} }}}}"), function)


def _variable_names(field: str, source: str) -> frozenset[str]:
    """Names of the variables that a template reads."""
    try:
        return frozenset(meta.find_undeclared_variables(_JINJA.parse(source)))
    except TemplateSyntaxError as err:
        raise _syntax_error(field, source, err) from err


def _syntax_error(field: str, source: str, err: TemplateSyntaxError) -> ConfigError:
    """The error for a template that Jinja cannot parse."""
    return ConfigError(f"task.{field}: {err.message} in {source!r}; correct task.{field}")


def _evaluation_error(field: str, message: str, row: Mapping[str, Any]) -> ConfigError:
    """The error for a template that cannot be evaluated on a row; lists the row's columns."""
    return ConfigError(
        f"task.{field}: {message}; the columns are {', '.join(row)}; correct task.{field}"
    )
