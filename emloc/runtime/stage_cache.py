"""Stages cached by content: the same inputs are never worked through twice.

A stage is a function `work(folder, *inputs, **live) -> facts` that writes files into `folder`. Its
key is the digest of its name, the version of its meaning, the settings of the object that the
function is bound to, if any, and every input (`emloc.runtime.keys`). `live` arguments (devices,
progress, loggers) change nothing in the result and are never hashed.

An artifact is believed only whole (`emloc.runtime.manifest`): one that is not is named, moved aside
and made again.

Of several processes started together (`emloc.runtime.distributed`) the first does the work and the
others wait for the artifact, except for work that they do together. They tell each other
through files beside the artifact and never through a collective: those time out, stages take hours.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from emloc.errors import ConfigError, StageError
from emloc.runtime.digest import digest
from emloc.runtime.distributed import LOOK, StatusFile, is_first, world_size
from emloc.runtime.keys import key_of
from emloc.runtime.manifest import DamagedError, flaw_of, seal, set_aside
from emloc.runtime.memory import MemoryPeak
from emloc.runtime.progress import duration

log = logging.getLogger(__name__)

# How artifacts are written and keys are made, whatever the stage.
LAYOUT = 2

Facts = dict[str, Any]
Bound = Callable[[Path], Facts]
Failure = Callable[[str, str], StageError]


class OutOfStepError(StageError):
    """Work of all processes failed in this one, and the others may hang in it: this launch is over.

    A further collective could meet one that was left open.
    """


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

    def stage(
        self,
        name: str,
        work: Callable[..., Facts],
        *inputs: Any,
        version: int = 1,
        together: bool = False,
        **live: Any,
    ) -> Artifact:
        """The artifact of `work` on `inputs`: found if it was ever finished, else computed.

        `version` is raised when the meaning of the stage's files changes: it is explicit and can be
        reviewed, unlike a hash of code.

        With `together` all processes of a launch enter the work at the same time, each with the
        same arguments. Only the first may write into the folder, and the facts are its facts. The
        result may depend on the number of processes, which is therefore in the key.

        The work writes into `<key>.partial`, which becomes the artifact by one rename. An
        interrupted stage leaves that folder behind, and the next attempt finds it as it was.

        Raises:
            ConfigError: as raised by the work, untouched.
            StageError: anything else that went wrong in the work, memory included.
        """
        bound_to = key_of(getattr(_named(work), "__self__", None))
        key = digest([LAYOUT, name, version, bound_to, [key_of(item) for item in inputs]])
        shared = together and world_size() > 1
        if shared:  # the samples of one step are those of all processes
            key = digest([key, world_size()])
        home = self.root / name / key
        if home.exists() and flaw_of(home) is None:
            log.info("%s: taken from the cache (key %s)", name, key)
            return Artifact(name, key, home)
        home.parent.mkdir(parents=True, exist_ok=True)

        def bound(draft: Path) -> Facts:
            return work(draft, *inputs, **live)

        failure = OutOfStepError if shared else StageError
        if is_first():
            with FileLock(home.with_suffix(".lock")):
                set_aside_if_damaged(home, name)
                if not home.exists():
                    self._lead(name, home, bound, failure)
        else:
            self._follow(name, home, bound, failure)
        return Artifact(name, key, home)

    def _lead(self, name: str, home: Path, work: Bound, failure: Failure) -> None:
        """Compute, and let the processes that wait know how it goes."""
        notice = StatusFile(home.with_suffix(".notice"))
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
        notice = StatusFile(home.with_suffix(".notice"))
        to_do = failure is OutOfStepError
        while not home.exists() or flaw_of(home) is not None:
            _pass_on(name, notice)
            if to_do and notice.read()[0] == "begun":
                log.info("%s: computing (cache key %s)", name, home.name)
                _attempt(name, home.with_suffix(".partial"), work, failure)
                to_do = False
            time.sleep(LOOK)

    def _compute(self, name: str, home: Path, work: Bound, failure: Failure) -> None:
        log.info("%s: computing (cache key %s)", name, home.name)
        draft = home.with_suffix(".partial")
        draft.mkdir(exist_ok=True)
        start = time.perf_counter()
        with MemoryPeak() as peak:
            facts = _attempt(name, draft, work, failure)
        facts |= {"seconds": round(time.perf_counter() - start, 3), "peak_gib": peak.gib}
        (draft / "stage.json").write_text(json.dumps(facts, indent=1))
        seal(draft)
        os.replace(draft, home)
        spent = duration(facts["seconds"])
        log.info("%s: finished in %s, peak memory %.2f GiB", name, spent, facts["peak_gib"])


def set_aside_if_damaged(home: Path, name: str) -> None:
    """Say what is wrong with a finished folder, if anything, and move it out of the way."""
    if home.exists() and (flaw := flaw_of(home)) is not None:
        aside = set_aside(home)
        log.warning(
            "%s: the artifact %s is damaged: %s; moved to %s and computed again",
            *(name, home, flaw, aside.name),
        )


def _named(work: Callable[..., Facts]) -> Callable[..., Facts]:
    """The work itself.

    Raises:
        TypeError: it is defined within a function and may hold anything, which no key would show.
    """
    if not hasattr(work, "__qualname__") or "<" in work.__qualname__:
        name = getattr(work, "__qualname__", type(work).__name__)
        raise TypeError(f"{name} cannot be part of a stage's key")
    return work


def _attempt(name: str, draft: Path, work: Bound, failure: Failure) -> Facts:
    try:
        return work(draft)
    except ConfigError:
        raise
    except DamagedError as error:  # whoever runs the stages makes it again, and then this one
        if world_size() == 1:
            raise
        if is_first():
            set_aside(error.folder)
        raise failure(name, f"{error}; start again, and it is made again") from error
    except Exception as error:  # why: whatever it was, the record names the stage
        raise failure(name, f"{type(error).__name__}: {error}") from error


def _pass_on(name: str, notice: StatusFile) -> None:
    """Fail as the first process did, if it did."""
    state, text = notice.read()
    if state == "refused":
        raise ConfigError(text)
    if state == "failed":
        raise StageError(name, text)


def open_store() -> Store:
    """The store of this machine: `EMLOC_CACHE`, else `~/.cache/emloc`."""
    return Store(Path(os.environ.get("EMLOC_CACHE", "~/.cache/emloc")).expanduser())
