"""Which process this is of those that `torchrun` or `accelerate launch` started together.

Everything is read from the environment they set. Imports no torch: the command line asks, too.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from emloc.errors import ConfigError
from emloc.runtime.atomic import write_json
from emloc.runtime.digest import digest

if TYPE_CHECKING:
    import torch

# Seconds between two looks at what another process has written.
LOOK = 0.1

# What tells two launches apart that run at the same time; for those one after the other see `born`.
_LAUNCH = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")

_IMPORTED = time.time()


def rank() -> int:
    """Number of this process among all; 0 is the one that keeps the records."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process keeps the records, and does what is done once for all."""
    return rank() == 0


def launch_id() -> str:
    """The same word in all processes that were started together."""
    return digest([os.environ.get(name) for name in _LAUNCH])


@cache
def process_start() -> float:
    """When this process was started (seconds since 1970): what was written before is of another
    launch.
    """
    # Processes of one launch import this up to seconds apart, when the first may have said
    # something. The system's word is the same for all, but early by up to a second, in which a
    # launch cannot follow another, as one process alone can.
    return _IMPORTED if world_size() == 1 else psutil.Process().create_time()


@dataclass(frozen=True)
class StatusFile:
    """A file in which the first process tells the others of its launch how something goes.

    Written by one process, read by many, on one machine or through a shared file system.
    """

    path: Path

    def put(self, state: str, text: str = "") -> None:
        """Say how it goes, in place of what was said before. One process alone says nothing."""
        if world_size() > 1:
            write_json(self.path, [launch_id(), time.time(), state, text])

    def read(self) -> tuple[str, str]:
        """State and text; both empty where nothing was said in this launch."""
        try:
            of, when, state, text = json.loads(self.path.read_text())
        except FileNotFoundError:
            return "", ""
        return (state, text) if of == launch_id() and when >= process_start() else ("", "")

    def take_down(self) -> None:
        """There is nothing more to say."""
        self.path.unlink(missing_ok=True)


def sharded() -> bool:
    """Whether training splits the weights over the processes (FSDP, by accelerate's settings).

    Raises:
        ConfigError: it is FSDP's first version, whose flat parameters cannot mix frozen and
            trained weights of two types.
    """
    on = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if on and os.environ.get("FSDP_VERSION") != "2":
        raise ConfigError(
            f"FSDP_VERSION={os.environ.get('FSDP_VERSION')}: only FSDP2 is supported; "
            "launch with --fsdp_version 2, or set FSDP_VERSION=2"
        )
    return on and world_size() > 1


def own_device() -> torch.device:
    """The GPU of this process, made the current one, or the CPU where there is none.

    Of processes started together each has the one of its rank; one alone has the current one, which
    `emloc.runtime.gpu_lock` decides.

    Raises:
        ConfigError: more processes than GPUs were started on this machine.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    if world_size() == 1:
        return torch.device("cuda", torch.cuda.current_device())
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise ConfigError(
            f"process {local} of this machine has no GPU, there is {there}; "
            f"set --nproc-per-node {there}"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def silence_other_processes() -> None:
    """Leave the screen and the log file to the first process, warnings on the screen apart."""
    if is_first():
        return
    logging.disable(logging.INFO)
    root = logging.getLogger()
    for handler in [one for one in root.handlers if isinstance(one, logging.FileHandler)]:
        root.removeHandler(handler)
        handler.close()
