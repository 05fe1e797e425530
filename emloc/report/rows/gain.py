"""The share of LoRA's improvement that a run keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emloc.config.presets import named_method
from emloc.config.run_folder import Run

# Sections of settings that a run shares with its untouched model, and with its LoRA. The LoRA may
# be trained otherwise: a rate or a number of steps that suits a method may not suit LoRA.
_SAME_DATA = ("model", "task", "eval")
_SAME_ADAPTER = (*_SAME_DATA, "lora", "seed")


@dataclass(frozen=True)
class StoredRun:
    """A run with its settings and results, which are read from its folder once."""

    run: Run
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]  # empty until the run is done

    @property
    def method(self) -> str:
        """The method that has the run's parts: a `lora` with anchors is another method."""
        return named_method(str(self.config["method"]), self.run.choices)

    @property
    def loss(self) -> float | None:
        """The held-out loss; None where the run has no results or its task has no loss."""
        return self.metrics["scores"].get("loss") if self.metrics else None


def gain_kept(run: StoredRun, runs: Sequence[StoredRun]) -> float | None:
    """Share of LoRA's improvement in held-out loss over the untouched model that `run` keeps.

    The reference is the best LoRA of the same rank and seed, whatever its learning rate and its
    number of steps. None where the run, its LoRA or its untouched model has no loss, or LoRA
    improved nothing.
    """
    untouched = _least_loss("zero_shot", run, runs, _SAME_DATA)
    lora = _least_loss("lora", run, runs, _SAME_ADAPTER)
    if run.loss is None or untouched is None or lora is None or lora >= untouched:
        return None
    return (untouched - run.loss) / (untouched - lora)


def _least_loss(
    method: str, run: StoredRun, runs: Sequence[StoredRun], sections: Sequence[str]
) -> float | None:
    """Lowest loss of the runs of this method that share these sections with `run`."""
    losses = (
        one.loss
        for one in runs
        if one.method == method
        and one.loss is not None
        and all(one.config.get(name) == run.config.get(name) for name in sections)
    )
    return min(losses, default=None)
