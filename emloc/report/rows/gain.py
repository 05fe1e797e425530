"""The share of LoRA's improvement that a run keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emloc.config.presets import named_method
from emloc.config.run_folder import Run

# Sections of settings that a run shares with its untouched model, and with its LoRA.
_SAME_DATA = ("model", "task", "eval")
_SAME_TRAINING = (*_SAME_DATA, "lora", "train", "seed")
# Settings of `train` that change memory and files, but not the adapter that is learnt.
_NOT_LEARNT = ("checkpointing", "host_activations", "lean", "log_every", "save_every")


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

    None where the run, its LoRA or its untouched model has no loss, or LoRA improved nothing.
    """
    untouched = _loss_of("zero_shot", run, runs, _SAME_DATA)
    lora = _loss_of("lora", run, runs, _SAME_TRAINING)
    if run.loss is None or untouched is None or lora is None or lora >= untouched:
        return None
    return (untouched - run.loss) / (untouched - lora)


def _loss_of(
    method: str, run: StoredRun, runs: Sequence[StoredRun], sections: Sequence[str]
) -> float | None:
    """Loss of the first run of this method that shares these sections with `run`."""
    losses = (
        one.loss
        for one in runs
        if one.method == method
        and one.loss is not None
        and all(_learnt(one, name) == _learnt(run, name) for name in sections)
    )
    return next(losses, None)


def _learnt(run: StoredRun, section: str) -> Any:
    values = run.config.get(section)
    if section != "train" or not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if key not in _NOT_LEARNT}
