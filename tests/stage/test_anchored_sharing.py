"""Offsets of the first round are shared between runs, and computed again if they are damaged."""

import json
from dataclasses import replace

import pytest
from staged import losses_of

from emloc.config.compose import compose
from emloc.pipeline import _through_stages, checked
from emloc.stages.run_config import build

ANCHORED = (
    *("method=qlora_anchored", "anchor.places=2", "anchor.rounds=2", "anchor.guard=4"),
    "train.steps=4",
)
STAGES = ("calibrate", "emulate", "anchor")


@pytest.fixture
def anchor(tiny, store):
    """Function that runs the stages up to the anchors; it returns facts and keys of all rows."""

    def run(*overrides: str) -> tuple[dict, set[str]]:
        config = build(compose([*tiny, *ANCHORED, *overrides]))
        _, context = checked(config, store, lambda *_: None)
        some = {name: stage for name, stage in config.stage.items() if name in STAGES}
        context = replace(context, run_config=replace(context.run_config, stage=some))
        artifact = _through_stages(context, store).artifacts["anchor"]
        folders = json.loads((artifact.folder / "passes.json").read_text())
        rows = [row for one in folders for row in rows_in(one)]
        assert len(rows) == len({*rows})  # no row is in two passes
        return artifact.facts, {*rows}

    return run


def rows_in(folder: str) -> list[str]:
    with open(f"{folder}/rows.json") as file:
        return [row for shard in json.load(file) for row in shard]


def test_runs_share_the_offsets_of_the_first_round(anchor, monkeypatch):
    """Whatever their learning rates, ranks and seeds: no row is computed twice."""
    first, rows = anchor()
    assert first["computed_rows"] == first["rows"] == len(rows) == 8
    assert anchor("train.learning_rate=0.01", "lora.rank=2")[0] == first  # the same artifact
    other, more = anchor("seed=7")
    assert rows < more
    assert other["rows"] == 8
    assert other["computed_rows"] == len(more - rows)
    longer, most = anchor("train.steps=12")
    assert more < most
    assert longer["rows"] == 24
    assert longer["computed_rows"] == len(most - more) < 24
    # Two processes draw twice as many rows with equal settings.
    monkeypatch.setenv("WORLD_SIZE", "2")
    both, _ = anchor()
    assert (both["rows"], both["computed_rows"] < 16) == (16, True)


def test_other_offsets_are_not_shared(anchor):
    """Those of other places, formats, weights and emulators."""
    _, rows = anchor()
    for override in (
        "anchor.places=[0]",
        "anchor.dtype=int8",
        "model.dtype=bfloat16",
        "compression.bits=16 emulator=svd compression.ratio=0.5",
    ):
        other, same = anchor(*override.split())
        assert (other["computed_rows"], same) == (8, rows)


def test_damaged_offsets_are_computed_again(run_uncached, store):
    """Here the training finds them damaged, while the artifact of the stage is intact."""
    first = run_uncached(*ANCHORED)
    (shard,) = store.root.glob("anchors/*/*/place-001-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    again = run_uncached(*ANCHORED, "train.learning_rate=0.003")
    assert again.stages["anchor"].facts["computed_rows"] == 8
    assert losses_of(again)[0] == losses_of(first)[0]
