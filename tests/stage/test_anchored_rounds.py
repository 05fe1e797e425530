"""Rounds of an anchored training: exact at each start, undone if worse, resumed to the bit."""

import anchored
import pytest
import torch
from staged import curve_of
from tiny import save_checkpoint

from emloc.anchors.blocks import Blocks
from emloc.anchors.logits import Logits
from emloc.emulators.svd import Svd
from emloc.models.checkpoint.source import Source
from emloc.stages.training.rounds import Rounds

SVD = Svd(algorithm="eigen", aware=True, multiple=1)
COMMON = {"rounds": 3, "dtype": "float32", "guard": 2, "disk_gib": 1.0}
BLOCKS = Blocks(places=2, **COMMON)
LOGITS = Logits(**COMMON)


@pytest.fixture(scope="module")
def built(made_once, tmp_path_factory):
    """An emulator of a model with two blocks."""
    folder = made_once("checkpoint", save_checkpoint)
    source = Source(folder, "tiny", "0", torch.float32)
    return anchored.build_emulator(tmp_path_factory.mktemp("emulator"), source, SVD, 16)


def record_losses(monkeypatch) -> list[dict]:
    """Return a list that gets, of each pass, the losses of all its rows."""
    passes, real = [], Rounds._record

    def record(self, folder, *rest):
        facts = real(self, folder, *rest)
        passes.append(facts["losses"])
        return facts

    monkeypatch.setattr(Rounds, "_record", record)
    return passes


def loss_of_step(training: Rounds, step: int, losses: dict) -> float:
    """Return the mean loss of a step's answer tokens that a pass has measured."""
    measured = [losses[row.key] for row in training.rows.of_steps(step, step + 1)]
    return sum(loss for loss, _ in measured) / sum(items for _, items in measured)


@pytest.mark.parametrize("anchor", [BLOCKS, LOGITS], ids=["blocks", "logits"])
@pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])
def test_each_round_begins_with_the_loss_of_the_original(
    tmp_path, built, monkeypatch, anchor, lean
):
    """With the adapter of its start; other steps have other losses."""
    passes = record_losses(monkeypatch)
    training = anchored.rounds(tmp_path / "training", built, anchor, lean=lean, accumulate=2)
    facts = training.run()
    assert facts["passes"] == 4
    curve = curve_of(training.folder)
    assert [line["step"] for line in curve] == [1, 2, 3, 4, 5, 6]
    for losses, step in zip(passes, [0, 2, 4], strict=False):
        assert curve[step]["loss"] == pytest.approx(loss_of_step(training, step, losses), abs=2e-5)
        # The adapter has changed since the pass.
        later = loss_of_step(training, step + 1, losses)
        assert abs(curve[step + 1]["loss"] - later) > 1e-3
