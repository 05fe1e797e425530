"""What is seen and timed of a training while it goes on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emloc.runtime.distributed import is_first

# Called with the step and the values of one line of the training log.
Report = Callable[[int, dict[str, float]], None]


class Clock(TrainerCallback):
    """How long an optimizer step takes; each waits for its loss, so none is timed short."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """One more step."""
        self._ends.append(time.perf_counter())

    @property
    def median(self) -> float | None:
        """Seconds of a step, from the end of one to the end of the next; None of a single step."""
        steps = [after - before for before, after in pairwise(self._ends)]
        return round(statistics.median(steps), 4) if steps else None


class Progress(TrainerCallback):
    """One bar for the training, and each line of its log handed on."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._bar = tqdm(desc="train", unit="step", disable=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the bar, at the step a resumed training goes on from."""
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="train",
            unit="step",
            disable=not is_first(),
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """One more step."""
        self._bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Called by the Trainer every `log_every` steps, and once at the end."""
        if logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{float(logs['loss']):.3f}")
            self._report(state.global_step, {name: float(value) for name, value in logs.items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the bar."""
        self._bar.close()
