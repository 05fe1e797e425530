"""The share of a model's blocks in linear layers, which alone are adapted or compressed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from emloc.errors import ConfigError
from emloc.models.block_names import find_block

log = logging.getLogger(__name__)

# Below this share of a model's blocks, an emulator of their linear layers is refused.
LEAST_SHARE = 0.5
# Below this share, the log says the share.
NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Coverage:
    """Where the parameters of a model's blocks lie."""

    share: float  # in linear layers, of all parameters of the blocks
    rest: str  # class of the modules with most of the other parameters, such as `MixtralExperts`


def coverage_of(model: nn.Module, blocks: Collection[str] | None = None) -> Coverage:
    """Return the coverage of the named blocks, or of all numbered blocks of the model."""
    counts: Counter[str] = Counter()
    linear, parameter_ids = 0, set()
    for name, module in model.named_modules():
        block = find_block(name)
        if block is None or (blocks is not None and block not in blocks):
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) in parameter_ids:
                continue
            parameter_ids.add(id(parameter))
            if isinstance(module, nn.Linear):
                linear += parameter.numel()
            else:
                counts[type(module).__name__] += parameter.numel()
    total = linear + counts.total()
    rest = next((kind for kind, _ in counts.most_common(1)), "")
    return Coverage(linear / total if total else 1.0, rest)


def require_linear_blocks(
    model: nn.Module, blocks: Collection[str], subject: str, override: str
) -> None:
    """Check that linear layers have most parameters of the blocks, and log their share.

    Args:
        model: the original model.
        blocks: names of the blocks with layers to compress.
        subject: what works on linear layers only, such as `emulator=svd`.
        override: what mends the error.

    Raises:
        ConfigError: the share is below half, as in a mixture of experts that fuses its experts.
    """
    coverage = coverage_of(model, blocks)
    if coverage.share < LEAST_SHARE:
        raise ConfigError(
            f"{subject} works on linear layers, which have {coverage.share:.0%} of the parameters "
            f"of the blocks; most are in {coverage.rest} and would stay as they are; {override}"
        )
    _log(coverage, f"{subject} works on linear layers")


def log_share(model: nn.Module, blocks: Collection[str], subject: str) -> None:
    """Log the share of the blocks' parameters in linear layers, unless it is nearly 1.

    `subject` is a clause that says why the share matters.
    """
    _log(coverage_of(model, blocks), subject)


def _log(coverage: Coverage, subject: str) -> None:
    if coverage.share < NEARLY_ALL:
        log.info(
            "%s, which have %.0f%% of the parameters of the blocks; others are in %s",
            *(subject, 100 * coverage.share, coverage.rest),
        )


def no_linear_reason(model: nn.Module) -> str | None:
    """Return why the blocks of a model have no linear layer; None if they have one."""
    coverage = coverage_of(model)
    if coverage.share > 0 or not coverage.rest:
        return None
    return f"its blocks consist of {coverage.rest} and have no nn.Linear layer"
