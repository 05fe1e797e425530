"""The processes of a launch: `torchrun` and `accelerate launch` start several of them together.

Rank and world size come from the environment variables that the launchers set. This module does
not import torch at the top level, since the command line uses it and has to start quickly.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from emloc.errors import ConfigError
from emloc.runtime.atomic import write_json
from emloc.runtime.digest import digest

if TYPE_CHECKING:
    import torch

# Seconds between two checks of a file that another process writes.
POLL_SECONDS = 0.1

# Variables that differ between launches that run at the same time. Launches one after the other may
# have equal variables; `process_start` tells them apart.
_LAUNCH_VARIABLES = (
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "MASTER_ADDR",
    "MASTER_PORT",
)

_IMPORTED = time.time()


def rank() -> int:
    """Rank of this process in its launch; rank 0 writes the records and artifacts."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes in this launch; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this process has rank 0, which works for all processes of the launch."""
    return rank() == 0


def launch_id() -> str:
    """Identifier of this launch, equal in all of its processes."""
    return digest([os.environ.get(name) for name in _LAUNCH_VARIABLES])


@cache
def process_start() -> float:
    """Return when this process was started (seconds since 1970).

    Status files with an older time belong to an earlier launch and are ignored.
    """
    # Processes of one launch import this module seconds apart, and the first may write a status
    # file before the others import it. They use the start time that the system reports. This time
    # can be early by up to a second, which does no harm, since no launch follows another so fast.
    # A process without a launcher can, so it uses the exact time of the import.
    return _IMPORTED if world_size() == 1 else psutil.Process().create_time()


@dataclass(frozen=True)
class StatusFile:
    """A file through which the first process tells the others of its launch the state of its work.

    One process writes the file and the others read it, on one machine or a shared file system.
    """

    path: Path

    def write(self, state: str, text: str = "") -> None:
        """Replace the state and its text. A process without a launcher writes nothing."""
        if world_size() > 1:
            write_json(self.path, [launch_id(), time.time(), state, text])

    def read(self) -> tuple[str, str]:
        """Return state and text; both are empty if this launch has not written the file."""
        try:
            launch, time_written, state, text = json.loads(self.path.read_text())
        except FileNotFoundError:
            return "", ""
        is_current = launch == launch_id() and time_written >= process_start()
        return (state, text) if is_current else ("", "")

    def remove(self) -> None:
        """Delete the file, if it exists."""
        self.path.unlink(missing_ok=True)


def is_sharded() -> bool:
    """Return whether training shards weights over the processes (FSDP, set in accelerate).

    Raises:
        ConfigError: accelerate is set to the first version of FSDP, whose flat parameters cannot
            mix frozen and trained weights of two dtypes.
    """
    is_requested = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if is_requested and os.environ.get("FSDP_VERSION") != "2":
        raise ConfigError(
            f"FSDP_VERSION={os.environ.get('FSDP_VERSION')}: only FSDP2 is supported; "
            "launch with --fsdp_version 2, or set FSDP_VERSION=2"
        )
    return is_requested and world_size() > 1


def own_device() -> torch.device:
    """Return the device of this process: its GPU, or the CPU on a machine without GPU.

    Each process of a launch uses the GPU of its local rank, which becomes the current one. A
    process without a launcher uses the current GPU, which `emloc.runtime.gpu_lock` selects.

    Raises:
        ConfigError: this machine has more processes than GPUs.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    if world_size() == 1:
        return torch.device("cuda", torch.cuda.current_device())
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU, the number of GPUs is {gpus}; "
            f"set --nproc-per-node {gpus}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def silence_other_processes() -> None:
    """Stop the log of all processes but the first, except for their warnings on the screen."""
    if is_first():
        return
    logging.disable(logging.INFO)
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, logging.FileHandler)]:
        root.removeHandler(handler)
        handler.close()


def wait_for_everyone(device: torch.device) -> None:
    """Wait until all processes of the launch are here; `device` is that of their trainings."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu").wait_for_everyone()


def first_does(done: Path, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Let the first process of a launch do some work, and return what it has written to `done`.

    Raises:
        RuntimeError: the first process has failed.
    """
    status = StatusFile(done.with_suffix(".notice"))
    if is_first() and not done.exists():
        try:
            facts = work()
        except BaseException as error:
            status.write("failed", f"{type(error).__name__}: {error}")
            raise
        done.parent.mkdir(parents=True, exist_ok=True)
        write_json(done, facts)
    while not done.exists():
        state, text = status.read()
        if state == "failed":
            raise RuntimeError(text)
        time.sleep(POLL_SECONDS)
    result: dict[str, Any] = json.loads(done.read_text())
    return result
