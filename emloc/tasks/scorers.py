"""The scorer that a task names, and what its scores are called."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from emloc.data.examples import Example
from emloc.errors import ConfigError
from emloc.tasks import GenerativeTask
from emloc.tasks.metrics import Scorer

_HOME = "emloc.tasks.metrics."


def named_scorer(path: str) -> Scorer:
    """One of the package's scorers by its name, such as `anls`, or the function at a dotted path.

    Raises:
        ConfigError: there is none.
    """
    module, _, name = dotted(path).rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise _none(path, " ".join(str(error).split())) from error
    if not callable(found):
        raise _none(path, "it is no function")
    scorer: Scorer = found
    return scorer


def dotted(scorer: str) -> str:
    """The dotted path of a scorer that is called by its name, or that lay elsewhere before."""
    if "." not in scorer:
        return f"{_HOME}{scorer}.score"
    before = "emloc.metrics."
    return _HOME + scorer.removeprefix(before) if scorer.startswith(before) else scorer


def called(scorer: str) -> str:
    """What a scorer is called in keys: by its name where it is one of the package's."""
    path = dotted(scorer)
    return path.removeprefix(_HOME).removesuffix(".score") if path.startswith(_HOME) else path


def score_names(task: GenerativeTask, rows: Sequence[Example]) -> list[str]:
    """What the scores of these rows, one at least, are called: of all, and `<score>/<group>`."""
    first = rows[0]
    names = list(task.score(first.target, first.references, first.choices))
    groups = sorted({row.group for row in rows if row.group})
    return names + [f"{name}/{group}" for name in names for group in groups]


def _none(path: str, reason: str) -> ConfigError:
    return ConfigError(f"task.scorer={path}: {reason}; set task.scorer=exact or another")
