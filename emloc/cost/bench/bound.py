"""Lower bounds of the time of some work: its matrix operations alone, and its bytes from disk."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from emloc.cost.bench.rows import BenchRow, row
from emloc.cost.bench.setting import time_call

# Names in torch of the operations that take their time for arithmetic on matrices.
_MATRIX_OPERATIONS = {
    *("mm", "addmm", "addmm_", "bmm", "baddbmm"),
    *(
        f"_scaled_dot_product_{kind}_attention{end}"
        for kind in ("flash", "efficient", "cudnn")
        for end in ("", "_backward")
    ),
    *("linalg_qr", "linalg_cholesky_ex", "_linalg_eigh"),
    *("cholesky_solve", "linalg_solve_triangular"),
}
_REPEATS = 3  # calls that are timed together
# Target: the time of a build or a pass over the larger of the disk's and the arithmetic's.
MOST_TIMES = 1.25
# Reads that a disk answers at once, and bytes of each.
_READS, _CHUNK = 8, 16 * 2**20


@dataclass(frozen=True)
class TensorSpec:
    """Layout of a tensor among the arguments of an operation."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def random(self, device: torch.device) -> Tensor:
        """Return a random tensor of this layout; integers are zero.

        Square matrices are positive definite, since a decomposition of others may end early.
        """
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        if not self.dtype.is_floating_point:  # such as the seed of a dropout that drops nothing
            return tensor.zero_()
        tensor.normal_()
        if tensor.ndim == 2 and self.shape[0] == self.shape[1]:
            size = self.shape[0]
            symmetric = (tensor + tensor.mT) / (2 * size**0.5)  # eigenvalues within 1.5 of zero
            tensor.copy_(symmetric).diagonal().add_(3)
        return tensor


@dataclass(frozen=True)
class MatrixOperation:
    """One operation on matrices, with the layouts of its arguments in the place of tensors."""

    function: Any  # torch's operator
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    def seconds(self, device: torch.device) -> float:
        """Return the seconds of one call, alone on the device."""
        args, options = tree_map(
            lambda leaf: leaf.random(device) if isinstance(leaf, TensorSpec) else leaf,
            (self.args, dict(self.options)),
        )

        def repeat() -> None:
            for _ in range(_REPEATS):
                self.function(*args, **options)

        self.function(*args, **options)  # the first call loads and initialises libraries
        return time_call(repeat, device) / _REPEATS


Operations = Counter[MatrixOperation]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that counts the operations on matrices, also those of a backward pass in it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Operations = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _MATRIX_OPERATIONS:
            specs, options = tree_map(_spec, (args, kwargs or {}))
            operation = MatrixOperation(func, tuple(specs), tuple(sorted(options.items())))
            self.operations[operation] += 1
        return func(*args, **(kwargs or {}))


def _spec(leaf: Any) -> Any:
    """Return the layout of a tensor, and any other argument as it is."""
    if isinstance(leaf, Tensor):
        return TensorSpec(tuple(leaf.shape), leaf.stride(), leaf.dtype)
    return leaf


def matrix_operations(work: Callable[[], object]) -> Operations:
    """Run some work, and return its operations on matrices with their number."""
    with torch.no_grad(), Recorder() as recorder:
        work()
    return recorder.operations


def seconds_alone(operations: Operations, device: torch.device) -> float:
    """Return the seconds of all operations, each timed alone at its shape."""
    return sum(count * operation.seconds(device) for operation, count in operations.items())


def bounded_rows(
    benchmark: str,
    what: str,
    seconds: float,
    disk: float,
    alone: float,
    *,
    whose: str = "its",
    is_target: bool,
) -> Iterator[BenchRow]:
    """Yield the time of some work beside its bounds.

    Args:
        benchmark: its name.
        what: the work.
        seconds: the time of it.
        disk: seconds of its bytes at the rate of the disk.
        alone: seconds of its operations, each timed alone.
        whose: the owner of these operations, if that is only a part of the work.
        is_target: whether the time may be at most `MOST_TIMES` the larger bound.
    """
    least = 1 / MOST_TIMES if is_target else None
    for bound, peer, least_ratio in (
        ("its bytes over the disk's rate", disk, None),
        (f"{whose} operations alone", alone, None),
        ("the larger of both", max(disk, alone), least),
    ):
        yield row(
            *(benchmark, f"{what}, and {bound}", "s", seconds), peer=peer, least_ratio=least_ratio
        )


def drop_cached(files: Sequence[Path]) -> None:
    """Make the system forget the content of files, so that the next read is one of the disk."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(files: Sequence[Path]) -> float:
    """Return the bytes per second that the disk reads of some files, which must not be empty."""
    drop_cached(files)
    chunks = list(
        chain.from_iterable(
            ((path, start) for start in range(0, path.stat().st_size, _CHUNK)) for path in files
        )
    )
    with ThreadPoolExecutor(_READS) as threads:
        seconds = time_call(lambda: list(threads.map(_read, chunks)), torch.device("cpu"))
    return sum(path.stat().st_size for path in files) / seconds


def _read(chunk: tuple[Path, int]) -> None:
    """Read one chunk of a file."""
    path, start = chunk
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        file.readinto(bytearray(_CHUNK))
