"""Which share of LoRA's improvement a run keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What a run has in common with the LoRA, or the untouched model, that its gain is measured by.
_SAME_DATA = ("model", "task", "eval")
_SAME_TRAINING = (*_SAME_DATA, "lora", "train", "seed")
# Settings of `train` that change what is kept where, and when it is written, and nothing learnt.
_NOT_LEARNT = ("checkpointing", "host_activations", "lean", "log_every", "save_every")


@dataclass(frozen=True)
class Scored:
    """A run's resolved settings and its held-out loss, None if it has no results."""

    config: Mapping[str, Any]
    loss: float | None


def gain_kept(run: Scored, runs: Sequence[Scored]) -> float | None:
    """Share of LoRA's improvement in held-out loss over the untouched model that `run` keeps.

    None where the run or one of the two it is measured by has no results, or LoRA improved nothing.
    """
    start = _loss_of("zero_shot", run, runs, _SAME_DATA)
    best = _loss_of("lora", run, runs, _SAME_TRAINING)
    if run.loss is None or start is None or best is None or best >= start:
        return None
    return (start - run.loss) / (start - best)


def _loss_of(method: str, run: Scored, runs: Sequence[Scored], same: Sequence[str]) -> float | None:
    found = (
        one.loss
        for one in runs
        if one.config["method"] == method and one.loss is not None and _alike(one, run, same)
    )
    return next(found, None)


def _alike(one: Scored, other: Scored, sections: Sequence[str]) -> bool:
    """Whether both have learnt from the same, in the same way."""
    return all(_learnt(one, name) == _learnt(other, name) for name in sections)


def _learnt(run: Scored, section: str) -> Any:
    values = run.config.get(section)
    if section != "train" or not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if key not in _NOT_LEARNT}
