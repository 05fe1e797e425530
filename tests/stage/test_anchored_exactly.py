"""Anchored emulators compute the original exactly, and its gradient by their own Jacobians."""

import copy
import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import anchored
import pytest
import torch
from anchored import FLOAT64
from walked import SpoilingPool

import emloc.anchors.record as record_module
from emloc.adapters.dora import Dora
from emloc.adapters.lora import Lora
from emloc.adapters.streamed import AdaptedWeights
from emloc.anchors import Anchor
from emloc.anchors.blocks import Blocks
from emloc.anchors.formats import FORMATS
from emloc.anchors.logits import Logits
from emloc.anchors.recorder import OffsetRecorder
from emloc.calibration.offload import OffloadPool
from emloc.emulators import BuiltEmulator
from emloc.emulators.full import Full
from emloc.emulators.layer_drop import LayerDrop, block_stack
from emloc.emulators.prune import Prune
from emloc.emulators.svd import Svd
from emloc.models.block_names import find_block
from emloc.recovery.none import NoRecovery
from emloc.recovery.scatter import Scatter

SVD = Svd(algorithm="eigen", aware=True, multiple=1)
PRUNE = Prune(importance="random", spread="layer", first=0, last=0, seed=0)
COMMON = {"rounds": 1, "dtype": "float32", "guard": 0}
BLOCKS = Blocks(places=2, **COMMON)
LOGITS = Logits(**COMMON)
KINDS = {
    "svd": (SVD, 16, Lora(), NoRecovery()),
    "svd_nf4": (SVD, 4, Lora(), NoRecovery()),
    "nf4": (Full(), 4, Lora(), NoRecovery()),
    "prune": (PRUNE, 16, Lora(), Scatter()),
    "layer_drop_dora": (LayerDrop(first=1, last=1), 16, Dora(), NoRecovery()),
    "layer_drop": (LayerDrop(first=1, last=1), 16, Lora(), NoRecovery()),
}


@pytest.fixture(scope="module")
def source(made_once):
    return anchored.tiny_source(made_once, blocks=6)


@pytest.fixture(scope="module")
def model_of(source, tmp_path_factory):
    """Function that returns an original and its emulator with one adapter, and their offsets."""

    @cache
    def built(kind: str) -> BuiltEmulator:
        emulator, bits, _, _ = KINDS[kind]
        # Packed weights are read in 32 bits at most.
        own = anchored.in_float64(source) if bits == 16 else source
        return anchored.build_emulator(tmp_path_factory.mktemp(kind), own, emulator, bits, 0.75)

    def model(folder: Path, kind: str, anchor: Anchor) -> anchored.Anchored:
        _, bits, adapter, recovery = KINDS[kind]
        stored_as = FLOAT64 if bits == 16 else FORMATS["float32"]
        places = anchor.find(source.meta_model, block_stack(source))
        return anchored.record_anchors(
            folder, built(kind), adapter, recovery, places, stored_as=stored_as
        )

    return model


def names_read(monkeypatch) -> list[str]:
    """Return a list of the original's parameters, to which those read from now on are added."""
    read, fill = [], AdaptedWeights.fill

    def note(self, model, names, device, ahead=None):
        names = list(names)
        read.extend(names)
        fill(self, model, names, device, ahead)

    monkeypatch.setattr(AdaptedWeights, "fill", note)
    return read


@pytest.mark.parametrize("anchor", [BLOCKS, LOGITS], ids=["blocks", "logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_loss_are_the_original_s(tmp_path, model_of, kind, anchor):
    """With the reference adapter, also one that is no zero, for batches of unequal lengths."""
    pair = model_of(tmp_path, kind, anchor)
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


@pytest.mark.parametrize("kind", ["svd", "layer_drop"])
def test_offsets_are_the_same_if_hidden_states_leave_the_device(
    tmp_path, model_of, kind, monkeypatch
):
    files = {}
    for pool in (OffloadPool, SpoilingPool):
        monkeypatch.setattr("emloc.calibration.blockwise.OffloadPool", pool)
        folder = tmp_path / pool.__name__
        model_of(folder, kind, BLOCKS)
        files[pool] = {path.name: path.read_bytes() for path in folder.rglob("place-*")}
    assert SpoilingPool.pools[-1].fetched
    assert files[OffloadPool] == files[SpoilingPool] != {}


def test_offsets_belong_to_tokens_wherever_the_padding_is(tmp_path, model_of):
    """Recorded with padding on the left, read for a batch with padding on the right."""
    pair = model_of(tmp_path, "svd", BLOCKS)
    pair = replace(pair, collate=anchored.collate_right)
    some = [anchored.rows()[index] for index in (4, 0, 2)]
    batch = pair.batch(some)
    with torch.no_grad():
        targets = anchored.states_at(pair.original, pair.places, batch)
        apart = anchored.states_at(pair.emulator, pair.places, batch)
        with pair.put_back(some):
            states = anchored.states_at(pair.emulator, pair.places, batch)
            loss = pair.emulator(**batch).loss
        assert abs(loss - pair.original(**batch).loss) < 2e-6
    for state, target, other in zip(states, targets, apart, strict=True):
        # Tables of rotary positions are in float32, and the positions begin elsewhere.
        torch.testing.assert_close(state, target, rtol=0, atol=2e-6)
        assert (other - target).abs().max() > 1e-2


@pytest.mark.parametrize("last_block", [2, 5])
@pytest.mark.usefixtures("every_place_marked")
def test_a_killed_pass_reads_no_weights_of_finished_blocks(
    tmp_path, model_of, monkeypatch, last_block
):
    """Killed behind the first place, or behind the last one with the losses still to compute."""
    finish = OffsetRecorder.finish_place_behind

    def kill(self, block):
        finish(self, block)
        if block == f"model.layers.{last_block}":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OffsetRecorder, "finish_place_behind", kill)
        with pytest.raises(KeyboardInterrupt):
            model_of(tmp_path, "svd", BLOCKS)
    read = names_read(monkeypatch)
    pair = model_of(tmp_path, "svd", BLOCKS)
    blocks = {find_block(name) for name in read} - {None}
    assert blocks == {f"model.layers.{index}" for index in range(last_block + 1, 6)}
    assert "lm_head.weight" not in read  # the emulator has it
    losses = json.loads((tmp_path / "offsets" / record_module.LOSSES_FILE).read_text())
    for row in anchored.rows():
        with torch.no_grad(), pair.put_back([row]):
            loss = pair.emulator(**pair.batch([row])).loss
        total, items = losses[row.key]
        assert loss == pytest.approx(total / items, abs=2e-6)


def test_a_tied_embedding_of_the_emulator_is_used_for_both(tmp_path, made_once, monkeypatch):
    source = anchored.tiny_source(made_once, blocks=6, tied=True)
    built = anchored.build_emulator(tmp_path, source, SVD, 16, 0.75)
    places = BLOCKS.find(source.meta_model, block_stack(source))
    read = names_read(monkeypatch)
    record = partial(anchored.record_anchors, stored_as=FORMATS["float32"])
    pair = record(tmp_path / "pass", built, Lora(), NoRecovery(), places)
    assert {"model.layers.0.input_layernorm.weight", "model.norm.weight"} <= {*read}
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & {*read}
    losses = json.loads((tmp_path / "pass" / "offsets" / record_module.LOSSES_FILE).read_text())
    for row in anchored.rows():
        with torch.no_grad(), pair.put_back([row]):
            loss = pair.emulator(**pair.batch([row])).loss
        total, items = losses[row.key]
        assert loss == pytest.approx(total / items, abs=2e-5)


def test_only_a_head_that_is_the_original_s_is_used_for_both(model_of, tmp_path):
    """Another head, or a trained one, does not change the losses of the original."""
    pair = model_of(tmp_path, "svd", BLOCKS)
    owner, model = pair.emulator, copy.deepcopy(pair.original)
    head = model.lm_head.weight.detach().clone()
    names = ["lm_head.weight"]
    assert record_module._share_parameters(owner, model, names) == []
    assert model.lm_head.weight.data_ptr() == owner.lm_head.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, head)
    for change in (
        lambda weight: weight.requires_grad_(),
        lambda weight: setattr(weight, "data", weight.data.float()),
        lambda weight: setattr(weight, "data", weight.data[:-1]),
    ):
        other = copy.deepcopy(owner)
        change(other.lm_head.weight)
        assert record_module._share_parameters(other, model, names) == names


def gradients_by_stretches(emulator, places, targets, batch) -> dict[str, torch.Tensor]:
    """Return the gradient of the adapter by the chain rule at the hidden states `targets`.

    The emulator is cut behind each place. The loss is differentiated by the hidden states of the
    last place, then each stretch by those of the place before it.
    """
    outputs, inputs, handles = [], [], []
    mask = batch["attention_mask"].bool()
    for place, target in zip(places, targets, strict=True):

        def cut(hidden, target=target):
            outputs.append(hidden)
            leaf = hidden.detach().clone()
            leaf[mask] = target
            inputs.append(leaf.requires_grad_())
            return inputs[-1]

        handles.append(place.attach(emulator, cut))
    loss = emulator(**batch).loss
    for handle in handles:
        handle.remove()
    parameters = {n: p for n, p in emulator.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    (slope,) = torch.autograd.grad(loss, inputs[-1])
    for index in reversed(range(len(outputs))):
        before = inputs[index - 1 : index] if index else []
        slopes = torch.autograd.grad(
            outputs[index], [*before, *parameters.values()], slope, allow_unused=True
        )
        for name, part in zip(parameters, slopes[len(before) :], strict=True):
            totals[name] += 0 if part is None else part
        slope = slopes[0]
    return totals


def test_gradients_are_the_chain_rule_through_the_stretches(tmp_path, model_of):
    """At the activations of the original, with its loss; they differ from the emulator's own."""
    anchor = replace(BLOCKS, places=[1, 3])
    pair = model_of(tmp_path, "svd", anchor)
    some = anchored.rows()[:4]
    batch = pair.batch(some)
    with torch.no_grad():
        targets = anchored.states_at(pair.original, pair.places, batch)
    assert len(targets) == 3
    expected = gradients_by_stretches(pair.emulator, pair.places, targets, batch)

    def gradients() -> dict[str, torch.Tensor]:
        pair.emulator.zero_grad()
        pair.emulator(**batch).loss.backward()
        named = pair.emulator.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.requires_grad}

    with pair.put_back(some):
        measured = gradients()
    plain = gradients()
    assert len(measured) == 2 * 6 * 7
    for name, gradient in measured.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-9)
        assert (plain[name] - gradient).norm() > 1e-3 * gradient.norm()


def test_rounding_does_not_add_up_over_places(tmp_path, made_once):
    """Each offset also takes back the rounding of the offset before it."""
    source = anchored.tiny_source(made_once, blocks=10)
    (tmp_path / "emulator").mkdir()
    built = anchored.build_emulator(tmp_path, source, Full(), 4)
    places = replace(BLOCKS, places=10).find(source.meta_model, block_stack(source))
    for dtype in ("int8", "bfloat16"):
        pair = anchored.record_anchors(
            tmp_path / dtype, built, Lora(), NoRecovery(), places, stored_as=FORMATS[dtype]
        )
        some = anchored.rows()[:3]
        batch = pair.batch(some)
        with torch.no_grad():
            targets = anchored.states_at(pair.original, places, batch)
            with pair.put_back(some):
                states = anchored.states_at(pair.emulator, places, batch)
            roundings, open_errors = _open_loop(pair, places, targets, batch)
        for state, target, rounding in zip(states, targets, roundings, strict=True):
            # In bfloat16 a rounding may be twice as large just above a power of two.
            assert (state - target).abs().max() < 2.1 * rounding
        closed = (states[-1] - targets[-1]).norm()
        assert open_errors[-1] > 2 * closed > 0


def _open_loop(pair, places, targets, batch) -> tuple[list[float], list[torch.Tensor]]:
    """Return each place's largest rounding, and the errors of offsets that ignore the others'."""
    mask, width = batch["attention_mask"].bool(), targets[0].shape[-1]
    offsets, roundings, errors = [], [], []

    def take(hidden, target):
        exact = target - hidden[mask]
        offsets.append(pair.stored_as.decode(pair.stored_as.encode(exact), width).float())
        roundings.append(float((offsets[-1] - exact).abs().max()))
        hidden = hidden.clone()
        hidden[mask] = target
        return hidden

    def add(hidden, target):
        hidden = hidden.clone()
        hidden[mask] += offsets[len(errors)]
        errors.append((hidden[mask] - target).norm())
        return hidden

    for change in (take, add):
        handles = [
            place.attach(pair.emulator, partial(change, target=target))
            for place, target in zip(places, targets, strict=True)
        ]
        pair.emulator(**batch)
        for handle in handles:
            handle.remove()
    return roundings, errors
