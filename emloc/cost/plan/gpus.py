"""GPUs that `emloc plan` knows, with the makers' figures for dense arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace

from emloc.cost.plan.here import gib_of
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
    host_link: float  # bytes that come from pinned host memory over PCIe


# PCIe 4 and 5, with 8 or 16 lanes.
_PCIE4_8, _PCIE4, _PCIE5_8, _PCIE5 = 0.0125, 0.025, 0.025, 0.05

GPUS = {
    "rtx3060": Gpu(12, 25, 0.2, 0.36, _PCIE4),
    "rtx3060ti": Gpu(8, 32, 0.25, 0.45, _PCIE4),
    "rtx3070": Gpu(8, 41, 0.32, 0.45, _PCIE4),
    "rtx3080": Gpu(10, 60, 0.47, 0.76, _PCIE4),
    "rtx3080ti": Gpu(12, 68, 0.53, 0.91, _PCIE4),
    "rtx3090": Gpu(24, 71, 0.56, 0.94, _PCIE4),
    "rtx4060": Gpu(8, 30, 0.24, 0.27, _PCIE4_8),
    "rtx4060ti": Gpu(16, 44, 0.34, 0.29, _PCIE4_8),
    "rtx4070": Gpu(12, 58, 0.46, 0.5, _PCIE4),
    "rtx4070ti": Gpu(12, 80, 0.63, 0.5, _PCIE4),
    "rtx4070tisuper": Gpu(16, 88, 0.69, 0.67, _PCIE4),
    "rtx4080": Gpu(16, 97, 0.76, 0.72, _PCIE4),
    "rtx4090": Gpu(24, 165, 1.3, 1.0, _PCIE4),
    "rtx5060": Gpu(8, 38, 0.3, 0.45, _PCIE5_8),
    "rtx5060ti": Gpu(16, 47, 0.37, 0.45, _PCIE5_8),
    "rtx5070": Gpu(12, 62, 0.48, 0.67, _PCIE5),
    "rtx5070ti": Gpu(16, 88, 0.69, 0.9, _PCIE5),
    "rtx5080": Gpu(16, 113, 0.88, 0.96, _PCIE5),
    "rtx5090": Gpu(32, 210, 1.6, 1.8, _PCIE5),
    "l40s": Gpu(48, 362, 1.4, 0.86, _PCIE4),
    "a100": Gpu(80, 312, 19.5, 2.0, _PCIE4),
    "h100": Gpu(80, 989, 67, 3.35, _PCIE5),
    "h200": Gpu(140, 989, 67, 4.8, _PCIE5),
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU called `name`, or one with so much memory, such as `12GiB`.

    Of a size the rates are those of the slowest known GPU that has at least this memory.

    Raises:
        ConfigError: no GPU in `GPUS` has that name, or so much memory.
    """
    if name in GPUS:
        return GPUS[name]
    memory = gib_of(name) or 0.0
    larger = [gpu for gpu in GPUS.values() if gpu.memory_gib >= memory]
    if not memory or not larger:
        raise ConfigError(
            f"--gpu {name}: there is no such GPU; set --gpu to its memory, such as 12GiB, or to "
            f"one of {', '.join(GPUS)}"
        )
    return replace(min(larger, key=lambda gpu: gpu.bf16), memory_gib=memory)
