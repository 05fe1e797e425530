"""Run the command `emloc` from a test: in this process, in a fork, or in a process of its own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import tqdm
import transformers
from forked import ForkedProcess, ForkServer, launch_variables
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins

from emloc import cli
from emloc.runtime import distributed as ranks
from emloc.runtime import quiet_libraries as quiet


@dataclass
class CommandResult:
    """Exit code and output of a finished command."""

    code: int
    out: str
    err: str

    @property
    def output(self) -> str:
        """Standard output followed by standard error."""
        return self.out + self.err


@dataclass
class Command:
    """The command `emloc`, started in `folder`.

    `capture` provides its output in this process, and `server` starts its forks.
    """

    folder: Path
    capture: Callable[[], pytest.CaptureFixture[str]]
    server: Callable[[], ForkServer]

    def __call__(self, *arguments: str, **env: str) -> CommandResult:
        """Run the command in this process with further environment variables `env`.

        All global state of the process is restored afterwards.
        """
        capture = self.capture()
        capture.readouterr()  # drops earlier output
        with ExitStack() as stack:
            for restore in (_environment, _launch, _hydra, _logging, _libraries):
                stack.enter_context(restore())
            os.environ |= env
            os.chdir(self.folder)
            sys.argv = ["emloc", *arguments]
            code = _exit_code(cli.main)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        return CommandResult(code, *capture.readouterr())

    def start(self, *arguments: str, **env: str) -> ForkedProcess:
        """Start the command in a process that is a fork, so that it has its imports already."""
        return self.server().start(arguments, self.folder, {**os.environ, **env})

    def fork(self, *arguments: str, **env: str) -> CommandResult:
        """Run the command in a process that is a fork."""
        process = self.start(*arguments, **env)
        return CommandResult(process.wait(), process.read("out"), process.read("err"))

    def start_two(self, *arguments: str, **env: str) -> list[ForkedProcess]:
        """Start the command in two processes of one launch, as `torchrun` does."""
        return [self.start(*arguments, **env, **variables) for variables in launch_variables(2)]

    def two(self, *arguments: str, **env: str) -> CommandResult:
        """Run the command in two processes of one launch.

        If one of them fails, the other one is terminated. The exit code is that of the first
        process to fail, and the output is that of both.
        """
        processes = self.start_two(*arguments, **env)
        while not (any(one.poll() for one in processes) or all(one.ended for one in processes)):
            time.sleep(0.02)
        failures = [code for one in processes if (code := one.poll())]
        for one in processes if failures else ():
            one.terminate()
        for one in processes:
            one.wait()
        code = failures[0] if failures else 0
        out, err = ("".join(one.read(name) for one in processes) for name in ("out", "err"))
        return CommandResult(code, out, err)

    def process(
        self,
        *arguments: str,
        program: tuple[str, ...] = (sys.executable, "-m", "emloc"),
        **env: str,
    ) -> CommandResult:
        """Run `program` in a process of its own, for tests about the process itself."""
        process = subprocess.run(
            [*program, *arguments],
            cwd=self.folder,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
        )
        return CommandResult(process.returncode, process.stdout, process.stderr)


def _exit_code(main: Callable[[], None]) -> int:
    """Call `main` and return the exit code that the Python process would end with."""
    try:
        main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception:  # why: Python, too, prints any exception and exits with 1
        traceback.print_exc()
        return 1
    return 0


@contextmanager
def _environment() -> Iterator[None]:
    """Restore environment variables, current folder and command line."""
    variables, folder, arguments = dict(os.environ), Path.cwd(), sys.argv
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        os.chdir(folder)
        sys.argv = arguments


@contextmanager
def _launch() -> Iterator[None]:
    """Reset the start time of the process, so that each command counts as a new launch.

    Status files written before the start time belong to an earlier launch.
    """
    imported = ranks._IMPORTED
    ranks._IMPORTED = time.time()
    ranks.process_start.cache_clear()
    try:
        yield
    finally:
        ranks._IMPORTED = imported
        ranks.process_start.cache_clear()


@contextmanager
def _hydra() -> Iterator[None]:
    """Start without an active Hydra, and remove all that the command registers with Hydra."""
    Plugins.instance()  # plugins register their settings only once in a process
    store, config = ConfigStore.instance(), HydraConfig.instance()
    repository, composed = _copy(store.repo), config.cfg
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        store.repo, config.cfg = repository, composed


def _copy(tree: Any) -> Any:
    """Copy nested dictionaries; values that are no dictionaries are shared with the original."""
    return {name: _copy(one) for name, one in tree.items()} if isinstance(tree, dict) else tree


@contextmanager
def _logging() -> Iterator[None]:
    """Restore the logging handlers and levels, which Hydra replaces."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    loggers = [root, *(one for one in root.manager.loggerDict.values() if hasattr(one, "handlers"))]
    before = [(one, list(one.handlers), one.level, one.disabled) for one in loggers]
    try:
        yield
    finally:
        for handler in {*root.handlers} - {*before[0][1]}:
            handler.close()
        for logger, handlers, level, off in before:
            logger.handlers[:], logger.disabled = handlers, off
            if logger.level != level:  # each change of a level looks at all loggers
                logger.setLevel(level)
        logging.disable(disabled)


@contextmanager
def _libraries() -> Iterator[None]:
    """Restore log levels and progress bars of the libraries.

    `emloc.runtime.quiet_libraries` changes these for the whole process.
    """
    begin, bars = tqdm.tqdm.__init__, datasets.is_progress_bar_enabled()
    hub, models = huggingface_hub.logging.get_verbosity(), transformers.logging.get_verbosity()
    quiet._draw_no_bars.cache_clear()
    try:
        yield
    finally:
        tqdm.tqdm.__init__ = begin
        quiet._draw_no_bars.cache_clear()
        huggingface_hub.logging.set_verbosity(hub)
        transformers.logging.set_verbosity(models)
        (datasets.enable_progress_bars if bars else datasets.disable_progress_bars)()
