"""Train in rounds: each begins with a pass of the original, and is undone if it has not helped.

A round trains some optimizer steps on offsets that were recorded with the adapter of its start. The
pass behind it measures the original's loss on the rows of the guard with the adapter of its end. If
the loss has risen, the adapter, the optimizer and the schedule go back to the round's start. The
rows of its steps count as used, and later rounds have half the learning rate.

Everything that is decided here follows from files in the training's folder. A training that was
killed decides the same again, without computing finished passes and rounds anew.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor

from emloc.adapters.saved import copy_adapter
from emloc.adapters.streamed import load_unread
from emloc.anchors.attached import AttachedOffsets
from emloc.anchors.batches import AnchoredCollator
from emloc.anchors.guard import Change, change_between, mean_loss
from emloc.anchors.record import Original, RowLoss, Stretches
from emloc.anchors.shards import OffsetReader
from emloc.emulators.operations import block_operations
from emloc.recovery import Recovery, RecoveryInputs
from emloc.recovery.none import NoRecovery
from emloc.runtime.atomic import write_json, write_text
from emloc.runtime.distributed import (
    POLL_SECONDS,
    StatusFile,
    is_first,
    is_sharded,
    world_size,
)
from emloc.runtime.stage_cache import Artifact
from emloc.runtime.work_meter import metered
from emloc.stages.training.anchored_rows import AnchoredRows
from emloc.stages.training.callbacks import Report, StepTimer
from emloc.stages.training.refit import Refit, with_folder
from emloc.stages.training.train import Segment, Trainee, open_trainee, run_steps, write_curve
from emloc.stages.training.trainer import (
    STATE_FILE,
    newest_intact_checkpoint,
    unshard_parameters,
)
from emloc.stages.training.work import rows_of_step

log = logging.getLogger(__name__)

# Rejected rounds after which a training ends.
MOST_REJECTED = 3
ROUNDS_FILE = "anchors.jsonl"
_ROUND_FILE = "round.json"


@dataclass(frozen=True)
class FirstPass:
    """The offsets of the first round, if they were recorded before the training."""

    folders: list[Path]
    losses: Mapping[str, RowLoss]


@dataclass(frozen=True)
class State:
    """The state of a training between two rounds: adapter, optimizer and schedule."""

    step: int = 0  # of the schedule
    checkpoint: Path | None = None  # None: the new adapter, before the first step
    adapter: Path | None = None  # folder of the saved adapter; None: the new adapter

    def __str__(self) -> str:
        return f"step {self.step}"


@dataclass
class Rounds:
    """One anchored training, in a folder that holds its passes, rounds and checkpoints."""

    folder: Path
    trainee: Trainee
    rows: AnchoredRows
    recovery: Recovery
    first_pass: FirstPass | None
    host_bytes: int
    report: Report
    refit: Refit | None = None  # None: all rounds have the same emulator
    timer: StepTimer = field(default_factory=StepTimer)
    lines: list[dict[str, Any]] = field(default_factory=list)  # one for each pass

    def __post_init__(self) -> None:
        self._first_emulator = self._present_emulator = self.trainee.built_emulator
        self._fresh = self._own_state()
        self._is_used = False  # whether a round may have changed the form of the weights
        self._passes = 0
        self._curve: list[Mapping[str, Any]] = []
        self._row_forwards = 0.0  # of the passes of this training
        path = self.folder / ROUNDS_FILE
        self._reported_lines = path.read_text().splitlines() if path.exists() else []

    def run(self) -> dict[str, Any]:
        """Run all rounds, and write the adapter, the curve and a line about each pass."""
        last = self.rows.round_ends[-1]
        state, position, rate, rejected = State(), 0, 1.0, 0
        tentative: State | None = None  # the end of a round that no pass has judged yet
        guard: dict[str, RowLoss] = {}  # losses with the adapter of `state`
        candidates: list[tuple[float, State]] = []
        while True:
            end = next((end for end in self.rows.round_ends if end > position), position)
            if end > position:
                self._choose_emulator(tentative or state)
            offsets, losses = self._pass(tentative or state, position, end)
            change = change_between(guard, losses) if tentative and guard else None
            worse = change is not None and change.is_worse
            self._note(position, tentative or state, losses, change, rate)
            if worse:
                assert change is not None
                rejected, rate, tentative = rejected + 1, rate / 2, None
                log.warning(
                    "train: the last round has raised the original's loss on %d rows by %.3g "
                    "(standard error %.2g), so training goes back to %s; learning rate x %g",
                    *(len(guard), change.mean, change.error, state, rate),
                )
                self._drop(offsets)
                if rejected == MOST_REJECTED:
                    state = min(candidates, key=lambda item: item[0])[1]
                    break
                if position < last:
                    continue
                break
            state, guard, tentative = tentative or state, losses, None
            if guard:
                candidates.append((mean_loss(guard), state))
            if position == last:
                break
            tentative = self._round(state, position, end, rate, offsets)
            position = end
        return self._finish(state, position, rejected)

    # The emulator of a round.

    def _choose_emulator(self, state: State) -> None:
        """Let the next round train through the emulator fitted to the adapter of `state`."""
        if self.refit is None:
            return
        self._present_emulator = self._first_emulator
        if state.adapter is not None:
            refit = partial(self._fit_emulator, state.adapter / "emulator", state)
            self._row_forwards += _first_does(state.adapter / "refit.json", refit)["row_forwards"]
            self._present_emulator = with_folder(self._first_emulator, state.adapter / "emulator")

    def _fit_emulator(self, folder: Path, state: State) -> dict[str, Any]:
        """Fit the present emulator to the adapter of `state`, and write it into `folder`."""
        assert self.refit is not None
        assert state.adapter is not None
        original = partial(self._original, state, state.adapter)
        folder.mkdir(parents=True, exist_ok=True)
        self._load(state)
        row_forwards = self.refit.run(folder, self._trainee(), original, host_bytes=self.host_bytes)
        return {"row_forwards": row_forwards}

    def _trainee(self) -> Trainee:
        """Return the present emulator with an adapter; another one is put away first."""
        one = self.trainee
        if one.built_emulator.artifact.folder != self._present_emulator.artifact.folder:
            inputs, device = one.training_inputs, one.device
            del one, self.trainee
            gc.collect()
            self.trainee = open_trainee(self._present_emulator, inputs, device)
        return self.trainee

    # A pass.

    def _pass(self, state: State, first: int, end: int) -> tuple[list[Path], dict[str, RowLoss]]:
        """Record the offsets of the steps from `first` to `end` with the adapter of `state`.

        Returns:
            Folders of the offsets, and the original's losses on the rows of the guard.
        """
        if first == end and not self.rows.guard:
            return [], {}
        number, self._passes = self._passes, self._passes + 1
        keys = {row.key for row in self.rows.guard}
        if number == 0 and self.first_pass is not None:
            losses = {row: loss for row, loss in self.first_pass.losses.items() if row in keys}
            return self.first_pass.folders, losses
        folder = self.folder / f"pass-{number:03d}"
        losses_of_pass = _first_does(
            folder / "finished.json", lambda: self._record(folder, state, first, end)
        )
        self._row_forwards += losses_of_pass["row_forwards"]
        return [folder], {r: (s, n) for r, (s, n) in losses_of_pass["losses"].items() if r in keys}

    def _record(self, folder: Path, state: State, first: int, end: int) -> dict[str, Any]:
        rows = self.rows.of_steps(first, end)
        folder.mkdir(exist_ok=True)
        with metered() as meter, self._emulator(state, folder, needed=bool(rows)) as emulator:
            losses = self.rows.record(
                folder,
                self._original(state, folder),
                emulator,
                rows,
                self.rows.guard,
                device=self.trainee.device,
                host_bytes=self.host_bytes,
            )
        return {
            "losses": losses,
            "row_forwards": meter.operations / block_operations(self.rows.source),
        }

    def _original(self, state: State, folder: Path) -> Original:
        """Return the original with the adapter as the recovery carries it."""
        source = self.trainee.built_emulator.source
        adapter = self.trainee.training_inputs.adapter
        saved = self._saved_adapter(state, folder)
        if saved is None:
            return Original(source.skeleton(), source)
        carried, draft = folder / "carried", folder / "carried.partial"
        if not carried.exists():
            shutil.rmtree(draft, ignore_errors=True)
            # Only shapes are recovered: a recovery that trains is no part of what is trained here.
            recovery = self.recovery if self.recovery.scatters else NoRecovery()
            recovery.recover(
                draft,
                RecoveryInputs(
                    trained=Artifact("train", "", saved.parent),
                    built_emulator=self.trainee.built_emulator,
                    samples=None,
                    training_inputs=None,
                    device=self.trainee.device,
                ),
            )
            draft.replace(carried)
        return Original(*load_unread(source, adapter, carried / "adapter"))

    def _saved_adapter(self, state: State, folder: Path) -> Path | None:
        """Return the folder of a state's adapter; None for a new one that changes nothing."""
        adapter = self.trainee.training_inputs.adapter
        if state.adapter is not None:
            return state.adapter / "adapter"
        if adapter.starts_at_zero:
            return None
        saved = folder / "new_adapter" / "adapter"
        if not saved.exists():
            self._reopen_if_sharded()
            self._load(state)
            adapter.save(self.trainee.model, saved, self._base_name)
        return saved

    @contextmanager
    def _emulator(self, state: State, folder: Path, *, needed: bool) -> Iterator[Stretches | None]:
        """Yield the emulator with the adapter of `state`; None if no row needs offsets."""
        if not needed:
            yield None
            return
        trainee, stored_as = self._trainee(), self.rows.anchor.stored_as
        adapter = trainee.training_inputs.adapter
        if is_sharded():
            # The other processes take no part in a pass, and the trained model needs all of them.
            model: Any = trainee.built_emulator.open(trainee.device)
            if trained := self._saved_adapter(state, folder):
                model = adapter.base(adapter.load(model, trained))
            yield Stretches(model, self.rows.places, stored_as, trainee.context)
            return
        self._load(state)
        with adapter.training(trainee.model, mixed=trainee.mixed):
            yield Stretches(trainee.inner, self.rows.places, stored_as, trainee.context)

    # A round.

    def _round(self, state: State, first: int, end: int, rate: float, offsets: list[Path]) -> State:
        """Train the steps from `first` to `end` of the rows, and return the state behind them."""
        folder = self.folder / f"round-{first:06d}-{end:06d}"
        skipped = first - state.step
        last = state.step + end - first
        done = folder / _ROUND_FILE
        if not done.exists():
            self._train(folder, state, last, skipped, rate, offsets)
        facts = _first_does(done, lambda: self._keep_round(folder, state, last, skipped))
        self._curve += facts["curve"]
        self._drop(offsets)
        return State(last, folder / "checkpoints" / f"checkpoint-{last}", folder)

    def _drop(self, offsets: list[Path]) -> None:
        """Delete offsets that no step needs any more, unless other runs share them."""
        if is_first():
            for one in offsets:
                if one.parent == self.folder:
                    for path in one.glob("place-*"):
                        path.unlink()

    def _train(
        self,
        folder: Path,
        state: State,
        last: int,
        skipped: int,
        rate: float,
        offsets: list[Path],
    ) -> None:
        checkpoints = folder / "checkpoints"
        newest = newest_intact_checkpoint(checkpoints)
        if newest is not None and newest.name == f"checkpoint-{last}" and is_sharded():
            # Its adapter is in shards that only a training reads, so its last steps are repeated.
            _wait_for_everyone(self.trainee.device)
            if is_first():
                shutil.rmtree(newest)
            _wait_for_everyone(self.trainee.device)
            newest = newest_intact_checkpoint(checkpoints)
        self._reopen_if_sharded()
        places = self.rows.places
        if newest is None or newest.name != f"checkpoint-{last}":
            self._load(state)
            hooks = AttachedOffsets(places, self.rows.anchor.stored_as)
            collator = AnchoredCollator(
                self.rows.collate,
                OffsetReader(offsets),
                places,
                pinned=self.trainee.device.type == "cuda",
            )
            with ExitStack() as stack:
                stack.callback(collator.close)
                stack.enter_context(hooks.attached(self.trainee.inner))
                run_steps(
                    self.trainee,
                    self.rows.rows,
                    collator,
                    checkpoints,
                    self.report,
                    self.timer,
                    Segment(state.checkpoint, last, skipped, rate, hooks),
                )
            unshard_parameters(self.trainee.model)
        else:
            self._load(State(last, newest))

    def _keep_round(self, folder: Path, state: State, last: int, skipped: int) -> dict[str, Any]:
        """Save the adapter of a round that was trained, and return the round's figures."""
        adapter = self.trainee.training_inputs.adapter
        adapter.save(self.trainee.model, folder / "adapter", self._base_name)
        history = json.loads(
            (folder / "checkpoints" / f"checkpoint-{last}" / "trainer_state.json").read_text()
        )
        curve = [
            line | {"step": line["step"] + skipped}
            for line in history["log_history"]
            if "loss" in line and line["step"] > state.step
        ]
        return {"curve": curve}

    # The adapter.

    @property
    def _base_name(self) -> str:
        return self.trainee.built_emulator.source.name

    def _own_state(self) -> dict[str, Tensor]:
        adapter = self.trainee.training_inputs.adapter
        return {n: t.clone() for n, t in adapter.state(self.trainee.model).items()}

    def _reopen_if_sharded(self) -> None:
        """Load the emulator again, if a round has split its weights over the processes (FSDP)."""
        if self._is_used and is_sharded():
            one = self.trainee
            self.trainee = open_trainee(one.built_emulator, one.training_inputs, one.device)
        self._is_used = True

    def _load(self, state: State) -> None:
        """Put the adapter of a state into the model that is trained.

        Under FSDP the checkpoint is in shards, which the Trainer reads when it resumes.
        """
        if is_sharded() and state.checkpoint is not None:
            return
        trainee = self._trainee()
        adapter = trainee.training_inputs.adapter
        stored = self._fresh
        if state.checkpoint is not None:
            stored = load_file(state.checkpoint / STATE_FILE)
        adapter.restore(trainee.model, stored)

    # Results.

    def _note(
        self,
        position: int,
        state: State,
        losses: Mapping[str, RowLoss],
        change: Change | None,
        rate: float,
    ) -> None:
        """Keep the figures of a pass, and hand them on."""
        line: dict[str, Any] = {"step": position, "schedule_step": state.step, "rate": rate}
        if losses:
            line["original_loss"] = mean_loss(losses)
        if change is not None:
            line |= {"change": change.mean, "error": change.error, "rejected": change.is_worse}
        self.lines.append(line)
        if len(self.lines) <= len(self._reported_lines):
            return  # an interrupted attempt has reported this pass
        if losses:
            self.report(position, pass_values(line))
        if is_first():
            text = "".join(json.dumps(one) + "\n" for one in self.lines)
            write_text(self.folder / ROUNDS_FILE, text)

    def _finish(self, state: State, position: int, rejected: int) -> dict[str, Any]:
        # Other processes may still read what is deleted here.
        _wait_for_everyone(self.trainee.device)
        if is_first():
            write_curve(self.folder, self._curve)
            self._save_result(state)
            for path in (*self.folder.glob("pass-*"), *self.folder.glob("round-*")):
                shutil.rmtree(path)
        step_rows = rows_of_step(self.trainee.training_inputs.recipe, len(self.rows.rows))
        work = self.trainee.work(position * step_rows)
        work["row_forwards"] += self._row_forwards
        return {
            "trainable": self.trainee.trainable,
            "steps": state.step,
            "step_seconds": self.timer.median,
            "passes": self._passes,
            "rejected_rounds": rejected,
            **work,
        }

    def _save_result(self, state: State) -> None:
        """Write the adapter of a state as the training's own."""
        target = self.folder / "adapter"
        if state.adapter is not None:
            copy_adapter(state.adapter / "adapter", target)
            return
        self._reopen_if_sharded()
        self._load(state)
        adapter = self.trainee.training_inputs.adapter
        adapter.save(self.trainee.model, target, self._base_name)


def _wait_for_everyone(device: torch.device) -> None:
    """Wait until all processes of the launch are here; `device` is that of their trainings."""
    if world_size() > 1:
        PartialState(cpu=device.type == "cpu").wait_for_everyone()


def pass_values(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a pass for the training log; none if it measured no loss.

    The loss behind a rejected round has a name of its own, so that `original_loss` is the loss of
    the adapter with which the training goes on.
    """
    if "original_loss" not in line:
        return {}
    return {"rejected_loss" if line.get("rejected") else "original_loss": line["original_loss"]}


def _first_does(done: Path, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Let the first process of a launch do some work, and return what it has written to `done`.

    Raises:
        RuntimeError: the first process has failed.
    """
    status = StatusFile(done.with_suffix(".notice"))
    if is_first() and not done.exists():
        try:
            facts = work()
        except BaseException as error:
            status.write("failed", f"{type(error).__name__}: {error}")
            raise
        done.parent.mkdir(parents=True, exist_ok=True)
        write_json(done, facts)
    while not done.exists():
        state, text = status.read()
        if state == "failed":
            raise RuntimeError(text)
        time.sleep(POLL_SECONDS)
    result: dict[str, Any] = json.loads(done.read_text())
    return result
