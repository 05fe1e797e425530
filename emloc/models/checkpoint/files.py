"""The files of a checkpoint: which of them hold the weights, and what each one contains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from emloc.errors import ConfigError
from emloc.models.checkpoint.damaged import (
    read_header,
    read_index,
    read_json,
    unfinished_download,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Weights that other tools write; reading the first two would run code that they contain.
_OTHER_WEIGHTS = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.safetensors",
    "*.gguf",
    "*.msgpack",
    "*.h5",
)
# Dtypes in the words of safetensors.
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, as the header of the file describes it."""

    file: Path
    name: str
    dtype: str  # in the words of safetensors: F32, BF16, F8_E4M3
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype in torch; None if torch has none of this name."""
        return _DTYPES.get(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, if torch has the dtype.

        Raises:
            ValueError: torch has no such dtype.
        """
        if self.torch_dtype is None:
            raise ValueError(f"{self.name}: torch has no dtype {self.dtype}")
        return math.prod(self.shape) * self.torch_dtype.itemsize


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights in a checkpoint's folder, as `from_pretrained` selects them.

    A file that config.json names comes first, then `model.safetensors`, then the files in the
    index.

    Raises:
        ConfigError: the folder has no such file, or one that the index names is missing.
    """
    named_file = _named_file(folder)
    if named_file is not None and Path(named_file).name != named_file:
        raise ConfigError(
            f"{folder}: config.json: transformers_weights={named_file} is no file of this folder; "
            "set model.source to another checkpoint"
        )
    path = _first_file(folder, named_file)
    if path is None:
        raise ConfigError(f"{folder}: {_absence(folder, named_file)}")
    if path.suffix != ".json":
        return [path]
    shards = sorted(set(read_index(path).values()))
    missing = [name for name in shards if not (folder / name).exists()]
    if missing:
        raise ConfigError(
            f"{folder}: shard {missing[0]} is missing{unfinished_download(folder)}; "
            "set model.source to a complete checkpoint"
        )
    return [folder / name for name in shards]


def has_weight_files(folder: Path) -> bool:
    """Whether the folder has weights; a folder for planning may have none."""
    return _first_file(folder, _named_file(folder)) is not None


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The tensors in a safetensors file; only the file's header is read.

    Raises:
        ConfigError: the file is damaged or incomplete.
    """
    entries = read_header(path)
    # The tensors are at the end of the file, and their offsets count from the first of them.
    start = path.stat().st_size - max((e["data_offsets"][1] for e in entries.values()), default=0)
    return [
        StoredTensor(path, name, one["dtype"], tuple(one["shape"]), start + one["data_offsets"][0])
        for name, one in entries.items()
    ]


def _named_file(folder: Path) -> str | None:
    """The file of weights that config.json names; None if it names none."""
    path = folder / "config.json"
    settings = read_json(path) if path.exists() else {}
    named_file: str | None = settings.get("transformers_weights")
    return named_file


def _first_file(folder: Path, named_file: str | None) -> Path | None:
    """The file with the weights or their index; None if there is none."""
    names = [named_file] if named_file else [SINGLE, INDEX]
    return next((folder / name for name in names if (folder / name).exists()), None)


def _absence(folder: Path, named_file: str | None) -> str:
    """Why a folder has no weights to read, and what to do about it."""
    others = [path.name for pattern in _OTHER_WEIGHTS for path in sorted(folder.glob(pattern))]
    if not others:
        return (
            f"no {named_file or SINGLE}{unfinished_download(folder)}; "
            "set model.source to a checkpoint folder"
        )
    return (
        f"no {named_file or SINGLE}, only {others[0]}, which is not read; load it once with "
        "transformers and write it with save_pretrained, then set model.source to the new folder"
    )
