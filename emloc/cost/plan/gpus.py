"""GPUs one may want to plan for: what their makers say of them, dense rates."""

from __future__ import annotations

from dataclasses import dataclass

from emloc.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One device; rates in 10^12 a second."""

    memory_gib: float
    bf16: float  # products and sums, 16-bit factors
    fp64: float  # likewise, 64-bit, by tensor cores where it has any for them
    bandwidth: float  # bytes


GPUS = {
    "rtx3090": Gpu(24, 71, 0.56, 0.94),
    "rtx4090": Gpu(24, 165, 1.3, 1.0),
    "rtx5090": Gpu(32, 210, 1.6, 1.8),
    "l40s": Gpu(48, 362, 1.4, 0.86),
    "a100": Gpu(80, 312, 19.5, 2.0),
    "h100": Gpu(80, 989, 67, 3.35),
    "h200": Gpu(140, 989, 67, 4.8),
}


def gpu_called(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        ConfigError: it is none of these.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: one of {', '.join(GPUS)}")
    return GPUS[name]
