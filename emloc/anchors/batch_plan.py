"""Plan a pass: how its rows become batches, and which batches share a file of offsets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from emloc.anchors.batches import KeyedRow
from emloc.anchors.shards import write_rows
from emloc.calibration.batch_size import group_by_tokens
from emloc.runtime.atomic import write_json

# Bytes of offsets at one place in one file, about.
SHARD_BYTES = 128 * 2**20


@dataclass(frozen=True)
class BatchPlan:
    """Batches of row indices: those with offsets come first, and each shard is some of them."""

    batches: list[list[int]]
    shards: list[list[int]]  # indices of batches


def batch_plan(
    folder: Path,
    anchored: Sequence[KeyedRow],
    measured: Sequence[KeyedRow],
    *,
    batch_tokens: int,
    token_bytes: int | None,
) -> BatchPlan:
    """Return the batches and shards of a pass, as an interrupted attempt has begun with them.

    Args:
        folder: of the offsets, where the plan is kept.
        anchored: rows that get offsets.
        measured: rows behind them that get none.
        batch_tokens: most tokens of one batch, padding included.
        token_bytes: bytes of the offset of one token at one place; None: there are no offsets.
    """
    path = folder / "plan.json"
    if not path.exists():
        batches, offset = group_by_tokens(_lengths(anchored), batch_tokens), len(anchored)
        shards = [] if token_bytes is None else _shards(anchored, batches, token_bytes)
        write_rows(
            folder, [[anchored[i].key for b in shard for i in batches[b]] for shard in shards]
        )
        more = group_by_tokens(_lengths(measured), batch_tokens)
        batches += [[offset + index for index in batch] for batch in more]
        write_json(path, {"batches": batches, "shards": shards})
    return BatchPlan(**json.loads(path.read_text()))


def _lengths(rows: Sequence[KeyedRow]) -> list[int]:
    return [row.length for row in rows]


def _shards(
    rows: Sequence[KeyedRow], batches: Sequence[Sequence[int]], token_bytes: int
) -> list[list[int]]:
    """Return indices of batches in shards of about `SHARD_BYTES`."""
    shards: list[list[int]] = []
    sizes = [sum(rows[index].length for index in batch) * token_bytes for batch in batches]
    for index, end in enumerate(accumulate(sizes)):
        shard = (end - sizes[index]) // SHARD_BYTES
        if shard >= len(shards):
            shards.append([])
        shards[-1].append(index)
    return shards
