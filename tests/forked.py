"""Processes that run the command and have imported all libraries when they start.

A new interpreter needs five seconds of processor time to import them. Here one process imports
them, and all others are forks of it: each runs `python -m emloc` with arguments, environment and
output files of its own.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

# The last one contains the layers of the tiny models.
LIBRARIES = (
    *("emloc.cli", "emloc.pipeline", "emloc.sweeps.job", "emloc.stages.training.trainer"),
    *("emloc.stages.evaluation.evaluate", "emloc.report.run_table", "accelerate", "datasets"),
    *("peft", "hydra.main", "transformers.models.llama.modeling_llama"),
)


@dataclass(frozen=True)
class ForkedProcess:
    """A process whose output and exit code are files in `folder`."""

    folder: Path
    pid: int

    def poll(self) -> int | None:
        """Return the exit code, which is negative after a signal; None while the process runs."""
        path = self.folder / "code"
        return int(path.read_text()) if path.exists() else None

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self.poll() is not None

    def wait(self) -> int:
        """Wait for the end of the process and return its exit code."""
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    def terminate(self) -> None:
        """Ask the process to end, unless it has ended."""
        if not self.ended:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def read(self, stream: str) -> str:
        """Return what the process has written to `out` or `err`."""
        return (self.folder / stream).read_text()


@dataclass(frozen=True)
class ForkServer:
    """The process that imports the libraries, and a folder for the files of its forks."""

    process: subprocess.Popen[str]
    folder: Path

    def start(self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str]) -> ForkedProcess:
        """Start the command in a fork and return as soon as it runs."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        place = self.folder / str(len(list(self.folder.iterdir())))
        place.mkdir()
        request = {"place": str(place), "arguments": arguments, "cwd": str(cwd), "env": {**env}}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return ForkedProcess(place, int(self.process.stdout.readline()))


@contextmanager
def fork_server(folder: Path) -> Iterator[ForkServer]:
    """Start a server, whose forks have their files in `folder`, and end it after the block."""
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield ForkServer(process, folder)


def launch_variables(count: int) -> list[dict[str, str]]:
    """Return the environment variables that `torchrun` gives to `count` processes of one launch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": port},
        **{"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _serve() -> None:
    """Fork for each request in standard input; the server itself ends when the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests end the server
    gc.disable()
    for name in LIBRARIES:
        import_module(name)
    # The file system of the tests is local: a result that is not there never comes.
    import_module("submitit").Job._results_timeout_s = 0
    gc.freeze()  # as the command does with what it imports
    gc.enable()
    for line in sys.stdin:
        request = json.loads(line)
        told, tell = os.pipe()
        if os.fork() == 0:
            _keep(request, tell)
            return
        os.close(tell)
        with os.fdopen(told) as pipe:
            print(pipe.read(), flush=True)
        os.wait()


def _keep(request: Mapping[str, Any], tell: int) -> None:
    """Start the command, tell its process id, and write its exit code."""
    if os.fork() > 0:
        os._exit(0)  # the server does not wait for the end of the command
    pid = os.fork()
    if pid == 0:
        os.close(tell)
        _run(request)
        return
    os.write(tell, str(pid).encode())
    os.close(tell)
    _, status = os.waitpid(pid, 0)
    place = Path(request["place"])
    (place / "draft").write_text(str(os.waitstatus_to_exitcode(status)))
    (place / "draft").rename(place / "code")
    os._exit(0)


def _run(request: Mapping[str, Any]) -> None:
    """Become the requested process. It ends like any other, with all its exit handlers."""
    files = {0: os.devnull, 1: f"{request['place']}/out", 2: f"{request['place']}/err"}
    for descriptor, path in files.items():
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])

    import datasets

    from emloc.runtime import distributed

    # What these modules read when they are imported.
    datasets.config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"]
    distributed._IMPORTED = time.time()
    sys.argv = ["emloc", *request["arguments"]]
    runpy.run_module("emloc", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
