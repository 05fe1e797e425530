"""Train the steps of one round of an anchored training, from the state of its start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from emloc.anchors.attached import AttachedOffsets
from emloc.anchors.batches import AnchoredCollator
from emloc.anchors.shards import OffsetReader
from emloc.runtime.distributed import first_does, is_first, is_sharded, wait_for_everyone
from emloc.stages.training.anchored_rows import AnchoredRows
from emloc.stages.training.callbacks import LogLines, Report, StepTimer
from emloc.stages.training.capture import Capture, capture_of
from emloc.stages.training.round_trainee import RoundTrainee, State
from emloc.stages.training.train import Segment, run_steps
from emloc.stages.training.trainee import Trainee
from emloc.stages.training.trainer import newest_intact_checkpoint, unshard_parameters


@dataclass(frozen=True)
class RoundResult:
    """How a round has ended."""

    state: State | None  # behind its last step; None: it has failed
    failure: str = ""  # why it has failed, in one line


@dataclass
class RoundSteps:
    """Trains the rounds of one training; each has a folder of checkpoints in the training's."""

    folder: Path
    trainee: RoundTrainee
    rows: AnchoredRows
    report: Report
    timer: StepTimer = field(default_factory=StepTimer)
    curve: list[dict[str, Any]] = field(default_factory=list)  # of all rounds so far

    def run(
        self, state: State, first: int, end: int, rate: float, offsets: list[Path]
    ) -> RoundResult:
        """Train the steps from `first` to `end` of the rows, and return the state behind them.

        A round has failed if a loss is not finite, or the adapter behind it.

        Raises:
            FloatingPointError: a loss is not finite, and there is no guard to judge other rounds.
        """
        folder = self.folder / f"round-{first:06d}-{end:06d}"
        skipped = first - state.step
        last = state.step + end - first
        finished = folder / "round.json"
        log, failure = LogLines(), ""
        if not finished.exists():
            restart = self.rows.anchor.restart
            segment = Segment(
                state.checkpoint, last, skipped, rate, restart, first=state.step, log=log
            )
            failure = self._train(folder / "checkpoints", state, segment, offsets)
        facts = first_does(
            finished,
            lambda: (
                {"failure": failure, "curve": _curve(log.lines, state, skipped)}
                if failure
                else self._keep(folder, state, last, skipped)
            ),
        )
        self.curve += facts["curve"]
        if failure := facts.get("failure", ""):
            return RoundResult(None, failure)
        return RoundResult(State(last, folder / "checkpoints" / f"checkpoint-{last}", folder))

    def _train(self, checkpoints: Path, state: State, segment: Segment, offsets: list[Path]) -> str:
        """Train a segment, and return why it has failed; nothing if it has not."""
        last = segment.end
        assert last is not None
        newest = newest_intact_checkpoint(checkpoints)
        if newest is not None and newest.name == f"checkpoint-{last}" and is_sharded():
            # Its adapter is in shards that only a training reads, so its last steps are repeated.
            wait_for_everyone(self.trainee.device)
            if is_first():
                shutil.rmtree(newest)
            wait_for_everyone(self.trainee.device)
            newest = newest_intact_checkpoint(checkpoints)
        if newest is not None and newest.name == f"checkpoint-{last}":
            return self._flaw(self.trainee.load(State(last, newest)), segment)
        trainee, places = self.trainee.load(state, whole=True), self.rows.places
        self.trainee.is_split = is_sharded()
        hooks = AttachedOffsets(places, self.rows.anchor.stored_as)
        capture = self._capture(trainee, segment)
        collator = AnchoredCollator(
            self.rows.collate if capture is None else capture.collator(self.rows.collate),
            OffsetReader(offsets),
            places,
            pinned=trainee.device.type == "cuda",
        )
        with ExitStack() as stack:
            stack.callback(collator.close)
            stack.enter_context(hooks.attached(trainee.inner))
            try:
                run_steps(
                    trainee,
                    self.rows.rows,
                    collator,
                    checkpoints,
                    self.report,
                    self.timer,
                    replace(
                        segment,
                        anchors=hooks,
                        capture=capture,
                        kept_passes=self.trainee.kept_passes,
                    ),
                )
            except FloatingPointError as error:
                if not self.rows.guard:
                    raise
                return str(error)
        unshard_parameters(trainee.model)
        return self._flaw(trainee, segment)

    def _capture(self, trainee: Trainee, segment: Segment) -> Capture | None:
        """Return how the passes of a segment run as graphs; None if they do not."""
        assert segment.end is not None
        first = segment.first + segment.skipped
        rows = [keyed.row for keyed in self.rows.rows]
        last = segment.end + segment.skipped
        return capture_of(trainee, rows, self.rows.collate, first, last)

    def _flaw(self, trainee: Trainee, segment: Segment) -> str:
        """Return that the adapter behind a segment is not finite; nothing if it is."""
        assert segment.end is not None
        state = trainee.training_inputs.adapter.state(trainee.model)
        if not self.rows.guard or all(bool(tensor.isfinite().all()) for tensor in state.values()):
            return ""
        return (
            f"the adapter is not finite behind step {segment.end + segment.skipped}; "
            "set train.learning_rate lower"
        )

    def _keep(self, folder: Path, state: State, last: int, skipped: int) -> dict[str, Any]:
        """Save the adapter of a round that was trained, and return the round's figures."""
        self.trainee.save(folder / "adapter")
        history = json.loads(
            (folder / "checkpoints" / f"checkpoint-{last}" / "trainer_state.json").read_text()
        )
        return {"curve": _curve(history["log_history"], state, skipped)}


def _curve(lines: Sequence[Mapping[str, Any]], state: State, skipped: int) -> list[dict[str, Any]]:
    """Return the lines of a log with the losses of a round that began with `state`."""
    return [
        {**line, "step": line["step"] + skipped}
        for line in lines
        if "loss" in line and line["step"] > state.step
    ]
