"""Name the file or tensor of a checkpoint that is damaged, such as half a download.

Libraries report such a file by an error of their own that does not name it, or read it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.errors import ConfigError, one_line

# First bytes of a text that git keeps in place of a large file, until `git lfs pull` fetches it.
_LFS_POINTER = b"version https://git-lfs"
# Bytes of the length that a safetensors file begins with; its header follows.
_LENGTH = 8
# Suffixes of small files that a checkpoint is read from, besides its weights.
_SETTINGS = (".json", ".model", ".txt", ".jinja")
_REMEDY = "download it again, or set model.source to another checkpoint"
# Longest message of a library that an error repeats.
_LONGEST = 200


def check_settings(folder: Path) -> None:
    """Check the small files of a checkpoint: JSON can be parsed, and none is a pointer of git.

    Raises:
        ConfigError: names the file and the flaw.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in _SETTINGS and not path.is_dir():
            stat = _stat(path)
            _check_settings_file(path, *stat)


@lru_cache(maxsize=1024)
def _check_settings_file(path: Path, size: int, modified: int) -> None:
    """Check one file; size and time of modification are the key of the cache."""
    if path.suffix == ".json":
        read_json(path)
    else:
        _refuse_pointer(path)


def read_json(path: Path, remedy: str = _REMEDY) -> Any:
    """Return the content of a JSON file; `remedy` ends the message of an error.

    Raises:
        ConfigError: the file cannot be parsed, or git has a pointer in its place.
    """
    _refuse_pointer(path, remedy)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, error, remedy) from error


def read_index(path: Path) -> dict[str, str]:
    """Return tensor -> file, from the index of a checkpoint in several files.

    Raises:
        ConfigError: the file is no such index.
    """
    index = read_json(path)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise damaged(path, "it has no weight_map")
    return files


def read_header(path: Path, remedy: str = _REMEDY) -> dict[str, Any]:
    """Return name -> entry of each tensor in the header of a safetensors file.

    The file is checked to have all bytes that the header names.

    `remedy` ends the message of an error.

    Raises:
        ConfigError: names the file and the flaw.
    """
    _refuse_pointer(path, remedy)
    size, _ = _stat(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            if _LENGTH + length > size:
                raise damaged(path, f"it has {size} bytes, fewer than its header", remedy)
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        _ = [(entry["dtype"], tuple(entry["shape"])) for entry in entries.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"its header cannot be read ({type(error).__name__})"
        raise damaged(path, reason, remedy) from error
    expected = _LENGTH + length + max(ends, default=0)
    if size != expected:
        raise damaged(path, f"it has {size} of {expected} bytes", remedy)
    return entries


def unfinished_download(folder: Path) -> str:
    """Return a clause about files of this folder whose download was not finished, or ''."""
    local = folder / ".cache" / "huggingface" / "download"
    places = [folder, local, folder.parent.parent / "blobs"]
    count = sum(len([*place.glob("*.incomplete")]) for place in places if place.is_dir())
    return f" (the download of {count} of its files was not finished)" if count else ""


def damaged(path: Path, reason: object, remedy: str = _REMEDY) -> ConfigError:
    """Return the error for a damaged file of a checkpoint."""
    text = one_line(reason, _LONGEST)
    return ConfigError(
        f"{path}: the file is damaged: {text}{unfinished_download(path.parent)}; {remedy}"
    )


@contextmanager
def naming(folder: Path, subject: str) -> Iterator[None]:
    """Turn any error within the block into one that names a checkpoint and its `subject`.

    Raises:
        ConfigError: the block raised an error.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # why: libraries raise errors of any type about a damaged file
        reason = one_line(f"{type(error).__name__}: {error}", _LONGEST)
        raise ConfigError(
            f"{folder}: {subject} cannot be read: {reason}; download its files again, or set "
            "model.source to another checkpoint"
        ) from error


def require_finite(origin: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor of the model has neither NaN nor infinite values.

    Args:
        origin: where the tensor was read from, for the message.
        name: its parameter.
        tensor: its values, in the dtype that the model computes in.

    Raises:
        ConfigError: it has such values.
    """
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return
    # A NaN is both the smallest and the largest value. This reads the tensor once, at the speed of
    # memory, while `isfinite` and sums in float32 take more than ten times as long on a CPU.
    smallest, largest = torch.aminmax(tensor)
    if smallest.isfinite() & largest.isfinite():
        return
    count = int((~tensor.isfinite()).sum())
    raise ConfigError(
        f"{origin}: {name} has NaN or infinite values in {_word(tensor)} ({count} of "
        f"{tensor.numel()}); set model.source to another checkpoint, or model.dtype=bfloat16 or "
        "float32 if the values are too large for float16"
    )


def _word(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _refuse_pointer(path: Path, remedy: str = _REMEDY) -> None:
    """Refuse a text that git keeps in place of the file, and an empty file.

    Raises:
        ConfigError: the file is one of them, or cannot be opened.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise damaged(path, error.strerror or error, remedy) from error
    if start == _LFS_POINTER:
        raise ConfigError(
            f"{path}: git has a pointer in place of this file; run `git lfs pull` in "
            f"{path.parent}, or set model.source to another checkpoint"
        )
    if not start:
        raise damaged(path, "it is empty", remedy)


def _stat(path: Path) -> tuple[int, int]:
    """Size and time of modification of a file.

    Raises:
        ConfigError: it is a link to a file that is missing.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise damaged(path, error.strerror or error) from error
    return stat.st_size, stat.st_mtime_ns
