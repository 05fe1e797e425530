"""Provenance of a result: commit, package versions and device."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("emloc", "torch", "transformers", "peft", "datasets", "lm-eval", "hydra-core")


def provenance() -> dict[str, Any]:
    """Return commit, package versions and device as JSON values; commit is None without git."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": _device(),
    }


def _version(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device() -> str:
    """Return the name of the GPU, or the architecture and core count of the CPU."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} CPU, {cores} cores"


def _git(*command: str) -> str | None:
    """Return the output of a git command on this checkout; None if the command fails."""
    try:
        process = subprocess.run(
            ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()
