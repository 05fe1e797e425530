"""Cache of stages: a stage with the same inputs is computed only once.

A stage is a function `work(folder, *inputs, **live) -> facts` that writes files into `folder`. Its
cache key is the digest of its name, its version, the settings of the object that the function is
bound to (if any) and every input (see `emloc.runtime.keys`). The `live` arguments, such as devices
and callbacks, do not change the result and are not part of the key.

An artifact is only used if it agrees with its manifest (`emloc.runtime.manifest`). A damaged
artifact is logged, moved aside and computed again.

If a launch has several processes (`emloc.runtime.distributed`), the first does the work and the
others wait for the artifact. Some stages are computed by all processes together. The processes
communicate through files next to the artifact, not through collectives: a collective times out,
and a stage may take hours.
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
from emloc.runtime.attempts import attempt
from emloc.runtime.digest import digest
from emloc.runtime.distributed import POLL_SECONDS, StatusFile, is_first, world_size
from emloc.runtime.folders import cache_folder
from emloc.runtime.keys import key_of
from emloc.runtime.manifest import DamagedError, flaw_of, seal, set_aside
from emloc.runtime.memory import MemoryPeak
from emloc.runtime.progress import duration

log = logging.getLogger(__name__)

# Version of the layout of artifacts and keys, common to all stages.
LAYOUT = 2

Facts = dict[str, Any]
BoundWork = Callable[[Path], Facts]
# The class of the error to raise, called with stage and message.
Failure = Callable[[str, str], StageError]


class OutOfStepError(StageError):
    """A stage that all processes compute together failed in this process, so the launch must end.

    The other processes may wait in a collective. A further collective of this process could match
    the one that the others wait in.
    """


@dataclass(frozen=True)
class Artifact:
    """The finished result of one stage. The files in its folder never change."""

    stage: str
    key: str
    folder: Path

    @cached_property
    def facts(self) -> Facts:
        """Facts that the stage has returned, with its `seconds` and `peak_gib`."""
        facts: Facts = json.loads(self._facts_file.read_text())
        return facts

    @cached_property
    def finished(self) -> float:
        """When the stage finished, in seconds since 1970."""
        return self._facts_file.stat().st_mtime

    @property
    def _facts_file(self) -> Path:
        return self.folder / "stage.json"

    def opened(self) -> Artifact:
        """Return this artifact with facts that stay known if its folder is deleted from now on."""
        _ = self.facts, self.finished  # read now, and kept
        return self


@dataclass(frozen=True)
class Store:
    """The cache of artifacts: one folder `<root>/<stage>/<key>` for each."""

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
        """Return the artifact of `work` on `inputs`, from the cache or newly computed.

        `version` has to be raised when the meaning of the stage's files changes. It is explicit, so
        that a change can be reviewed, unlike a hash of the code.

        With `together` all processes of a launch call `work` at the same time, each with the same
        arguments. Only the first may write into the folder, and the artifact has its facts. The
        result may depend on the number of processes, which is therefore part of the key.

        `work` writes into the folder `<key>.partial`, which becomes the artifact by one rename. An
        interrupted stage leaves this folder behind, so that the next attempt can resume from it.

        Raises:
            ConfigError: raised by `work`, passed on unchanged.
            StageError: any other error in `work`, such as out of memory.
        """
        bound_to = key_of(getattr(_require_named(work), "__self__", None))
        key = digest([LAYOUT, name, version, bound_to, [key_of(item) for item in inputs]])
        shared = together and world_size() > 1
        if shared:  # more processes make an optimizer step larger
            key = digest([key, world_size()])
        target = self.root / name / key
        if target.exists() and flaw_of(target) is None:
            log.info("%s: taken from the cache (key %s)", name, key)
            return Artifact(name, key, target).opened()
        target.parent.mkdir(parents=True, exist_ok=True)

        def bound_work(draft: Path) -> Facts:
            return work(draft, *inputs, **live)

        failure = OutOfStepError if shared else StageError
        if is_first():
            with FileLock(target.with_suffix(".lock")):
                set_aside_if_damaged(target, name)
                if not target.exists():
                    self._lead(name, target, bound_work, failure)
        else:
            self._follow(name, target, bound_work, failure)
        return Artifact(name, key, target).opened()

    def _lead(self, name: str, target: Path, work: BoundWork, failure: Failure) -> None:
        """Compute the artifact in the first process and report its state to the others."""
        status = StatusFile(target.with_suffix(".notice"))
        # After a failure the other processes have ended, so a second attempt would lack them.
        _raise_failure(name, status)
        status.write("begun")
        try:
            self._compute(name, target, work, failure)
        except ConfigError as error:
            status.write("refused", str(error))
            raise
        except StageError as error:
            status.write("failed", error.args[0].removeprefix(f"{name}: "))
            raise
        status.remove()

    def _follow(self, name: str, target: Path, work: BoundWork, failure: Failure) -> None:
        """Wait for the artifact in another process, and take part in work that all do together."""
        status = StatusFile(target.with_suffix(".notice"))
        takes_part = failure is OutOfStepError
        while not target.exists() or flaw_of(target) is not None:
            _raise_failure(name, status)
            if takes_part and status.read()[0] == "begun":
                log.info("%s: computing (cache key %s)", name, target.name)
                _attempt(name, target.with_suffix(".partial"), work, failure)
                takes_part = False
            time.sleep(POLL_SECONDS)

    def _compute(self, name: str, target: Path, work: BoundWork, failure: Failure) -> None:
        """Run the work on a draft folder, add facts and manifest, and rename it to `target`."""
        log.info("%s: computing (cache key %s)", name, target.name)
        draft = target.with_suffix(".partial")
        draft.mkdir(exist_ok=True)
        with attempt(draft) as spent:
            peak = MemoryPeak()
            try:
                with peak:
                    facts = _attempt(name, draft, work, failure)
            finally:
                spent.peak_gib = max(spent.peak_gib, peak.gib)
        facts |= {"seconds": round(spent.seconds, 3), "peak_gib": spent.peak_gib}
        (draft / "stage.json").write_text(json.dumps(facts, indent=1))
        seal(draft)
        os.replace(draft, target)
        took = duration(facts["seconds"])
        log.info("%s: finished in %s, peak memory %.2f GiB", name, took, facts["peak_gib"])


def set_aside_if_damaged(target: Path, name: str) -> None:
    """Log how a finished folder of the stage `name` is damaged and move it aside, if it is."""
    if target.exists() and (flaw := flaw_of(target)) is not None:
        aside = set_aside(target)
        log.warning(
            "%s: the artifact %s is damaged: %s; moved to %s and computed again",
            *(name, target, flaw, aside.name),
        )


def _require_named(work: Callable[..., Facts]) -> Callable[..., Facts]:
    """Return `work` if it is a method or a function of a module.

    Raises:
        TypeError: `work` is defined inside a function. It may use any variable of that function,
            and the key would not depend on them.
    """
    if not hasattr(work, "__qualname__") or "<" in work.__qualname__:
        name = getattr(work, "__qualname__", type(work).__name__)
        raise TypeError(f"{name} cannot be part of a stage's key")
    return work


def _attempt(name: str, draft: Path, work: BoundWork, failure: Failure) -> Facts:
    """Run the work on the draft folder and turn its errors into those of the stage `name`.

    Raises:
        ConfigError: raised by the work, passed on unchanged.
        DamagedError: an input is damaged, and this process can compute that input again.
        StageError: any other error, created by `failure`.
    """
    try:
        return work(draft)
    except ConfigError:
        raise
    except DamagedError as error:  # the pipeline computes the damaged artifact and this stage again
        if world_size() == 1:
            raise
        if is_first():
            set_aside(error.folder)
        raise failure(
            name, f"{error}; start the run again to compute this artifact again"
        ) from error
    except Exception as error:  # why: the record of any failure has to name the stage
        raise failure(name, f"{type(error).__name__}: {error}") from error


def _raise_failure(name: str, status: StatusFile) -> None:
    """Raise the error of the first process, if the status file reports one.

    Raises:
        ConfigError: the first process has refused the settings.
        StageError: the first process has failed.
    """
    state, text = status.read()
    if state == "refused":
        raise ConfigError(text)
    if state == "failed":
        raise StageError(name, text)


def open_store() -> Store:
    """Return the cache of this machine: the folder `EMLOC_CACHE`, or else `~/.cache/emloc`."""
    return Store(cache_folder())
