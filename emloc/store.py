"""Stages cached by content: the same inputs are never worked through twice.

A stage is a function `work(folder, *inputs, **live) -> facts` that writes files into `folder`. Its
key is the digest of its name, the version of its meaning, the function (with the settings of the
object it is bound to) and every input. `live` arguments (devices, progress, loggers) change nothing
in the result and are never hashed.

Of several processes started together (`emloc.ranks`) the first does the work and the others wait
for the artifact, except for work that is marked as done by `all_together`. They tell each other
through files beside the artifact and never through a collective: those time out, stages take hours.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from emloc.digest import digest
from emloc.errors import ConfigError, StageError
from emloc.memory import Peak
from emloc.ranks import LOOK, Notice, first, world_size

log = logging.getLogger(__name__)

# Bumped when the meaning of a stage's files changes: explicit and reviewable, unlike hashing code.
VERSION = {"calibrate": 1, "emulate": 1, "train": 2, "recover": 3, "evaluate": 1}

Facts = dict[str, Any]
Work = TypeVar("Work", bound=Callable[..., Facts])
Bound = Callable[[Path], Facts]
Failure = Callable[[str, str], StageError]


class OutOfStep(StageError):
    """Work of all processes failed in this one, and the others may hang in it: this launch is over.

    A further collective could meet one that was left open.
    """


def all_together(work: Work) -> Work:
    """Mark work that all processes enter at the same time, each with the same arguments.

    Only the first may write into the folder, and the facts are its facts. The result may depend on
    the number of processes, which is therefore in the key.
    """
    work.all_together = True  # type: ignore[attr-defined]
    return work


@dataclass(frozen=True)
class Artifact:
    """The finished result of one stage. Nothing ever writes into its folder again."""

    stage: str
    key: str
    folder: Path

    @cached_property
    def facts(self) -> Facts:
        """What the stage reported, with its `seconds` and `peak_gib`."""
        facts: Facts = json.loads((self.folder / "stage.json").read_text())
        return facts


@dataclass(frozen=True)
class Store:
    """A folder of artifacts, `<root>/<stage>/<key>`."""

    root: Path

    def stage(self, name: str, work: Callable[..., Facts], *inputs: Any, **live: Any) -> Artifact:
        """The artifact of `work` on `inputs`: found if it was ever finished, else computed.

        The work writes into `<key>.partial`, which becomes the artifact by one rename. An
        interrupted stage leaves that folder behind, and the next attempt finds it as it was.

        Raises:
            ConfigError: as raised by the work, untouched.
            StageError: anything else that went wrong in the work, memory included.
        """
        key = digest([name, VERSION[name], key_of(work), [key_of(item) for item in inputs]])
        shared = world_size() > 1 and getattr(work, "all_together", False)
        if shared:  # the samples of one step are those of all processes
            key = digest([key, world_size()])
        home = self.root / name / key
        if home.exists():
            log.info("%s: found (%s)", name, key)
            return Artifact(name, key, home)
        home.parent.mkdir(parents=True, exist_ok=True)

        def bound(draft: Path) -> Facts:
            return work(draft, *inputs, **live)

        failure = OutOfStep if shared else StageError
        if first():
            with FileLock(home.with_suffix(".lock")):
                if not home.exists():
                    self._lead(name, home, bound, failure)
        else:
            self._follow(name, home, bound, failure)
        return Artifact(name, key, home)

    def _lead(self, name: str, home: Path, work: Bound, failure: Failure) -> None:
        """Compute, and let the processes that wait know how it goes."""
        notice = Notice(home.with_suffix(".notice"))
        # The others have heard of a failure, and will not wait for a second attempt.
        _pass_on(name, notice)
        notice.put("begun")
        try:
            self._compute(name, home, work, failure)
        except ConfigError as error:
            notice.put("refused", str(error))
            raise
        except StageError as error:
            notice.put("failed", error.args[0].removeprefix(f"{name}: "))
            raise
        notice.take_down()

    def _follow(self, name: str, home: Path, work: Bound, failure: Failure) -> None:
        """Wait until the first process has made the artifact, taking part where all do."""
        notice = Notice(home.with_suffix(".notice"))
        to_do = failure is OutOfStep
        while not home.exists():
            _pass_on(name, notice)
            if to_do and notice.read()[0] == "begun":
                log.info("%s: working (%s)", name, home.name)
                _attempt(name, home.with_suffix(".partial"), work, failure)
                to_do = False
            time.sleep(LOOK)

    def _compute(self, name: str, home: Path, work: Bound, failure: Failure) -> None:
        log.info("%s: working (%s)", name, home.name)
        draft = home.with_suffix(".partial")
        draft.mkdir(exist_ok=True)
        start = time.perf_counter()
        with Peak() as peak:
            facts = _attempt(name, draft, work, failure)
        facts |= {"seconds": round(time.perf_counter() - start, 3), "peak_gib": peak.gib}
        (draft / "stage.json").write_text(json.dumps(facts, indent=1))
        os.replace(draft, home)


def _attempt(name: str, draft: Path, work: Bound, failure: Failure) -> Facts:
    try:
        return work(draft)
    except ConfigError:
        raise
    except Exception as error:  # why: whatever it was, the record names the stage
        raise failure(name, f"{type(error).__name__}: {error}") from error


def _pass_on(name: str, notice: Notice) -> None:
    """Fail as the first process did, if it did."""
    state, text = notice.read()
    if state == "refused":
        raise ConfigError(text)
    if state == "failed":
        raise StageError(name, text)


def key_of(item: Any) -> Any:
    """The JSON value that stands for `item` in a stage's key.

    Raises:
        TypeError: `item` has no `key`, is no settings dataclass, no function or class of a module
            and no plain value.
    """
    if item is None or isinstance(item, str | int | float | bool):
        return item
    if hasattr(item, "key"):
        return item.key
    if hasattr(item, "__self__"):  # a bound method: the settings of its object decide the result
        return [key_of(item.__self__), item.__name__]
    if callable(item) and hasattr(item, "__qualname__"):
        return _name(item)
    if dataclasses.is_dataclass(item):
        fields = {
            field.name: key_of(getattr(item, field.name)) for field in dataclasses.fields(item)
        }
        return {"class": _name(type(item)), **fields}
    if isinstance(item, dict):
        return {str(name): key_of(value) for name, value in item.items()}
    if isinstance(item, list | tuple):
        return [key_of(value) for value in item]
    raise TypeError(f"{type(item).__name__} cannot be part of a stage's key")


def _name(item: Any) -> str:
    """The dotted name of a function or class. A lambda or a nested one shares its with others."""
    if "<" in item.__qualname__:
        raise TypeError(f"{item.__qualname__} cannot be part of a stage's key")
    return f"{item.__module__}.{item.__qualname__}"


def open_store() -> Store:
    """The store of this machine: `EMLOC_CACHE`, else `~/.cache/emloc`."""
    return Store(Path(os.environ.get("EMLOC_CACHE", "~/.cache/emloc")).expanduser())
