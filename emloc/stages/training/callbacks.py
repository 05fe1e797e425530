"""Callbacks of a training: they time its steps, show its progress and hand on its log."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emloc.runtime.progress import Clock, StageProgress

# Called with the step and the values of one line of the training log.
Report = Callable[[int, dict[str, float]], None]


class StepTimer(TrainerCallback):
    """Stopwatch of the optimizer steps; each step waits for its loss, so none is timed short."""

    def __init__(self) -> None:
        self._trainings: list[list[float]] = []  # when each step of each training ended

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note when a step ended."""
        self._trainings[-1].append(time.perf_counter())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin a training; a timer that several trainings share times no step between them."""
        self._trainings.append([])

    @property
    def median(self) -> float | None:
        """Median seconds between the ends of two steps; None if there was only one step."""
        steps = [after - before for ends in self._trainings for before, after in pairwise(ends)]
        return round(statistics.median(steps), 4) if steps else None


class StopAfter(TrainerCallback):
    """Ends a training after an optimizer step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop if the step is reached."""
        if state.global_step >= self._step:
            control.should_training_stop = control.should_save = True


class LogLines(TrainerCallback):
    """The lines of a training's log, also of one that fails, and from before it was resumed."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the list to which the Trainer adds each line."""
        self.lines = state.log_history


class TrainingProgress(TrainerCallback):
    """Show the steps and the loss of a training, and hand on each line of its log.

    `skipped` steps of rows were used before in rounds that were rejected. They count as steps in
    all that is shown and handed on, so that no step occurs twice.
    """

    def __init__(self, report: Report, clock: Clock = time.monotonic, *, skipped: int = 0) -> None:
        self._report, self._clock, self._skipped = report, clock, skipped
        self._progress: StageProgress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin at the step of the checkpoint that a training is resumed from."""
        self._progress = StageProgress(
            "train",
            state.max_steps,
            "step",
            done=state.global_step + self._skipped,
            clock=self._clock,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count a step."""
        assert self._progress is not None
        self._progress.update()

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
            if self._progress is not None:
                self._progress.show(loss=float(logs["loss"]))
            values = {name: float(value) for name, value in logs.items()}
            self._report(state.global_step + self._skipped, values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the bar off the terminal."""
        self.close()

    def close(self) -> None:
        """End the progress, also of a training that failed."""
        if self._progress is not None:
            self._progress.close()
