"""What runs the original in an anchored training: passes that record offsets, and fits.

Each pass and each fit is made with the adapter of a state, and once: its files in the training's
folder are found again when the training was killed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from emloc.adapters.streamed import load_unread
from emloc.anchors.record import Original, RowLoss, Stretches
from emloc.calibration.offload import StateLimits
from emloc.emulators.operations import block_operations
from emloc.recovery import Recovery, RecoveryInputs
from emloc.recovery.none import NoRecovery
from emloc.runtime.attempts import attempt
from emloc.runtime.distributed import first_does, is_first, is_sharded
from emloc.runtime.stage_cache import Artifact
from emloc.stages.training.anchored_rows import AnchoredRows
from emloc.stages.training.refit import Refit, with_folder
from emloc.stages.training.round_trainee import RoundTrainee, State


@dataclass(frozen=True)
class FirstPass:
    """The offsets of the first round, if they were recorded before the training."""

    folders: list[Path]
    losses: Mapping[str, RowLoss]


@dataclass
class RoundPasses:
    """The passes of one training, in its folder."""

    folder: Path
    trainee: RoundTrainee
    rows: AnchoredRows
    recovery: Recovery
    first_pass: FirstPass | None
    limits: StateLimits
    refit: Refit | None  # None: all rounds have the same emulator
    count: int = 0  # of the passes so far
    row_forwards: float = 0.0  # of the passes and fits so far

    def __post_init__(self) -> None:
        self._first_emulator = self.trainee.emulator
        self._counted_fits: set[Path] = set()

    def run(self, state: State, first: int, end: int) -> tuple[list[Path], dict[str, RowLoss]]:
        """Record the offsets of the steps from `first` to `end` with the adapter of `state`.

        Returns:
            Folders of the offsets, and the original's losses on the rows of the guard.
        """
        if first == end and not self.rows.guard:
            return [], {}
        number, self.count = self.count, self.count + 1
        keys = {row.key for row in self.rows.guard}
        if number == 0 and self.first_pass is not None:
            losses = {row: loss for row, loss in self.first_pass.losses.items() if row in keys}
            return self.first_pass.folders, losses
        folder = self.folder / f"pass-{number:03d}"
        facts = first_does(
            folder / "finished.json", lambda: self._record(folder, state, first, end)
        )
        self.row_forwards += facts["row_forwards"]
        return [folder], {r: (s, n) for r, (s, n) in facts["losses"].items() if r in keys}

    def drop(self, offsets: Sequence[Path]) -> None:
        """Delete offsets that no step needs any more, unless other runs share them."""
        if is_first():
            for one in offsets:
                if one.parent == self.folder:
                    for path in one.glob("place-*"):
                        path.unlink()

    def _record(self, folder: Path, state: State, first: int, end: int) -> dict[str, Any]:
        rows = self.rows.of_steps(first, end)
        folder.mkdir(exist_ok=True)
        with (
            attempt(folder) as spent,
            self._stretches(state, folder, needed=bool(rows)) as stretches,
        ):
            losses = self.rows.record(
                folder,
                self._original(state, folder),
                stretches,
                rows,
                self.rows.guard,
                device=self.trainee.device,
                limits=self.limits,
            )
        return {
            "losses": losses,
            "row_forwards": spent.operations / block_operations(self.rows.source),
        }

    # Both models with the adapter of a state.

    def _original(self, state: State, folder: Path) -> Original:
        """Return the original with the adapter as the recovery carries it."""
        source = self.trainee.source
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
                    built_emulator=self.trainee.emulator,
                    samples=None,
                    training_inputs=None,
                    device=self.trainee.device,
                ),
            )
            draft.replace(carried)
        adapter = self.trainee.training_inputs.adapter
        return Original(*load_unread(source, adapter, carried / "adapter"))

    def _saved_adapter(self, state: State, folder: Path) -> Path | None:
        """Return the folder of a state's adapter; None for a new one that changes nothing."""
        if state.adapter is not None:
            return state.adapter / "adapter"
        if self.trainee.training_inputs.adapter.starts_at_zero:
            return None
        saved = folder / "new_adapter" / "adapter"
        if not saved.exists():
            self.trainee.load(state, whole=True)
            self.trainee.save(saved)
        return saved

    @contextmanager
    def _stretches(self, state: State, folder: Path, *, needed: bool) -> Iterator[Stretches | None]:
        """Yield the emulator with the adapter of `state`; None if no row needs offsets."""
        if not needed:
            yield None
            return
        places, stored_as = self.rows.places, self.rows.anchor.stored_as
        adapter = self.trainee.training_inputs.adapter
        if is_sharded():
            # The other processes take no part in a pass, and the trained model needs all of them.
            trainee = self.trainee.open()
            model: Any = trainee.built_emulator.open(trainee.device)
            if trained := self._saved_adapter(state, folder):
                model = adapter.base(adapter.load(model, trained))
            yield Stretches(model, places, stored_as, trainee.context, has_head_of_original=True)
            return
        trainee = self.trainee.load(state)
        with adapter.training(trainee.model, mixed=trainee.mixed):
            yield Stretches(
                trainee.inner, places, stored_as, trainee.context, has_head_of_original=True
            )

    # The emulator of a round.

    def choose_emulator(self, state: State) -> None:
        """Let the next round train through the emulator fitted to the adapter of `state`."""
        if self.refit is None:
            return
        self.trainee.emulator = self._first_emulator
        if state.adapter is None:
            return
        folder = state.adapter / "emulator"
        fit = partial(self._fit, self.refit, folder, state, state.adapter)
        facts = first_does(state.adapter / "refit.json", fit)
        if folder not in self._counted_fits:
            self._counted_fits.add(folder)
            self.row_forwards += facts["row_forwards"]
        self.trainee.emulator = with_folder(self._first_emulator, folder)

    def _fit(self, refit: Refit, folder: Path, state: State, saved: Path) -> dict[str, Any]:
        """Fit the first emulator to the adapter of `state`, and write it into `folder`."""
        original = partial(self._original, state, saved)
        folder.mkdir(parents=True, exist_ok=True)
        self.trainee.load(state)
        row_forwards = refit.run(folder, self.trainee, original, limits=self.limits)
        return {"row_forwards": row_forwards}
