"""LoRA with blocks in host memory gives the results of LoRA, up to float32 rounding."""

import json
import math

import pytest
import torch
from composed import compose_cached
from packed import precision_of
from safetensors.torch import load_file, save_file
from tiny import image_batch, linears, save_checkpoint, tiny_internvl
from transformers import AutoModelForImageTextToText, LlamaForCausalLM

from emloc.adapters.lora import Lora
from emloc.adapters.training_inputs import TrainingInputs
from emloc.config.settings import Compression, LoraSettings
from emloc.cost.bench.offload import max_loss_distance
from emloc.cost.bench.training import OUT_OF_MEMORY, STEPS, TrainingFigures
from emloc.emulators import BuildInputs, BuiltEmulator
from emloc.emulators.full import Full
from emloc.emulators.offload import Offload
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.models.objectives.tokens import Tokens
from emloc.pipeline import run
from emloc.runtime.stage_cache import Artifact, Store
from emloc.stages.run_config import build
from emloc.stages.training.lean_setup import prepare_model
from emloc.stages.training.train import train

CPU = torch.device("cpu")
BLOCKS = 5
IDS = torch.arange(60).reshape(2, 30) + 5
LORA = LoraSettings(4, 8.0, 0.0)


@pytest.fixture(scope="module", params=["biases", "tied"])
def deep(request, tmp_path_factory):
    """Five blocks, either with biases as in Qwen or with tied embeddings."""
    special = {"attention_bias": True, "mlp_bias": True}
    if request.param == "tied":
        special = {"tie_word_embeddings": True}
    folder = save_checkpoint(
        tmp_path_factory.mktemp("deep"), num_hidden_layers=BLOCKS, initializer_range=0.1, **special
    )
    return folder


@pytest.fixture(params=[16, 4, 5])
def bits(request):
    return request.param


def opened(emulator, folder, source, bits):
    emulator.build(folder, source, BuildInputs(None, None, None, precision_of(bits)), device=CPU)
    return emulator.open(folder, source, CPU, precision=precision_of(bits))


def both(tmp_path, source, bits):
    return [opened(emulator, tmp_path, source, bits) for emulator in (Full(), Offload())]


# Training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.lean=true",),
        ("train.lean=true", "train.host_activations=true", "train.accumulate=2"),
        ("train.lean=false",),
    ],
    ids=["lean", "activations on the host", "plain"],
)
def test_losses_and_adapter_equal_those_of_lora(deep, tiny, tmp_path, bits, overrides):
    recipe = ("train.steps=6", "train.learning_rate=0.02", "train.checkpointing=true")
    run_config = build(compose_cached([*tiny, f"model.source={deep}", *recipe, *overrides]))
    source, model = run_config.model.open(), run_config.model
    examples = run_config.task.train()
    training_inputs = TrainingInputs(
        *(run_config.adapter, run_config.lora, tuple(model.adapted_layers(source))),
        *(examples, model.max_length, run_config.train, run_config.seed),
    )
    curves, adapters = [], []
    for emulator in (Full(), Offload()):
        folder, losses = tmp_path / type(emulator).__name__, []
        folder.mkdir()
        emulator.build(
            folder, source, BuildInputs(None, None, None, precision_of(bits)), device=CPU
        )
        built_emulator = BuiltEmulator(
            emulator, Artifact("emulate", "0", folder), source, precision_of(bits)
        )

        def follow(_, values, losses=losses):
            losses.append(values["loss"])

        train(folder, built_emulator, training_inputs, device=CPU, report=follow)
        curves.append(losses)
        adapters.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert len(curves[0]) == 6
    assert curves[0][-1] < curves[0][0] - 0.1
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_a_run_with_method_offload_scores_like_lora(tiny, tmp_path):
    scores = []
    for method in ("lora", "offload"):
        run_config = build(compose_cached([*tiny, f"method={method}"]))
        result = run(run_config, Store(tmp_path / method), lambda *_: None)
        scores.append(result.evaluated.facts["scores"])
    assert run_config.train.checkpointing
    assert run_config.emulator == Offload()
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


def test_offload_without_checkpointing_is_refused(tiny, tmp_path):
    run_config = build(compose_cached([*tiny, "method=offload", "train.checkpointing=false"]))
    with pytest.raises(ConfigError, match=r"set train.checkpointing=true$"):
        run(run_config, Store(tmp_path), lambda *_: None)


def test_an_adapter_that_reads_weights_outside_the_forward_is_refused(tiny, tmp_path):
    run_config = build(compose_cached([*tiny, "method=offload", "adapter=dora"]))
    with pytest.raises(
        ConfigError, match=r"adapter=dora .* emulator=offload .* emulator=full recovery=none$"
    ):
        run(run_config, Store(tmp_path), lambda *_: None)


@pytest.mark.parametrize("lean", [False, True])
def test_a_backward_pass_without_recomputation_raises_an_error(deep, tmp_path, bits, lean):
    model = opened(Offload(), tmp_path, Source(deep, "deep", "0", torch.float32), bits)
    tuned = Lora().attach(model, LORA, linears(model, r".*_proj")).train()
    if lean:
        assert Lora().fuse(tuned)
    loss = tuned(input_ids=IDS, labels=IDS).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_frozen_blocks_of_a_vision_tower_are_streamed_and_not_recomputed(tiny, tmp_path, bits):
    tiny_internvl().save_pretrained(tmp_path / "model")
    source = Source(tmp_path / "model", "tiny", "0", torch.float32, AutoModelForImageTextToText)
    recipe = build(compose_cached([*tiny, "method=offload"])).train
    batch = image_batch()
    batch |= {"labels": batch["input_ids"]}
    gradients = []
    for model in both(tmp_path, source, bits):
        torch.manual_seed(0)
        adapter = Lora()
        tuned = adapter.attach(model, LORA, linears(model, r".*language_model.*_proj"))
        lean, loss, _ = prepare_model(tuned, adapter, recipe, Tokens())
        assert lean
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        towers = [m for n, m in tuned.named_modules() if n.endswith("vision_tower.encoder.layer.0")]
        assert [tower.gradient_checkpointing for tower in towers] == [False]
        tuned.train()
        for _ in range(2):
            tuned.zero_grad()
            loss(tuned, batch, Tokens().items(batch)).backward()
        gradients.append({n: p.grad for n, p in tuned.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 2 * 7 * 2
    for name, gradient in gradients[0].items():
        assert gradient.norm() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


# The model ---------------------------------------------------------------------------------------


def test_logits_and_generated_texts_equal_those_of_the_whole_model(deep, tmp_path, bits):
    whole, streamed = both(tmp_path, Source(deep, "deep", "0", torch.float32), bits)
    with torch.no_grad():
        expected = whole(input_ids=IDS).logits
        for _ in range(2):
            assert torch.equal(streamed(input_ids=IDS).logits, expected)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    generated = streamed.generate(IDS, **settings)
    assert torch.equal(generated, whole.generate(IDS, **settings))
    assert not streamed.training
    assert not any(parameter.requires_grad for parameter in streamed.parameters())
    assert getattr(streamed, "is_loaded_in_4bit", False) == (bits == 4)


def test_all_blocks_share_two_device_buffers(deep, tmp_path, bits):
    """This includes the scales of packed weights; each buffer is as large as one block."""
    streamed = opened(Offload(), tmp_path, Source(deep, "deep", "0", torch.float32), bits)
    for layer in streamed.modules():
        if bits == 4 and hasattr(layer, "quant_state"):
            state = layer.weight.quant_state
            for part in (state.absmax, state.offset, state.state2.absmax, layer.scales):
                assert (
                    part.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()
                )
    buffers = {}
    for index, block in enumerate(streamed.model.layers):
        tensors = [one for one in (*block.parameters(), *block.buffers()) if one.nbytes]
        storages = [one.untyped_storage() for one in tensors]
        buffers[index] = {one.data_ptr() for one in storages}
        assert len(buffers[index]) == 1
        size = sum(one.nbytes for one in tensors)
        assert size <= storages[0].nbytes() < size + 256 * 50
    assert buffers[0] != buffers[1]
    assert all(buffers[index] == buffers[index % 2] for index in buffers)


def test_the_residual_of_quantisation_equals_that_of_the_whole_model(deep, tmp_path):
    source = Source(deep, "deep", "0", torch.float32)
    both(tmp_path, source, 4)
    layer = "model.layers.3.mlp.up_proj"
    expected, residual = (
        one.residual(tmp_path, source, layer, precision=precision_of(4))
        for one in (Full(), Offload())
    )
    assert torch.equal(residual, expected)
    assert expected.abs().max() > 0


# Refusals ----------------------------------------------------------------------------------------


def test_fsdp_is_refused_before_weights_are_read(deep, tmp_path, monkeypatch):
    source = Source(deep, "deep", "0", torch.float32)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    Offload().plan(source, {}, Compression(0.5, "linears", 16))
    monkeypatch.setenv("WORLD_SIZE", "2")
    says = r"^emulator=offload .* launch without FSDP, or set emulator=full$"
    with pytest.raises(ConfigError, match=says):
        Offload().plan(source, {}, Compression(0.5, "linears", 16))
    with pytest.raises(ConfigError, match=says):
        Offload().open(tmp_path, source, CPU)


def test_compression_auto_without_a_budget_is_refused(deep):
    with pytest.raises(ConfigError, match=r"set budget.gpu_gib=24"):
        Offload().plan(
            Source(deep, "deep", "0", torch.float32), {}, Compression(None, "linears", None)
        )


def test_weights_that_two_blocks_share_are_refused(tmp_path, monkeypatch):
    shared = {
        "lm_head.weight": "model.embed_tokens.weight",
        "model.layers.2.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
    }
    folder = save_checkpoint(tmp_path / "model", num_hidden_layers=3, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    one, other = list(shared.items())[1]
    tensors[one] = tensors[other].clone()  # with different values they would not be tied
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(LlamaForCausalLM, "_tied_weights_keys", shared)
    (tmp_path / "layers.json").write_text("{}")  # no layer is quantised
    with pytest.raises(ConfigError, match=r"layers\.2\.mlp\.up_proj.* set emulator=full$"):
        Offload().open(tmp_path, Source(folder, "tiny", "0", torch.float32), CPU)


def test_a_checkpoint_without_one_tensor_of_a_block_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (tmp_path / "layers.json").write_text("{}")  # no layer is quantised
    with pytest.raises(ConfigError, match=r"holds no tensor model\.layers\.2\."):
        Offload().open(tmp_path, Source(folder, "tiny", "0", torch.float32), CPU)


# The benchmark -----------------------------------------------------------------------------------


def test_the_distance_of_loss_curves_is_the_largest_difference():
    one, other = (TrainingFigures(1.0, 1.0, 1.0, tuple(range(s, s + STEPS))) for s in (0, 2))
    assert max_loss_distance(one, other) == 2
    assert max_loss_distance(one, one) == 0
    assert math.isnan(max_loss_distance(one, OUT_OF_MEMORY))
