"""Processes that have imported all libraries when they start.

A new interpreter needs five seconds of processor time to import them. Here one process imports
them, and all others are forks of it: each runs a module with arguments, environment and output
files of its own. `ForkServer.python` is a program that does the same for `python -m`, so that
launchers and Jupyter start forks, too.
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
import tempfile
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
    *("peft", "hydra.main", "pandas"),
    "transformers.models.llama.modeling_llama",
)
# Modules that `ForkServer.python` runs in a fork. Others inherit open files or name files after
# their own process.
FORKED = (
    *("emloc", "emloc.cost.bench.offload", "ipykernel_launcher", "submitit.core._submit"),
    "torch.distributed.run",
)
# The program that stands for a Python interpreter. It hands a module and its own output to a fork,
# and ends as the fork does. The interpreter runs everything else.
PYTHON = """#!{interpreter} -IS
import os, signal, sys
sys.path[0:0] = [{tests!r}]
from forked import FORKED, ForkRequests
arguments = [one for one in sys.argv[1:] if one != "-u"]
if arguments[0] != "-m" or arguments[1] not in FORKED:
    os.execv({interpreter!r}, [{interpreter!r}, *sys.argv[1:]])
files = [f"/proc/{{os.getpid()}}/fd/{{number}}" for number in (1, 2)]
started = ForkRequests({folder!r}).send(arguments[1:], os.getcwd(), os.environ, files)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: os.kill(started.pid, number))
code = started.wait()
if code < 0:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


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
class ForkRequests:
    """The pipe to a server, in the folder with the files of its forks."""

    folder: str

    def send(
        self, program: Sequence[str], cwd: str, env: Mapping[str, str], files: Sequence[str] = ()
    ) -> ForkedProcess:
        """Start a module with arguments in a fork and return as soon as it runs.

        Its output goes to two given files, or to files of its own.
        """
        place = Path(tempfile.mkdtemp(dir=self.folder))
        files = files or [str(place / name) for name in ("out", "err")]
        request = {"program": [*program], "cwd": cwd, "env": {**env}, "files": [*files]}
        (place / "request").write_text(json.dumps(request))
        with open(f"{self.folder}/requests", "w") as pipe:
            pipe.write(f"{place}\n")
        while not (place / "pid").exists():
            time.sleep(0.002)
        return ForkedProcess(place, int((place / "pid").read_text()))


@dataclass(frozen=True)
class ForkServer:
    """The process that imports the libraries; `folder` has the files of its forks."""

    folder: Path

    @property
    def python(self) -> Path:
        """The program that runs `-m` in a fork."""
        return self.folder / "python"

    def start(self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str]) -> ForkedProcess:
        """Start the command in a fork and return as soon as it runs."""
        return ForkRequests(str(self.folder)).send(["emloc", *arguments], str(cwd), env)


@contextmanager
def fork_server(folder: Path) -> Iterator[ForkServer]:
    """Start a server, whose forks have their files in `folder`, and end it after the block."""
    os.mkfifo(folder / "requests")
    server = ForkServer(folder)
    tests = str(Path(__file__).parent)
    settings = {"interpreter": sys.executable, "tests": tests, "folder": str(folder)}
    server.python.write_text(PYTHON.format(**settings))
    server.python.chmod(0o755)
    with subprocess.Popen([sys.executable, __file__, str(folder)]) as process:
        yield server
        process.terminate()


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


def _serve(folder: Path) -> None:
    """Fork for each request in the pipe of this folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests end the server
    gc.disable()
    for name in LIBRARIES:
        import_module(name)
    # The file system of the tests is local: a result that is not there never comes.
    import_module("submitit").Job._results_timeout_s = 0
    gc.freeze()  # as the command does with what it imports
    gc.enable()
    # Opened for writing as well, it does not end when no other process has it open.
    pipe = os.fdopen(os.open(folder / "requests", os.O_RDWR), "rb", buffering=0)
    for line in pipe:
        if os.fork() == 0:
            pipe.close()
            _keep(Path(line.decode().strip()), folder / "python")
            return
        os.wait()


def _keep(place: Path, python: Path) -> None:
    """Start the requested process, write its process id, and at its end the exit code."""
    if os.fork() > 0:
        os._exit(0)  # the server does not wait for the end of the process
    pid = os.fork()
    if pid == 0:
        _run(json.loads((place / "request").read_text()), python)
        return
    _write(place / "pid", pid)
    _, status = os.waitpid(pid, 0)
    _write(place / "code", os.waitstatus_to_exitcode(status))
    os._exit(0)


def _write(path: Path, number: int) -> None:
    """Write a number to a file that is complete as soon as it is there."""
    draft = path.with_suffix(".draft")
    draft.write_text(str(number))
    draft.rename(path)


def _run(request: Mapping[str, Any], python: Path) -> None:
    """Become the requested process. It ends like any other, with all its exit handlers."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for descriptor, path in enumerate([os.devnull, *request["files"]]):
        opened = os.open(path, flags if descriptor else os.O_RDONLY)
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
    sys.executable = str(python)
    sys.argv = request["program"]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
