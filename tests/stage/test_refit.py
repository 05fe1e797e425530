"""Emulators that are fitted anew to what the loss of an anchored training depends on."""

from dataclasses import replace
from functools import partial

import anchored
import pytest
import torch
from safetensors.torch import load_file

import emloc.stages.training.refit as refit_module
from emloc.anchors.blocks import Blocks
from emloc.anchors.record import Original, Stretches
from emloc.calibration.blockwise import by_block
from emloc.calibration.offload import StateLimits
from emloc.emulators.full import Full, block_linears
from emloc.emulators.svd import Svd
from emloc.stages.training.anchored_rows import anchored_rows
from emloc.stages.training.refit import (
    Refit,
    gradient_bytes,
    gradient_tokens,
    refit_of,
    with_folder,
)
from emloc.stages.training.round_passes import RoundPasses
from emloc.stages.training.round_trainee import RoundTrainee, State
from emloc.stages.training.trainee import open_trainee
from emloc.tensors.linalg.sensitivity import output_root

SVD = Svd(algorithm="eigen", aware=True, multiple=1)
ANCHOR = Blocks(places=2, rounds=3, dtype="float32", guard=2, refit=True)


ATTENTION = "model.layers.0.self_attn"


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def source(made_once):
    return anchored.tiny_source(made_once, blocks=3)


@pytest.fixture(scope="module", params=["none", "inputs"])
def built(source, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("emulator")
    return anchored.build_emulator(folder, source, replace(SVD, shared=request.param), 16, 0.5)


def weights_of(model, layers) -> dict[str, torch.Tensor]:
    return {name: model.get_submodule(name).product().double() for name in layers}


def test_the_fitted_emulator_loses_less_of_what_the_loss_depends_on(
    tmp_path, source, built, monkeypatch
):
    """Compared with the emulator before, by the emulator's gradients and the original's inputs."""
    kept = {}
    real = refit_module._read_gradients

    def keep(folder, block):
        kept.update(gradients := real(folder, block))
        return gradients

    monkeypatch.setattr(refit_module, "_read_gradients", keep)
    inputs = anchored.training_inputs(built)
    rows = anchored_rows(ANCHOR, source, inputs, disk_gib=1.0)
    refit = refit_of(rows, anchored.samples(), built)
    folder = tmp_path / "fitted"
    folder.mkdir()
    forwards = refit.run(
        folder,
        RoundTrainee(open_trainee(built, inputs, anchored.CPU), kept_passes=None),
        lambda: Original(source.skeleton(), source),
        limits=StateLimits(host=2**30),
    )
    assert forwards > 2 * len(refit.samples.examples)  # two passes of the original
    assert not (tmp_path / "fitted.work").exists()
    before, after = (
        weights_of(one.open(anchored.CPU), refit.ranks)
        for one in (built, with_folder(built, folder))
    )
    _, inputs_of = exact_moments(source, refit)
    # Below the first adapter no gradient passes, so these weights do not matter.
    assert refit.ranks.keys() - kept == {f"{ATTENTION}.{part}_proj" for part in "kv"}
    for name in kept:
        root, original = output_root(kept[name].float()), source.weight(name).double()
        losses = [
            float((root @ (original - one[name]) @ inputs_of[name].T).square().sum())
            for one in (before, after)
        ]
        assert losses[1] < losses[0], name


def test_a_large_model_keeps_the_gradients_of_fewer_tokens(tmp_path, source, built, monkeypatch):
    counts = {}
    real = refit_module._read_gradients

    def count(folder, block):
        gradients = real(folder, block)
        counts.update({name: len(rows) for name, rows in gradients.items()})
        return gradients

    monkeypatch.setattr(refit_module, "_read_gradients", count)
    inputs = anchored.training_inputs(built)
    refit = refit_of(anchored_rows(ANCHOR, source, inputs, disk_gib=1.0), anchored.samples(), built)
    tokens = sum(row.length for row in refit.encoded())
    outputs = sum(source.linears[name][0] for name in refit.ranks)
    assert gradient_bytes(source, refit.ranks) == 4096 * outputs * 4
    monkeypatch.setattr(refit_module, "GRADIENT_BYTES", tokens // 4 * outputs * 4)
    assert gradient_tokens(source, refit.ranks) == tokens // 4
    (tmp_path / "fitted").mkdir()
    refit.run(
        tmp_path / "fitted",
        RoundTrainee(open_trainee(built, inputs, anchored.CPU), kept_passes=None),
        lambda: Original(source.skeleton(), source),
        limits=StateLimits(host=2**30),
    )
    batches = len(refit.encoded())  # each rounds its share up
    assert set(counts.values()) <= set(range(tokens // 4, tokens // 4 + batches + 1))
    assert counts


def test_the_gradients_through_an_exact_emulator_are_the_original_s(tmp_path, source):
    """At all tokens but padding, with fused layers and activations computed again."""
    layers = block_linears(source)
    (tmp_path / "emulator").mkdir()
    built = anchored.build_emulator(tmp_path / "emulator", source, Full(), 16)
    inputs = anchored.training_inputs(built)
    rows = anchored_rows(ANCHOR, source, inputs, disk_gib=1.0)
    refit = Refit(rows, anchored.samples(), dict.fromkeys(layers, 1))
    trainee, encoded = open_trainee(built, inputs, anchored.CPU), refit.encoded()
    refit.rows.record(
        *(tmp_path / "offsets", Original(source.skeleton(), source)),
        Stretches(trainee.inner, refit.rows.places, ANCHOR.stored_as),
        *(encoded, []),
        device=anchored.CPU,
        limits=StateLimits(),
    )
    refit._write_gradients(tmp_path, trainee, encoded)
    exact, _ = exact_moments(source, refit)
    for block, names in by_block(layers).items():
        gradients = refit_module._read_gradients(tmp_path, block)
        for name in gradients.keys() & names:
            torch.testing.assert_close(
                gram_of(gradients[name]), gram_of(exact[name]), rtol=1e-3, atol=1e-5
            )


def gram_of(rows: torch.Tensor) -> torch.Tensor:
    return rows.double().T @ rows.double()


def exact_moments(source, refit):
    """Return each layer's output gradients and inputs in the original, on the samples."""
    model = source.load(anchored.CPU).train()
    gradients, inputs = ({name: [] for name in refit.ranks} for _ in range(2))
    for name in refit.ranks:

        def watch(_, args, output, name=name):
            inputs[name].append(args[0].detach().flatten(0, 1).double())
            output.register_hook(lambda g: gradients[name].append(g.flatten(0, 1).double()))

        model.get_submodule(name).register_forward_hook(watch)
    model.get_input_embeddings().weight.requires_grad_(True)
    reader = source.reader()
    for example in refit.samples.examples:  # one at a time, so that there is no padding
        batch = reader.collate([reader.encode(example)])
        (model(**batch).loss * source.objective.items(batch)).backward()
    return tuple(
        {name: torch.cat(parts) for name, parts in one.items()} for one in (gradients, inputs)
    )


def test_a_fit_that_two_rounds_begin_with_is_counted_once(tmp_path, built, monkeypatch):
    """As those of a rejected round and of the round behind it."""
    training = anchored.rounds(tmp_path, built, ANCHOR, calibration=anchored.samples())
    monkeypatch.setattr(RoundPasses, "_fit", lambda *_: {"row_forwards": 5.0})
    for _ in range(2):
        training.passes.choose_emulator(State(2, None, tmp_path / "round"))
    assert training.passes.row_forwards == 5.0


def results(training) -> tuple:
    facts = training.run()
    adapter = load_file(training.folder / "adapter" / "adapter_model.safetensors")
    lines = (training.folder / "anchors.jsonl").read_text()
    return ({name: tensor.tolist() for name, tensor in adapter.items()}, lines), facts


def test_each_round_has_an_emulator_of_its_own_and_resumes_to_the_same_bits(
    tmp_path, built, monkeypatch
):
    """Killed while the emulator of the second round is fitted, and behind the third round's."""
    train = partial(anchored.rounds, built=built, anchor=ANCHOR, calibration=anchored.samples())
    wanted, facts = results(train(tmp_path / "straight"))
    plain, plain_facts = results(anchored.rounds(tmp_path / "plain", built, ANCHOR))
    assert plain[0] != wanted[0]
    # In the second and third round: the original over the eight samples, twice, and gradients.
    assert facts["row_forwards"] > plain_facts["row_forwards"] + 2 * 2 * 8
    real = refit_module._read_gradients
    calls = []

    def read(folder, block):
        calls.append(block)
        if len(calls) in (2, 7):
            raise Killed
        return real(folder, block)

    monkeypatch.setattr(refit_module, "_read_gradients", read)
    for _ in range(2):
        with pytest.raises(Killed):
            train(tmp_path / "killed").run()
    assert results(train(tmp_path / "killed"))[0] == wanted
