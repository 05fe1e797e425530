"""What a training on stored features of images costs beside its steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from emloc.config.settings import TrainSettings
from emloc.cost.plan.cost import DISK, UTILISATION, TrainingCost
from emloc.cost.plan.gpus import Gpu
from emloc.cost.plan.layout import StepShape
from emloc.models.checkpoint.source import Source
from emloc.models.checkpoint.tower import TOWER_TOKENS
from emloc.runtime.memory import GIB


@dataclass(frozen=True)
class FeaturePlan:
    """The pass of the vision tower over all images of a training, and its files.

    Which tokens stand for images is not known here, so all tokens of a row count as such.
    """

    source: Source  # with its vision tower
    step_shape: StepShape
    recipe: TrainSettings

    @property
    def tokens(self) -> int:
        """Tokens of all rows that are drawn, at most; a row that is drawn twice is stored once."""
        shape = self.step_shape
        return self.recipe.steps * shape.batch * shape.accumulate * shape.length

    @property
    def disk(self) -> int:
        """Bytes of the features."""
        width: int = self.source.config.get_text_config().hidden_size
        return self.tokens * width * self.source.dtype.itemsize

    @property
    def tower_bytes(self) -> int:
        """Bytes of the tower and its projector, which are read once."""
        inside = tuple(f"{name}." for name in self.source.tower)
        sizes = self.source.sizes.items()
        count = sum(size for name, size in sizes if name.startswith(inside))
        return count * self.source.dtype.itemsize

    def added_to(self, cost: TrainingCost, gpu: Gpu) -> TrainingCost:
        """Return the cost of a training with the pass before it."""
        weights = self.tower_bytes // self.source.dtype.itemsize
        operations = 2 * weights * TOWER_TOKENS * self.tokens
        computing = operations / (gpu.bf16 * 1e12 * UTILISATION)
        seconds = max(self.tower_bytes / DISK, computing, self.disk / DISK)
        return replace(
            cost,
            disk=cost.disk + self.disk,
            read=cost.read + self.tower_bytes,
            feature_seconds=seconds,
        )

    def lines(self) -> list[str]:
        """Return what a user has to know before anything is computed, in sentences."""
        return [
            f"train.features=stored: the vision tower ({self.tower_bytes / GIB:.3g} GiB) is not on "
            f"the GPU while training; the features of all rows take at most "
            f"{self.disk / GIB:.3g} GiB of disk, and stay in the cache"
        ]


def feature_plan(
    recipe: TrainSettings, source: Source, step_shape: StepShape
) -> FeaturePlan | None:
    """Return the plan of the stored features; None if the training computes them."""
    return FeaturePlan(source, step_shape, recipe) if recipe.stores_features else None


def trained_source(recipe: TrainSettings, source: Source) -> Source:
    """Return the model as it is trained: with stored features it has no vision tower."""
    return source.with_features(lambda: None) if recipe.stores_features else source
