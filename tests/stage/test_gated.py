"""The plug-in adapter `gated`: trained, scored, killed, resumed, refused."""

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from composed import compose_cached
from omegaconf import OmegaConf
from safetensors.torch import load_file

from emloc.adapters.auxiliary import AuxiliaryLosses
from emloc.errors import ConfigError
from emloc.pipeline import run
from emloc.runtime.stage_cache import Store
from emloc.stages.merge_run import merge_run
from emloc.stages.run_config import build, instantiate

PLUGIN = Path(__file__).parents[1] / "extensions" / "gated"
sys.path.append(str(PLUGIN))
gated = import_module("gated")
Experts, Gated = gated.Experts, gated.Gated

CHOSEN = ("adapter._target_=gated.Gated", "+adapter.experts=3", "+adapter.balance=10")
LEARNING = ("train.steps=6", "train.learning_rate=0.02")


@pytest.fixture(autouse=True)
def _plugin(monkeypatch):
    monkeypatch.setenv("EMLOC_PLUGINS", str(PLUGIN))


@pytest.fixture
def run_cached(tiny, store):
    """Function that runs a method with the gated adapter.

    It returns the result and the lines of the training curve.
    """

    def run_with(*overrides: str, balance=0.1, report=None):
        lines = []
        run_config = build(compose_cached([*tiny, "method=lora", *overrides]))
        run_config = replace(run_config, adapter=Gated(experts=3, balance=balance))
        result = run(run_config, store, report or (lambda step, values: lines.append(values)))
        return result, lines

    return run_with


def tensors(artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.folder / "adapter" / "adapter_model.safetensors")


def test_its_yaml_builds_the_adapter():
    cfg = OmegaConf.load(PLUGIN / "conf" / "adapter" / "gated.yaml")
    assert instantiate(cfg) == Gated(experts=3, balance=0.1)


@pytest.mark.parametrize(
    "through",
    [
        [],
        ["method=emloc", "recovery=none"],
        ["method=emloc_nf4", "recovery=none"],
        ["model.dtype=bfloat16"],
        ["train.lean=false"],
    ],
    ids=["full", "svd", "svd in nf4", "bfloat16", "plain"],
)
def test_a_run_with_the_adapter_gives_scores(run_cached, tiny, store, through):
    result, lines = run_cached(*through, *LEARNING)
    assert lines[-1]["loss"] < lines[0]["loss"]
    scores = result.evaluated.facts["scores"]
    bare = run(build(compose_cached([*tiny, *through, "method=zero_shot"])), store, lambda *_: None)
    assert scores["loss"] < bare.evaluated.facts["scores"]["loss"] - 0.01
    trained, recovered = tensors(result.trained), tensors(result.recovered)
    assert len(trained) == 3 * 14
    assert trained.keys() == recovered.keys()
    assert all(torch.equal(trained[name], recovered[name]) for name in trained)


# The auxiliary loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("lean", ["true", "false"])
@pytest.mark.parametrize(("batch", "accumulate"), [(1, 4), (2, 2)])
def test_the_auxiliary_loss_does_not_depend_on_the_number_of_forward_passes(
    run_cached, lean, batch, accumulate
):
    """Without an average over passes, the loss would count once for each pass."""
    overrides = ["train.steps=1", f"train.lean={lean}"]
    cut = [f"train.batch={batch}", f"train.accumulate={accumulate}"]
    (whole,) = run_cached(*overrides, balance=10)[1]
    (parts,) = run_cached(*overrides, *cut, balance=10)[1]
    (without,) = run_cached(*overrides, balance=0)[1]
    # At the start the router is nearly uniform, and the loss is 1 for each layer.
    assert whole["loss"] - without["loss"] == pytest.approx(10, rel=2e-3)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=2e-2)


def test_only_the_auxiliary_loss_changes_the_router_at_the_start(run_cached):
    """At the start B is zero, so that the loss of the answers has no gradient for the router."""
    overrides = [
        "train.steps=1",
        "train.learning_rate=0.05",
        "train.warmup=0",
        "train.weight_decay=0",
    ]
    still, moved = (
        tensors(run_cached(*overrides, balance=balance)[0].trained) for balance in (0, 10)
    )
    routers = [name for name in still if name.endswith("router")]
    assert len(routers) == 14
    for name in routers:
        step = (moved[name] - still[name]).abs()
        # The learning rate, except for the epsilon of AdamW.
        assert step.max() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("lean", ["true", "false"])
def test_recomputed_layers_add_their_auxiliary_loss_once(run_cached, lean):
    overrides = [*LEARNING, "train.batch=2", "train.accumulate=2", f"train.lean={lean}"]
    plain, recomputed = (
        run_cached(*overrides, f"train.checkpointing={value}", balance=10)
        for value in ("false", "true")
    )
    for name in ("loss", "grad_norm"):
        expected = [line[name] for line in plain[1]]
        assert [line[name] for line in recomputed[1]] == pytest.approx(expected, rel=1e-5)
    first, second = tensors(plain[0].trained), tensors(recomputed[0].trained)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-5, rtol=1e-4)


def test_auxiliary_losses_are_returned_once_and_dropped_in_recomputation():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    losses = AuxiliaryLosses(model)
    losses.add(torch.tensor(7.0))  # added outside any forward pass of the model
    assert losses.take() is None
    model(torch.ones(2))
    losses.add(torch.tensor(1.0))
    losses.add(torch.tensor(3.0))
    assert losses.take() == 2
    losses.add(torch.tensor(9.0))  # added by the recomputation in the backward pass
    assert losses.take() is None
    model(torch.ones(2))
    losses.add(torch.tensor(5.0))
    model(torch.ones(2))  # the losses of the forward pass before were never used
    losses.add(torch.tensor(4.0))
    assert losses.take() == 4


def test_two_processes_train_like_one(emloc, tiny, one_run, run_cached):
    recipe = ["train.batch=2", "train.steps=4", "train.learning_rate=0.02"]
    two = emloc.two(*tiny, "method=lora", *CHOSEN, *recipe)
    assert two.code == 0, two.output
    ours = [json.loads(line) for line in (one_run() / "curve.jsonl").open()]
    _, lines = run_cached(*recipe, "train.accumulate=2", balance=10)
    assert len(ours) == 4
    for name in ("loss", "grad_norm"):
        expected = [line[name] for line in lines]
        assert [line[name] for line in ours] == pytest.approx(expected, rel=1e-3)


# Killed, resumed, refused ------------------------------------------------------------------------


def kill(run_cached, at: int, *overrides: str) -> None:
    class Killed(BaseException):
        pass

    def report(step, values):
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        run_cached(*overrides, report=report)


def test_a_checkpoint_contains_only_trained_tensors(run_cached, store):
    kill(run_cached, 4, *LEARNING, "train.save_every=2")
    (checkpoint,) = store.root.glob("train/*.partial/checkpoints/checkpoint-2")
    state = load_file(checkpoint / "adapter_state.safetensors")
    assert len(state) == 3 * 14
    assert {name.rpartition(".")[2] for name in state} == {"router", "a", "b"}
    names = {path.name for path in checkpoint.iterdir()}
    assert not names & {"model.safetensors", "pytorch_model.bin"}


def test_a_resumed_training_gives_the_same_adapter(run_cached, tiny, tmp_path, store):
    overrides = [*LEARNING, "train.save_every=2"]
    run_config = replace(
        build(compose_cached([*tiny, "method=lora", *overrides])),
        adapter=Gated(experts=3, balance=0.1),
    )
    whole = tensors(run(run_config, Store(tmp_path / "whole"), lambda *_: None).trained)
    kill(run_cached, 5, *overrides)
    resumed, lines = run_cached(*overrides)
    assert len(lines) == 2  # two of six steps remained
    for name, tensor in tensors(resumed.trained).items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-6, rtol=1e-5)


def test_correction_and_merge_are_refused_with_the_reason_of_the_adapter(
    run_cached, tiny, tmp_path
):
    with pytest.raises(ConfigError) as caught:
        run_cached("method=emloc")
    assert str(caught.value) == (
        "recovery=correction changes the matrices of an update s B A, while adapter=gated weighs "
        "its experts by the input; set recovery=none, or adapter=lora"
    )
    result, _ = run_cached()
    folder = tmp_path / "run"
    folder.mkdir()
    cfg = compose_cached([*tiny, "method=lora", *CHOSEN])
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    (folder / "adapter").symlink_to(result.recovered.folder / "adapter")
    with pytest.raises(ConfigError) as caught:
        merge_run(folder, tmp_path / "merged")
    assert str(caught.value) == (
        "adapter=gated weighs its experts by the input and cannot be merged; "
        f"load the adapter in {folder / 'adapter'}"
    )
    assert not (tmp_path / "merged").exists()


def test_the_selected_layers_are_wrapped(tiny):
    run_config = build(compose_cached([*tiny, "method=lora"]))
    source = run_config.model.open()
    layers = tuple(run_config.model.adapted_layers(source))
    model = Gated(experts=2, balance=0).attach(
        source.load(torch.device("cpu")), run_config.lora, layers
    )
    wrapped = {name for name, module in model.named_modules() if isinstance(module, Experts)}
    assert wrapped == set(layers)


def test_an_anchored_training_runs_the_original_without_the_adapter(run_cached):
    """The original with the adapter on it would need to be read block by block."""
    recipe = (*LEARNING, "method=qlora_anchored", "anchor.places=2")
    with pytest.raises(ConfigError, match=r"Gated is none; set adapter=lora, or anchor.rounds=1"):
        run_cached(*recipe)
    with pytest.raises(ConfigError, match=r"anchor.rounds=1 anchor.guard=0"):
        run_cached(*recipe, "anchor.rounds=1")
    result, lines = run_cached(*recipe, "anchor.rounds=1", "anchor.guard=0")
    assert result.trained.facts["passes"] == 1
    assert lines[-1]["loss"] < lines[0]["loss"]
