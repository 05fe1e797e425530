"""The anchor stage: offsets of the first round of an anchored training, shared between runs.

In the first round the adapter changes nothing yet, so the offsets belong to the rows. They are kept
in a folder that all runs with the same original, emulator and places share, and a pass computes
only the rows that no earlier pass has left there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from filelock import FileLock

from emloc.anchors import Anchor
from emloc.anchors.batches import KeyedRow
from emloc.anchors.places import Place
from emloc.anchors.record import LOSSES_FILE, Original, RowLoss, Stretches
from emloc.anchors.shards import read_rows
from emloc.data.collate import EncodedRow
from emloc.emulators import Ranks
from emloc.emulators.size import bytes_of, factor_shapes
from emloc.errors import ConfigError
from emloc.runtime.digest import digest
from emloc.runtime.distributed import world_size
from emloc.runtime.keys import key_of
from emloc.runtime.manifest import seal
from emloc.runtime.stage_cache import Artifact, Facts
from emloc.stages import ANCHORS, Context, Stage
from emloc.stages.anchorable import require_anchorable
from emloc.stages.shared_passes import intact_passes, listed_passes, write_list
from emloc.stages.training.anchored_rows import AnchoredRows, disk_shortage
from emloc.stages.training.refit import Refittable, gradient_bytes
from emloc.stages.training.round_passes import FirstPass

log = logging.getLogger(__name__)

# Rows of which the size of a round is estimated before any stage begins: few, and more of them if
# a round that is so many times larger would not fit.
_FEW, _MORE = 8, 64
_MARGIN = 4


@dataclass(frozen=True, kw_only=True)
class RecordAnchors(Stage):
    """Stage that makes sure that the rows of the first round have offsets."""

    gives = ANCHORS

    def needed(self, context: Context) -> bool:
        """Return whether the training is anchored, with offsets that depend on no adapter."""
        run_config = context.run_config
        return run_config.anchor.anchors and is_shared(context)

    def check(self, context: Context) -> None:
        """Check that the emulator can be put back, and that the disk holds the first round.

        Raises:
            ConfigError: names the reason and an override that mends the settings.
        """
        anchor = context.run_config.anchor
        if not anchor.anchors or context.training_inputs is None:
            return
        layers, is_original = context.training_inputs.layers, context.plan is None
        places = require_anchorable(
            context.run_config, context.training_source, layers, is_original=is_original
        )
        _require_room(context, anchor, places)

    def inputs(self, context: Context) -> list[Any]:
        """Return the emulator, the format of the offsets, and what decides which rows are drawn."""
        inputs, anchor = context.training_inputs, context.run_config.anchor
        assert inputs is not None
        assert anchor.anchors
        recipe = inputs.recipe
        return [
            context.trained_emulator,
            anchor.key,
            inputs.examples,
            inputs.max_length,
            # Several processes make a step larger, so that a round draws more rows.
            [recipe.steps, recipe.batch * recipe.accumulate * world_size()],
            inputs.seed,
        ]

    def work(self, folder: Path, context: Context) -> Facts:
        """Compute the offsets that are missing; write the list of passes that hold the rows."""
        anchor = context.run_config.anchor
        assert anchor.anchors
        plan = context.anchored_rows
        key = digest([self.version, key_of(context.trained_emulator), anchor.offsets_key])
        shared = context.cache / "anchors" / key
        shared.mkdir(parents=True, exist_ok=True)
        rows = plan.of_steps(0, plan.round_ends[0])
        with FileLock(shared.with_suffix(".lock")):
            passes = intact_passes(shared, "anchor: the offsets")
            missing = _without(rows, [row for one in passes for s in read_rows(one) for row in s])
            measured = _without(plan.guard, [row for one in passes for row in _losses(one)])
            log.info("anchor: %d of %d rows have no offsets yet", len(missing), len(rows))
            if missing or measured:
                passes.append(_new_pass(shared, plan, missing, measured, context))
        write_list(folder, passes)
        return {"rows": len(rows), "computed_rows": len(missing)}


def is_shared(context: Context) -> bool:
    """Return whether the first round's offsets depend on no adapter, so that runs share them."""
    adapter = context.run_config.adapter
    return adapter.trains and adapter.starts_at_zero


def first_round(artifact: Artifact) -> FirstPass:
    """Return the passes that an artifact of the stage lists.

    Raises:
        DamagedError: one of them is missing or damaged, so the stage has to be computed again.
    """
    folders = listed_passes(artifact, "offsets")
    losses = {row: loss for folder in folders for row, loss in _losses(folder).items()}
    return FirstPass(folders, losses)


def _new_pass(
    shared: Path,
    plan: AnchoredRows,
    rows: Sequence[KeyedRow],
    measured: Sequence[KeyedRow],
    context: Context,
) -> Path:
    """Run a pass over rows without offsets, and return its folder."""
    target = shared / digest([row.key for row in (*rows, *measured)])
    draft = target.with_suffix(".partial")
    stretches = None
    if rows:
        emulator = context.trained_emulator.open(context.device)
        stretches = Stretches(
            emulator, plan.places, plan.anchor.stored_as, has_head_of_original=True
        )
    plan.record(
        draft,
        Original(context.training_source.skeleton(), context.training_source),
        stretches,
        rows,
        measured,
        device=context.device,
        limits=context.limits,
    )
    seal(draft)
    draft.replace(target)
    return target


def _losses(folder: Path) -> dict[str, RowLoss]:
    losses: dict[str, RowLoss] = json.loads((folder / LOSSES_FILE).read_text())
    return losses


def _without(rows: Sequence[KeyedRow], present: Sequence[str]) -> list[KeyedRow]:
    present_keys = {*present}
    return [row for row in rows if row.key not in present_keys]


def _require_room(context: Context, anchor: Anchor, places: Sequence[Place]) -> None:
    """Estimate the size of a round from some rows, before anything is computed.

    Raises:
        ConfigError: the disk is too small.
    """
    source, limit = context.source, context.run_config.budget.disk_gib
    refit = _refit_bytes(context, anchor)

    def shortage(count: int, factor: int) -> str | None:
        rows, encoded = _round_rows(context, anchor, count)
        tokens = [int(factor * rows * mean(map(place.count, encoded))) for place in places]
        return disk_shortage(anchor, source, tokens, context.cache, limit, refit)

    if shortage(_FEW, _MARGIN) and (line := shortage(_MORE, 1)):
        raise ConfigError(line)


def _refit_bytes(context: Context, anchor: Anchor) -> int:
    """Return the bytes that a fit of the emulator writes: gradients, and factors as large again."""
    source, run_config = context.training_source, context.run_config
    if not (anchor.refit and anchor.rounds > 1 and isinstance(run_config.emulator, Refittable)):
        return 0
    ranks: Ranks = context.plan or {}
    present = {layer: ranks[layer] for layer in source.emulated(ranks)}
    matrices = [m for name, k in present.items() for m in factor_shapes(source.linears[name], k)]
    factors = bytes_of(matrices, run_config.precision, source.dtype)
    return gradient_bytes(source, present) + factors


def _round_rows(context: Context, anchor: Anchor, count: int) -> tuple[float, list[EncodedRow]]:
    """Return how many rows a round has about, and `count` of the training rows, encoded."""
    inputs = context.training_inputs
    assert inputs is not None
    examples, recipe = inputs.examples, inputs.recipe
    reader = context.source.reader()
    encoded = [reader.encode(example) for example in examples.spread(count)]
    limit = inputs.max_length
    # Longer rows are left out of the training.
    short_rows = [row for row in encoded if limit is None or row.length <= limit]
    step_rows = recipe.batch * recipe.accumulate * world_size()
    return min(recipe.steps * step_rows / anchor.rounds, len(examples)), short_rows or encoded
