"""GPUs that `emloc plan` knows, with the makers' figures for dense arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from emloc.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """A GPU model; rates are in 10^12 per second."""

    memory_gib: float
    bf16: float  # floating-point operations with bfloat16 operands
    fp64: (
        float  # floating-point operations in float64, on tensor cores if the GPU has some for them
    )
    bandwidth: float  # bytes that are read from or written to device memory
    host_link: float  # bytes that come from pinned host memory: 16 lanes of PCIe 4 or 5


GPUS = {
    "rtx3090": Gpu(24, 71, 0.56, 0.94, 0.025),
    "rtx4090": Gpu(24, 165, 1.3, 1.0, 0.025),
    "rtx5090": Gpu(32, 210, 1.6, 1.8, 0.05),
    "l40s": Gpu(48, 362, 1.4, 0.86, 0.025),
    "a100": Gpu(80, 312, 19.5, 2.0, 0.025),
    "h100": Gpu(80, 989, 67, 3.35, 0.05),
    "h200": Gpu(140, 989, 67, 4.8, 0.05),
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU called `name`.

    Raises:
        ConfigError: no GPU in `GPUS` has that name.
    """
    if name not in GPUS:
        raise ConfigError(
            f"--gpu {name}: there is no such GPU; set --gpu to one of {', '.join(GPUS)}"
        )
    return GPUS[name]
