"""Anchored emulators compute the original exactly, and its gradient by their own Jacobians."""

from functools import partial

import anchored
import pytest
import torch
from anchored import FLOAT64
from tiny import save_checkpoint

from emloc.adapters.dora import Dora
from emloc.adapters.lora import Lora
from emloc.anchors.blocks import Blocks
from emloc.anchors.formats import FORMATS
from emloc.anchors.logits import Logits
from emloc.emulators.full import Full
from emloc.emulators.layer_drop import LayerDrop, block_stack
from emloc.emulators.svd import Svd
from emloc.models.checkpoint.source import Source
from emloc.recovery.none import NoRecovery

SVD = Svd(algorithm="eigen", aware=True, multiple=1)
COMMON = {"rounds": 1, "dtype": "float32", "guard": 0, "disk_gib": 1.0}
BLOCKS = Blocks(places=2, **COMMON)
LOGITS = Logits(**COMMON)
KINDS = {
    "svd": (SVD, 16, Lora(), NoRecovery()),
    "svd_nf4": (SVD, 4, Lora(), NoRecovery()),
    "nf4": (Full(), 4, Lora(), NoRecovery()),
    "layer_drop_dora": (LayerDrop(first=1, last=1), 16, Dora(), NoRecovery()),
    "layer_drop": (LayerDrop(first=1, last=1), 16, Lora(), NoRecovery()),
}


@pytest.fixture(scope="module")
def source(made_once):
    folder = made_once("blocks_6", partial(save_checkpoint, num_hidden_layers=6))
    return Source(folder, "tiny", "0", torch.float32)


def anchored_model(folder, source, kind, anchor) -> anchored.Anchored:
    emulator, bits, adapter, recovery = KINDS[kind]
    if bits == 16:  # packed weights are read in 32 bits at most
        source, settings = anchored.in_float64(source), {"stored_as": FLOAT64}
    else:
        settings = {"stored_as": FORMATS["float32"]}
    (folder / "emulator").mkdir()
    built = anchored.build_emulator(folder / "emulator", source, emulator, bits, 0.75)
    places = anchor.find(source.meta_model, block_stack(source))
    return anchored.record_anchors(folder, built, adapter, recovery, places, **settings)


@pytest.mark.parametrize("anchor", [BLOCKS, LOGITS], ids=["blocks", "logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_loss_are_the_original_s(tmp_path, source, kind, anchor):
    """With the reference adapter, also one that is no zero, for batches of unequal lengths."""
    pair = anchored_model(tmp_path, source, kind, anchor)
    exact = {"rtol": 0, "atol": 1e-9 if KINDS[kind][1] == 16 else 2e-5}
    some = anchored.rows()[1:5]
    batch = pair.batch(some)
    with torch.no_grad():
        wanted, loss = pair.original(**batch), pair.original(**batch).loss
        apart = pair.emulator(**batch).loss
        with pair.put_back(some):
            found = pair.emulator(**batch)
            states = anchored.states_at(pair.emulator, pair.places, batch)
        targets = anchored.states_at(pair.original, pair.places, batch)
    for state, target in zip(states, targets, strict=True):
        torch.testing.assert_close(state, target, **exact)
    is_answer = batch["labels"][:, 1:] != -100
    torch.testing.assert_close(
        found.logits[:, :-1][is_answer], wanted.logits[:, :-1][is_answer], **exact
    )
    assert abs(found.loss - loss) < 2e-6  # transformers computes the loss in float32
    assert abs(apart - loss) > 1e-4
