"""The command as a test types it: within this process, or in one of its own."""

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
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins

from emloc import cli
from emloc.runtime import distributed as ranks
from emloc.runtime import quiet_libraries as quiet


@dataclass
class Ran:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


@dataclass
class Command:
    """`emloc`, run in `folder`."""

    folder: Path
    capture: Callable[[], pytest.CaptureFixture[str]]

    def __call__(self, *arguments: str, **env: str) -> Ran:
        """Run it within this process, which is left as it was; with these environment variables."""
        written = self.capture()
        written.readouterr()
        with ExitStack() as stack:
            for kept in (_environment, _launch, _hydra, _logging, _libraries):
                stack.enter_context(kept())
            os.environ |= env
            os.chdir(self.folder)
            sys.argv = ["emloc", *arguments]
            code = _exit_code(cli.main)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        return Ran(code, *written.readouterr())

    def process(
        self,
        *arguments: str,
        program: tuple[str, ...] = (sys.executable, "-m", "emloc"),
        **env: str,
    ) -> Ran:
        """Run `program` in a process of its own, where that is what the test is about."""
        ended = subprocess.run(
            [*program, *arguments],
            cwd=self.folder,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
        )
        return Ran(ended.returncode, ended.stdout, ended.stderr)


def _exit_code(main: Callable[[], None]) -> int:
    """The code that Python would end with behind `main`."""
    try:
        main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception:  # why: as Python does, whatever it is
        traceback.print_exc()
        return 1
    return 0


@contextmanager
def _environment() -> Iterator[None]:
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
    """Whatever was recorded before a command is of an earlier one."""
    born = ranks._IMPORTED
    ranks._IMPORTED = time.time()
    ranks.process_start.cache_clear()
    try:
        yield
    finally:
        ranks._IMPORTED = born
        ranks.process_start.cache_clear()


@contextmanager
def _hydra() -> Iterator[None]:
    """A command begins without Hydra at work, and what it registers is forgotten."""
    Plugins.instance()  # which register their settings once in a process
    store, config = ConfigStore.instance(), HydraConfig.instance()
    repository, composed = _copy(store.repo), config.cfg
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        store.repo, config.cfg = repository, composed


def _copy(tree: Any) -> Any:
    """The tree with folders of its own and the same leaves."""
    return {name: _copy(one) for name, one in tree.items()} if isinstance(tree, dict) else tree


@contextmanager
def _logging() -> Iterator[None]:
    """Hydra takes all handlers away and puts up its own."""
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
            logger.setLevel(level)
        logging.disable(disabled)


@contextmanager
def _libraries() -> Iterator[None]:
    """What they say and which bars they draw, which `emloc.runtime.quiet_libraries` decides for a
    whole process.
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
