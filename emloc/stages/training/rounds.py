"""Train in rounds: each begins with a pass of the original, and is undone if it has not helped.

A round trains some optimizer steps on offsets that were recorded with the adapter of its start. The
pass behind it measures the original's loss on the rows of the guard with the adapter of its end. If
the loss has risen, or a loss of the round itself was not finite, the adapter, the optimizer and the
schedule go back to the round's start. The rows of its steps count as used, and later rounds have
half the learning rate.

Everything that is decided here follows from files in the training's folder. A training that was
killed decides the same again, without computing finished passes and rounds anew.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emloc.adapters.saved import copy_adapter
from emloc.anchors.guard import Change, change_between, mean_loss
from emloc.anchors.record import RowLoss
from emloc.calibration.offload import StateLimits
from emloc.recovery import Recovery
from emloc.runtime.atomic import write_text
from emloc.runtime.distributed import is_first, wait_for_everyone
from emloc.stages.training.anchored_rows import AnchoredRows
from emloc.stages.training.callbacks import Report
from emloc.stages.training.graphed_passes import KeptPasses
from emloc.stages.training.refit import Refit
from emloc.stages.training.round_passes import FirstPass, RoundPasses
from emloc.stages.training.round_steps import RoundSteps
from emloc.stages.training.round_trainee import RoundTrainee, State
from emloc.stages.training.train import log_start, write_curve
from emloc.stages.training.trainee import Trainee
from emloc.stages.training.work import rows_of_step

log = logging.getLogger(__name__)

# Rejected rounds after which a training ends.
MOST_REJECTED = 3
ROUNDS_FILE = "anchors.jsonl"


def rounds_of(
    folder: Path,
    trainee: Trainee,
    rows: AnchoredRows,
    recovery: Recovery,
    first_pass: FirstPass | None,
    limits: StateLimits,
    report: Report,
    refit: Refit | None = None,
    kept_passes: KeptPasses | None = None,
) -> Rounds:
    """Return an anchored training in a folder, which may hold an interrupted one.

    Args:
        folder: of the training's passes, rounds and checkpoints.
        trainee: the emulator of the first round with a new adapter.
        rows: the rows in their order, and the places.
        recovery: how the adapter is carried to the original.
        first_pass: the offsets of the first round; None: they are recorded here.
        limits: memory for hidden states.
        report: called with each line of the training log.
        refit: how later rounds fit the emulator anew; None: all rounds have the same emulator.
        kept_passes: the graphs of the trainee, if there are some already; it gets those of the last
            round. With `refit` each round has graphs of its own.
    """
    if refit is None and kept_passes is None:
        kept_passes = KeptPasses()
    round_trainee = RoundTrainee(trainee, kept_passes)
    passes = RoundPasses(folder, round_trainee, rows, recovery, first_pass, limits, refit)
    steps = RoundSteps(folder, round_trainee, rows, report)
    return Rounds(folder, round_trainee, rows, passes, steps)


@dataclass
class Rounds:
    """One anchored training, in a folder that holds its passes, rounds and checkpoints."""

    folder: Path
    trainee: RoundTrainee
    rows: AnchoredRows
    passes: RoundPasses
    steps: RoundSteps
    lines: list[dict[str, Any]] = field(default_factory=list)  # one for each pass

    def __post_init__(self) -> None:
        path = self.folder / ROUNDS_FILE
        self._reported_lines = path.read_text().splitlines() if path.exists() else []

    def run(self) -> dict[str, Any]:
        """Run all rounds, and write the adapter, the curve and a line about each pass.

        Raises:
            FloatingPointError: a loss is not finite, and no round has been accepted, or there is no
                guard.
        """
        last = self.rows.round_ends[-1]
        log_start(self.trainee.open(), len(self.rows.rows))
        state, position, rate, rejected = State(), 0, 1.0, 0
        tentative: State | None = None  # the end of a round that no pass has judged yet
        guard: dict[str, RowLoss] = {}  # losses with the adapter of `state`
        candidates: list[tuple[float, State]] = []
        failure = ""  # of the last round whose loss was not finite
        while True:
            end = next((end for end in self.rows.round_ends if end > position), position)
            if end > position:
                self.passes.choose_emulator(tentative or state)
            offsets, losses = self.passes.run(tentative or state, position, end)
            change = change_between(guard, losses) if tentative and guard else None
            worse = change is not None and change.is_worse
            self._note(position, tentative or state, losses, change, rate)
            if worse:
                assert change is not None
                reason = (
                    f"the last round has raised the original's loss on {len(guard)} rows by "
                    f"{change.mean:.3g} (standard error {change.error:.2g})"
                )
            else:
                state, guard = tentative or state, losses
                if guard:
                    candidates.append((mean_loss(guard), state))
                if position == last:
                    break
                result = self.steps.run(state, position, end, rate, offsets)
                tentative, position = result.state, end
                if tentative is not None:
                    self.passes.drop(offsets)
                    continue
                failure = result.failure
                reason = failure.partition(";")[0]
                self._write(position, {"schedule_step": state.step, "rate": rate, "rejected": True})
            self.passes.drop(offsets)
            rejected, rate, tentative = rejected + 1, rate / 2, None
            if is_first():
                log.warning(
                    "train: %s, so the round is rejected, and training goes back to %s; "
                    "learning rate x %g",
                    *(reason, state, rate),
                )
            if rejected == MOST_REJECTED:
                state = min(candidates, key=lambda item: item[0])[1]
                break
            if position == last:
                break
        if failure and state.adapter is None:  # nothing was trained to go back to
            self._remove_rounds()  # another attempt begins anew
            raise FloatingPointError(failure)
        return self._finish(state, position, rejected)

    def _note(
        self,
        position: int,
        state: State,
        losses: Mapping[str, RowLoss],
        change: Change | None,
        rate: float,
    ) -> None:
        """Keep the figures of a pass, and hand them on."""
        line: dict[str, Any] = {"schedule_step": state.step, "rate": rate}
        if losses:
            line["original_loss"] = mean_loss(losses)
        if change is not None:
            line |= {"change": change.mean, "error": change.error, "rejected": change.is_worse}
        self._write(position, line)

    def _write(self, position: int, figures: Mapping[str, Any]) -> None:
        """Add a line to the file of rounds, and report its losses."""
        line = {"step": position, **figures}
        self.lines.append(line)
        if len(self.lines) <= len(self._reported_lines):
            return  # an interrupted attempt has written this line
        if values := pass_values(line):
            self.steps.report(position, values)
        if is_first():
            text = "".join(json.dumps(one) + "\n" for one in self.lines)
            write_text(self.folder / ROUNDS_FILE, text)

    def _finish(self, state: State, position: int, rejected: int) -> dict[str, Any]:
        if is_first():
            write_curve(self.folder, self.steps.curve)
            self._save_result(state)
        self._remove_rounds()
        step_rows = rows_of_step(self.trainee.training_inputs.recipe, len(self.rows.rows))
        facts = self.trainee.facts(position * step_rows)
        facts["row_forwards"] += self.passes.row_forwards
        return facts | {
            "steps": state.step,
            "step_seconds": self.steps.timer.median,
            "passes": self.passes.count,
            "rejected_rounds": rejected,
        }

    def _remove_rounds(self) -> None:
        # Other processes may still read what is deleted here.
        wait_for_everyone(self.trainee.device)
        if is_first():
            for path in (*self.folder.glob("pass-*"), *self.folder.glob("round-*")):
                shutil.rmtree(path)

    def _save_result(self, state: State) -> None:
        """Write the adapter of a state as the training's own."""
        target = self.folder / "adapter"
        if state.adapter is not None:
            copy_adapter(state.adapter / "adapter", target)
            return
        self.trainee.load(state, whole=True)
        self.trainee.save(target)


def pass_values(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a pass for the training log; none if it measured no loss.

    The loss behind a rejected round has a name of its own, so that `original_loss` is the loss of
    the adapter with which the training goes on.
    """
    if "original_loss" not in line:
        return {}
    return {"rejected_loss" if line.get("rejected") else "original_loss": line["original_loss"]}
