"""The share of LoRA's improvement that a run keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Sections of settings that a run shares with its untouched model, and with its LoRA.
_SAME_DATA = ("model", "task", "eval")
_SAME_TRAINING = (*_SAME_DATA, "lora", "train", "seed")
# Settings of `train` that change memory and files, but not the adapter that is learnt.
_NOT_LEARNT = ("checkpointing", "host_activations", "lean", "log_every", "save_every")


@dataclass(frozen=True)
class ScoredRun:
    """A run's resolved settings and its held-out loss; None if it has no results."""

    config: Mapping[str, Any]
    loss: float | None


def gain_kept(run: ScoredRun, runs: Sequence[ScoredRun]) -> float | None:
    """Share of LoRA's improvement in held-out loss over the untouched model that `run` keeps.

    None where the run, its LoRA or its untouched model has no loss, or LoRA improved nothing.
    """
    untouched = _loss_of("zero_shot", run, runs, _SAME_DATA)
    lora = _loss_of("lora", run, runs, _SAME_TRAINING)
    if run.loss is None or untouched is None or lora is None or lora >= untouched:
        return None
    return (untouched - run.loss) / (untouched - lora)


def _loss_of(
    method: str, run: ScoredRun, runs: Sequence[ScoredRun], sections: Sequence[str]
) -> float | None:
    """Loss of the first run of this method that shares these sections with `run`."""
    settings = [_learnt(run, name) for name in sections]
    losses = (
        one.loss
        for one in runs
        if one.config["method"] == method
        and one.loss is not None
        and [_learnt(one, name) for name in sections] == settings
    )
    return next(losses, None)


def _learnt(run: ScoredRun, section: str) -> Any:
    values = run.config.get(section)
    if section != "train" or not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if key not in _NOT_LEARNT}
