"""rsLoRA and DoRA: whole runs with each emulator that they work with."""

import json
import math
from functools import partial

import pytest
import torch
from composed import compose_cached
from omegaconf import OmegaConf
from packed import precision_of
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from staged import losses_of
from tiny import linears, save_checkpoint, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, set_seed

from emloc.adapters.dora import Dora
from emloc.adapters.fold import merge
from emloc.adapters.lora import Lora
from emloc.adapters.rslora import RsLora
from emloc.adapters.saved import read_adapter, read_lora
from emloc.adapters.training_inputs import TrainingInputs
from emloc.config.settings import LoraSettings
from emloc.data.reader import encode_all
from emloc.emulators import BuiltEmulator
from emloc.emulators.full import load_quantized
from emloc.errors import ConfigError, StageError
from emloc.models.checkpoint.source import Source
from emloc.models.objectives.tokens import Tokens
from emloc.stages.merge_run import merge_run
from emloc.stages.run_config import build
from emloc.stages.training.lean_setup import prepare_model
from emloc.stages.training.train import fit_rows
from emloc.tensors.lean.embedding import HostEmbedding

CPU = torch.device("cpu")
IDS = torch.arange(24).reshape(2, 12) + 5
TARGETS = r".*_proj"
# Widths that are multiples of 64, as in real models.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
ENDS = ["emulator.first=1", "emulator.last=1", "compression.ratio=0.75"]


@pytest.fixture(scope="session")
def wide(made_once):
    return made_once("wide", partial(save_checkpoint, **WIDE))


@pytest.fixture
def run_cached(run_cached):
    def run_with(*overrides: str):
        result = run_cached("train.steps=6", *overrides)
        return result, losses_of(result)

    return run_with


def attached(adapter, **settings):
    values = {"rank": 4, "alpha": 4, "dropout": 0.0} | settings
    set_seed(0)
    model = tiny_llama(tiny_tokenizer(chat=True))
    return adapter.attach(model, LoraSettings(**values), linears(model, TARGETS))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize("adapter", [RsLora(), Dora()], ids=["rslora", "dora"])
def test_a_new_adapter_starts_like_lora_and_changes_no_output(adapter):
    plain, other = (attached(one) for one in (Lora(), adapter))
    parameters = dict(other.named_parameters())
    pairs = {n: p for n, p in plain.named_parameters() if ".lora_A" in n or ".lora_B" in n}
    assert len(pairs) == 2 * 14
    assert all(torch.equal(parameters[name], tensor) for name, tensor in pairs.items())
    torch.testing.assert_close(logits(other), logits(plain), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 16), (16, 8)])
def test_rslora_scales_by_alpha_over_the_square_root_of_the_rank(tmp_path, rank, alpha):
    """PEFT, the fused layer and the saved pairs use the same scale."""
    tuned = attached(RsLora(), rank=rank, alpha=alpha)
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    scales = {one.scaling["default"] for one in tuned.modules() if isinstance(one, LoraLayer)}
    assert scales == {alpha / math.sqrt(rank)}
    before = logits(tuned)
    RsLora().save(tuned, tmp_path, "somebody/model")
    assert {p.scale for p in read_lora(tmp_path).pairs.values()} == scales
    assert RsLora().fuse(tuned)
    torch.testing.assert_close(logits(tuned), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "through",
    [
        ["method=rslora"],
        ["method=emloc", "adapter=rslora"],
        ["method=emloc_nf4", "adapter=rslora"],
    ],
    ids=["full", "svd", "svd in nf4"],
)
def test_a_run_with_rslora_gives_scores(run_cached, through):
    result, losses = run_cached(*through, "train.learning_rate=0.02")
    assert 0 < result.evaluated.facts["scores"]["loss"] < 10
    assert losses[-1] < losses[0]
    pairs = read_lora(result.recovered.folder / "adapter").pairs
    assert {pair.scale for pair in pairs.values()} == {2.0}  # 4 / sqrt(4)


@pytest.mark.parametrize("bits", [16, 4])
def test_the_correction_is_exact_at_the_scale_of_rslora(run_cached, tiny, bits):
    """W x + s B'A' x = W_e x + s B A x holds for x in the rows of A."""
    overrides = ["method=emloc", "adapter=rslora", f"compression.bits={bits}"]
    result, _ = run_cached(*overrides, "recovery.clamp=null", "lora.alpha=6")
    run_config = build(compose_cached([*tiny, *overrides]))
    source = run_config.model.open()
    trained = read_lora(result.trained.folder / "adapter").pairs
    for layer, new in read_lora(result.recovered.folder / "adapter").pairs.items():
        old = trained[layer]
        assert new.scale == 3.0  # 6 / sqrt(4)
        gap = run_config.emulator.residual(
            result.emulated.folder, source, layer, precision=run_config.precision
        )
        corrected_outputs = (gap + new.delta.double()) @ old.a.double().T
        torch.testing.assert_close(
            corrected_outputs, old.delta.double() @ old.a.double().T, atol=1e-6, rtol=0
        )


@pytest.mark.parametrize(
    ("through", "layers"),
    [
        (["method=dora"], 42),
        (["method=dora", "model.dtype=bfloat16"], 42),
        (["method=dora", "compression.bits=4"], 42),
        (["method=offsite", "adapter=dora", *ENDS], 14),
        (["method=offsite", "adapter=dora", *ENDS, "compression.bits=4"], 14),
    ],
    ids=["full", "bfloat16", "nf4", "layer_drop", "layer_drop in nf4"],
)
def test_a_run_with_dora_gives_scores(run_cached, wide, through, layers):
    result, losses = run_cached(*through, f"model.source={wide}", "train.learning_rate=0.02")
    assert 0 < result.evaluated.facts["scores"]["loss"] < 10
    assert losses[-1] < losses[0]
    trained, recovered = (
        load_file(one.folder / "adapter" / "adapter_model.safetensors")
        for one in (result.trained, result.recovered)
    )
    assert len(trained) == 3 * layers
    assert trained.keys() == recovered.keys()
    assert all(torch.equal(trained[name], recovered[name]) for name in trained)
    adapter = read_adapter(result.recovered.folder / "adapter")
    assert len(adapter.magnitudes) == layers
    assert {tensor.dtype for tensor in adapter.magnitudes.values()} == {torch.float32}


@pytest.mark.parametrize("bits", [16, 4])
def test_an_offsite_adapter_works_on_the_whole_model(run_cached, wide, bits):
    """Trained with four of six blocks; PEFT loads the adapter by the names of the original."""
    overrides = ["method=offsite", *ENDS, f"compression.bits={bits}", f"model.source={wide}"]
    result, losses = run_cached(*overrides, "train.learning_rate=0.02")
    assert losses[-1] < losses[0]
    assert result.emulated.facts["share_of_linears"] == pytest.approx(4 / 6, abs=1e-4)
    config = json.loads((result.recovered.folder / "adapter" / "adapter_config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, result.recovered.folder / "adapter")
    adapted = {n.split(".layers.")[1][0] for n, _ in loaded.named_parameters() if ".lora_" in n}
    assert (adapted, config["r"]) == ({"0", "5"}, 4)
    assert len(read_lora(result.recovered.folder / "adapter").pairs) == 14
    assert 0 < result.evaluated.facts["scores"]["loss"] < 10


@pytest.mark.parametrize("bits", [16, 4])
def test_magnitudes_of_dora_start_as_the_norms_of_the_emulator_weights(wide, bits):
    source = Source(wide, "tiny", "0", torch.bfloat16)
    layers = [name for name in source.linears if name.endswith("_proj")] if bits == 4 else []
    model = load_quantized(source, layers, CPU, precision_of(bits))
    tuned = Dora().attach(model, LoraSettings(4, 4, 0.0), linears(model, TARGETS))
    parameters = {n: one for n, one in tuned.named_modules() if isinstance(one, LoraLayer)}
    assert len(parameters) == 42
    for layer in parameters.values():
        base = layer.get_base_layer()
        weight = base.matrix.dequantize() if bits == 4 else base.weight
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert (magnitude.dtype, magnitude.requires_grad) == (torch.float32, True)
        torch.testing.assert_close(magnitude.data, weight.float().norm(dim=1))


def test_in_bfloat16_a_loaded_dora_equals_the_trained_one(wide, tmp_path):
    """The magnitudes stay float32, and a new adapter does not change the model."""
    source = Source(wide, "tiny", "0", torch.bfloat16)
    model = source.load(CPU)
    tuned = Dora().attach(model, LoraSettings(4, 4, 0.0), linears(model, TARGETS))
    plain = logits(source.load(CPU))
    assert torch.equal(logits(tuned), plain)
    for name, parameter in tuned.named_parameters():
        if ".lora_A" in name or ".lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    Dora().save(tuned, tmp_path / "adapter", "somebody/model")
    loaded = Dora().load(source.load(CPU), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(tuned))
    assert (logits(loaded) - plain).abs().max() > 0.05


def test_widths_that_bitsandbytes_reads_wrongly_are_refused_with_dora(run_cached):
    """The tiny model is 32 wide, which is no multiple of 64."""
    with pytest.raises((ConfigError, StageError)) as refused:
        run_cached("method=dora", "compression.bits=4")
    assert str(refused.value).endswith(
        "adapter=dora needs the weight of model.layers.0.self_attn.q_proj, and on a CPU "
        "bitsandbytes reads a 4-bit weight wrongly unless its width, 32, is a multiple of 64; set "
        "compression.bits=16"
    )


def test_training_with_dora_equals_that_of_peft():
    assert not Dora().fuse(attached(Dora()))


# What of the lean training is not of the adapter -------------------------------------------------


@pytest.mark.parametrize("adapter", [Lora(), Dora()], ids=["lora", "dora"])
def test_every_adapter_uses_the_memory_savings_outside_the_adapter(tiny, adapter):
    """The embedding and layer inputs in host memory, and the loss of answer tokens alone."""
    recipe = build(compose_cached([*tiny, "train=steps500"])).train
    assert recipe.host_activations
    tuned = attached(adapter).train()
    fused, loss, _ = prepare_model(tuned, adapter, recipe, Tokens())
    assert fused == (type(adapter) is Lora)
    inner = adapter.base(tuned)
    assert type(inner.get_input_embeddings()) is HostEmbedding
    # The head was replaced by one that returns hidden states.
    assert type(inner.get_output_embeddings()) is not nn.Linear
    waiting = [one for one in inner.modules() if getattr(one, "gradient_checkpointing", False)]
    assert len(waiting) == 2 + 1  # the blocks, and the decoder around them
    assert all("_with_offloading" in repr(one._gradient_checkpointing_func) for one in waiting)
    plain = attached(adapter).train()
    expected = plain(input_ids=IDS, labels=IDS).loss
    batch = {"input_ids": IDS, "labels": IDS}
    parameters = loss(tuned, batch, Tokens().items(batch))
    assert parameters.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    parameters.backward()
    true = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    assert got.keys() == true.keys()
    assert len(got) == (28 if fused else 42)
    for name, gradient in true.items():
        assert (got[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_the_memory_saving_path_of_dora_differs_only_by_rounding(run_cached, dtype, close):
    overrides = ["method=dora", f"model.dtype={dtype}", "train.learning_rate=0.02"]
    curves = [run_cached(*overrides, f"train.lean={lean}")[1] for lean in ("true", "false")]
    assert len(curves[0]) == 6
    assert curves[0] == pytest.approx(curves[1], rel=close)


def test_a_training_can_start_from_a_saved_adapter(run_cached, tiny, tmp_path):
    overrides = ["method=lora", "train.learning_rate=0.02"]
    first, losses = run_cached(*overrides)
    run_config = build(compose_cached([*tiny, *overrides, "train.steps=6", "train.warmup=0"]))
    source = run_config.model.open()
    training_inputs = TrainingInputs(
        *(
            run_config.adapter,
            run_config.lora,
            tuple(run_config.model.adapted_layers(source)),
            run_config.task.train(),
        ),
        *(run_config.model.max_length, run_config.train, run_config.seed),
    )
    reader = source.reader()
    rows = encode_all(reader, training_inputs.examples, training_inputs.max_length)
    lines = []
    facts = fit_rows(
        tmp_path,
        BuiltEmulator(run_config.emulator, first.emulated, source),
        training_inputs,
        rows,
        reader.collate,
        device=CPU,
        report=lambda step, values: lines.append(values["loss"]),
        start=first.trained.folder / "adapter",
    )
    # The same rows in the same order: the loaded adapter has learnt them already.
    assert lines[0] < losses[0] - 0.1
    assert facts["trainable"] == first.trained.facts["trainable"]
    before, after = (
        load_file(one / "adapter" / "adapter_model.safetensors")
        for one in (first.trained.folder, tmp_path)
    )
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_merged_dora_run_equals_the_model_that_was_scored(run_cached, tiny, checkpoint, tmp_path):
    result, _ = run_cached("method=dora", "train.learning_rate=0.05", "lora.alpha=8")
    folder = tmp_path / "run"
    folder.mkdir()
    OmegaConf.save(compose_cached([*tiny, "method=dora"]), folder / "config.yaml", resolve=True)
    (folder / "adapter").symlink_to(result.recovered.folder / "adapter")
    target = merge_run(folder, tmp_path / "merged")
    merged, plain = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)
        for one in (target, checkpoint)
    )
    before = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, folder / "adapter"))
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)
    adapter = read_adapter(folder / "adapter")
    tensors = load_file(target / "model.safetensors")
    for layer, magnitude in adapter.magnitudes.items():
        torch.testing.assert_close(tensors[f"{layer}.weight"].norm(dim=1), magnitude.abs())


def test_a_dora_adapter_is_copied_unchanged_and_not_read_as_lora(tmp_path):
    tuned = attached(Dora())
    Dora().save(tuned, tmp_path / "one", "somebody/model")
    read_adapter(tmp_path / "one").save(tmp_path / "two")
    first, second = (
        load_file(tmp_path / one / "adapter_model.safetensors") for one in ("one", "two")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert config["use_dora"]
    with pytest.raises(ConfigError, match="lora_magnitude_vector is no LoRA matrix"):
        read_lora(tmp_path / "one")


def test_a_lora_adapter_is_merged(checkpoint, tmp_path):
    tuned = attached(Lora())
    for name, parameter in tuned.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    Lora().save(tuned, tmp_path / "adapter", "somebody/model")
    source = Source(checkpoint, "tiny", "0", torch.float32)
    target = merge(source, read_adapter(tmp_path / "adapter"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(tuned), atol=1e-5, rtol=1e-4)
