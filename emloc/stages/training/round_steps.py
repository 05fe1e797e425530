"""Train the steps of one round of an anchored training, from the state of its start."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emloc.anchors.attached import AttachedOffsets
from emloc.anchors.batches import AnchoredCollator
from emloc.anchors.shards import OffsetReader
from emloc.runtime.distributed import first_does, is_first, is_sharded, wait_for_everyone
from emloc.stages.training.anchored_rows import AnchoredRows
from emloc.stages.training.callbacks import Report, StepTimer
from emloc.stages.training.round_trainee import RoundTrainee, State
from emloc.stages.training.train import Segment, run_steps
from emloc.stages.training.trainer import newest_intact_checkpoint, unshard_parameters


@dataclass
class RoundSteps:
    """Trains the rounds of one training; each has a folder of checkpoints in the training's."""

    folder: Path
    trainee: RoundTrainee
    rows: AnchoredRows
    report: Report
    timer: StepTimer = field(default_factory=StepTimer)
    curve: list[dict[str, Any]] = field(default_factory=list)  # of all rounds so far

    def run(self, state: State, first: int, end: int, rate: float, offsets: list[Path]) -> State:
        """Train the steps from `first` to `end` of the rows, and return the state behind them."""
        folder = self.folder / f"round-{first:06d}-{end:06d}"
        skipped = first - state.step
        last = state.step + end - first
        finished = folder / "round.json"
        if not finished.exists():
            self._train(folder / "checkpoints", state, last, skipped, rate, offsets)
        facts = first_does(finished, lambda: self._keep(folder, state, last, skipped))
        self.curve += facts["curve"]
        return State(last, folder / "checkpoints" / f"checkpoint-{last}", folder)

    def _train(
        self,
        checkpoints: Path,
        state: State,
        last: int,
        skipped: int,
        rate: float,
        offsets: list[Path],
    ) -> None:
        newest = newest_intact_checkpoint(checkpoints)
        if newest is not None and newest.name == f"checkpoint-{last}" and is_sharded():
            # Its adapter is in shards that only a training reads, so its last steps are repeated.
            wait_for_everyone(self.trainee.device)
            if is_first():
                shutil.rmtree(newest)
            wait_for_everyone(self.trainee.device)
            newest = newest_intact_checkpoint(checkpoints)
        if newest is not None and newest.name == f"checkpoint-{last}":
            self.trainee.load(State(last, newest))
            return
        trainee, places = self.trainee.load(state, whole=True), self.rows.places
        self.trainee.is_split = is_sharded()
        hooks = AttachedOffsets(places, self.rows.anchor.stored_as)
        collator = AnchoredCollator(
            self.rows.collate,
            OffsetReader(offsets),
            places,
            pinned=trainee.device.type == "cuda",
        )
        with ExitStack() as stack:
            stack.callback(collator.close)
            stack.enter_context(hooks.attached(trainee.inner))
            run_steps(
                trainee,
                self.rows.rows,
                collator,
                checkpoints,
                self.report,
                self.timer,
                Segment(state.checkpoint, last, skipped, rate, hooks),
            )
        unshard_parameters(trainee.model)

    def _keep(self, folder: Path, state: State, last: int, skipped: int) -> dict[str, Any]:
        """Save the adapter of a round that was trained, and return the round's figures."""
        self.trainee.save(folder / "adapter")
        history = json.loads(
            (folder / "checkpoints" / f"checkpoint-{last}" / "trainer_state.json").read_text()
        )
        curve = [
            line | {"step": line["step"] + skipped}
            for line in history["log_history"]
            if "loss" in line and line["step"] > state.step
        ]
        return {"curve": curve}
