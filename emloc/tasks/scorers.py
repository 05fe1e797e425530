"""Find the scorer that a task names, and list the names of its scores."""

from __future__ import annotations

from collections.abc import Sequence

from emloc.config.named_class import import_named
from emloc.data.examples import Example
from emloc.errors import ConfigError, one_line
from emloc.tasks import GenerativeTask
from emloc.tasks.metrics import Scorer

_METRICS_PACKAGE = "emloc.tasks.metrics."
# Scorers of this package that have given other scores before, with their versions. Raise the number
# when a scorer changes, so that no earlier score is used again.
_VERSIONS = {"anls": 2}


def find_scorer(name: str) -> Scorer:
    """Import a scorer by its name in this package, such as `anls`, or by a dotted path.

    Raises:
        ConfigError: the module or function does not exist, or it is of other code than this
            package and the plug-ins.
    """
    try:
        attribute = import_named(scorer_path(name))
    except (ImportError, AttributeError) as error:
        raise _scorer_error(name, one_line(error)) from error
    if not callable(attribute):
        raise _scorer_error(name, "it is no function")
    scorer: Scorer = attribute
    return scorer


def scorer_path(name: str) -> str:
    """Dotted path of a scorer; `name` is its name, its path, or its path in earlier releases."""
    if "." not in name:
        return f"{_METRICS_PACKAGE}{name}.score"
    old_package = "emloc.metrics."
    is_old = name.startswith(old_package)
    return _METRICS_PACKAGE + name.removeprefix(old_package) if is_old else name


def scorer_key(name: str) -> str:
    """Name of a scorer in cache keys: its dotted path; for one of this package name and version."""
    path = scorer_path(name)
    if not path.startswith(_METRICS_PACKAGE):
        return path
    short = path.removeprefix(_METRICS_PACKAGE).removesuffix(".score")
    return f"{short}:{_VERSIONS[short]}" if short in _VERSIONS else short


def score_names(task: GenerativeTask, rows: Sequence[Example]) -> list[str]:
    """Names of the scores of `rows` (at least one row): `<score>`, and `<score>/<group>`."""
    first = rows[0]
    names = list(task.score(first.target, first.references, first.choices))
    groups = sorted({row.group for row in rows if row.group})
    return names + [f"{name}/{group}" for name in names for group in groups]


def _scorer_error(name: str, reason: str) -> ConfigError:
    """The error for a setting `task.scorer` that names no scorer."""
    return ConfigError(f"task.scorer={name}: {reason}; set task.scorer=exact or another scorer")
