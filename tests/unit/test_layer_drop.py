"""Dropping whole blocks: the kept blocks, the unchanged rest of the model, and the counted size."""

import json
import re

import pytest
import torch
from packed import NF4, precision_of
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import image_batch, save_checkpoint, tiny_internvl, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import AutoModelForImageTextToText, LlamaForCausalLM

from emloc.config.compose import compose
from emloc.config.settings import Compression
from emloc.emulators import BuildInputs
from emloc.emulators.layer_drop import IdentityBlock, LayerDrop, block_stack, kept_block_indices
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.precision.nf4 import Nf4Linear
from emloc.stages.run_config import build
from emloc.tensors.lean.model import recompute_layers
from emloc.tensors.lean.modules import fuse_modules

CPU = torch.device("cpu")
DEPTH = 7
IDS = torch.arange(24).reshape(2, 12) + 5
TARGETS = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
DROP = LayerDrop(first=1, last=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("deep"), num_hidden_layers=DEPTH)
    return Source(folder, "tiny", "0", torch.float32)


@pytest.fixture(scope="module")
def eight():
    """InternVL2.5-8B, with its shape but without weights."""
    run_config = build(compose(["model=internvl2_5_8b", "method=offsite"]))
    source = run_config.model.shape_source()
    return source, run_config.model.compressible_layers(source)


def linears(source):
    return {name: shape for name, shape in source.linears.items() if name.endswith("_proj")}


def built_emulator(folder, source, bits=16, ratio=0.75, of="linears", drop=DROP):
    """Build an emulator in `folder` and return its facts."""
    plan = drop.plan(source, linears(source), Compression(ratio, of, bits))
    return drop.build(folder, source, BuildInputs(plan, None, None, precision_of(bits)), device=CPU)


def adapted(folder, source, pattern):
    """Return the adapted layers among those that a regular expression matches."""
    return DROP.targets(folder, [name for name in source.linears if re.fullmatch(pattern, name)])


def numbers(blocks):
    return [int(block.rpartition(".")[2]) for block in blocks]


# Which blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "ends", "middle", "expected"),
    [
        (32, (2, 2), 9, [0, 1, 2, 5, 9, 12, 16, 19, 22, 26, 29, 30, 31]),
        (7, (1, 2), 3, [0, 1, 3, 4, 5, 6]),  # index 1.5 is rounded to 2
        (9, (1, 2), 3, [0, 1, 3, 6, 7, 8]),  # index 2.5 is rounded to 2
        # As a float, 7 strides of 29/14 are more than 14.5, which would be rounded to 14.
        (34, (2, 2), 15, [0, 1, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31, 32, 33]),
        (6, (1, 1), 2, [0, 1, 4, 5]),
        (6, (1, 1), 4, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_both_ends_stay_and_the_middle_is_thinned_evenly(depth, ends, middle, expected):
    assert kept_block_indices(depth, *ends, middle) == expected


def test_half_of_the_8b_is_thirteen_blocks(eight):
    """2 + 9 + 2 blocks, as in the paper's baselines; the vision tower is not compressed."""
    source, layers = eight
    plan = LayerDrop(first=2, last=2).plan(source, layers, Compression(0.5, "model", 16))
    assert numbers(plan["adapted"]) == [0, 1, 30, 31]
    assert numbers(plan["kept"]) == [2, 5, 9, 12, 16, 19, 22, 26, 29]
    assert len(plan["dropped"]) == 19
    assert all(
        name.startswith("model.language_model.layers.") for part in plan.values() for name in part
    )


def test_a_quarter_of_the_8b_leaves_too_few_middle_blocks(eight):
    source, layers = eight
    with pytest.raises(ConfigError) as refused:
        LayerDrop(first=2, last=2).plan(source, layers, Compression(0.25, "model", 16))
    assert str(refused.value) == (
        "compression.ratio=0.25 of the model leaves less than 2 blocks between "
        "emulator.first=2 and emulator.last=2; set compression.ratio=0.298 or higher, or "
        "emulator.first=1 emulator.last=1"
    )
    # The ratio that the message suggests works, and a smaller ratio is refused.
    plan = LayerDrop(first=2, last=2).plan(source, layers, Compression(0.298, "model", 16))
    assert numbers(plan["kept"]) == [2, 29]
    with pytest.raises(ConfigError):
        LayerDrop(first=2, last=2).plan(source, layers, Compression(0.297, "model", 16))
    plan = LayerDrop(first=1, last=1).plan(source, layers, Compression(0.25, "model", 16))
    assert numbers(plan["adapted"] + plan["kept"]) == [0, 31, 1, 30]


def test_with_ends_of_one_block_the_message_suggests_no_shorter_ends(eight):
    source, layers = eight
    with pytest.raises(ConfigError, match=r"set compression\.ratio=0\.\d+ or higher$"):
        LayerDrop(first=1, last=1).plan(source, layers, Compression(0.15, "model", 16))


@pytest.mark.parametrize("of", ["linears", "model"])
def test_a_ratio_counts_the_linears_or_the_model(source, of):
    """With `model`, the token embedding and the head use a part of the ratio."""
    plan = DROP.plan(source, linears(source), Compression(0.8, of, 16))
    total = sum(source.sizes.values())
    block = sum(n for name, n in source.sizes.items() if name.startswith("model.layers.0."))
    fixed = total - DEPTH * block
    most = int((0.8 * total - fixed) // block) if of == "model" else int(0.8 * DEPTH)
    assert len(plan["adapted"] + plan["kept"]) == most


def test_a_decoder_with_nothing_to_drop_is_refused(checkpoint):
    source = Source(checkpoint, "tiny", "0", torch.float32)
    with pytest.raises(ConfigError) as refused:
        DROP.plan(source, linears(source), Compression(0.5, "linears", 16))
    assert str(refused.value) == (
        "emulator.first=1 and emulator.last=2 leave nothing to drop: the model has 2 "
        "blocks, and 2 between the ends are always kept; set model to a deeper one, or "
        "emulator=svd"
    )


@pytest.mark.parametrize("name", ["first", "last"])
def test_an_end_without_a_block_is_refused(name):
    with pytest.raises(ConfigError, match=rf"emulator\.{name} must be at least 1, got 0"):
        LayerDrop(**({"first": 2, "last": 2} | {name: 0}))


# The model ---------------------------------------------------------------------------------------


def shallow(source, block_numbers) -> LlamaForCausalLM:
    """Return a Llama built with only these blocks."""
    model = tiny_llama(tiny_tokenizer(chat=True), num_hidden_layers=len(block_numbers))
    whole = LlamaForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    rest = {n: t for n, t in whole.state_dict().items() if ".layers." not in n}
    for new, old in enumerate(block_numbers):
        own = whole.model.layers[old].state_dict()
        rest |= {f"model.layers.{new}.{name}": tensor for name, tensor in own.items()}
    model.load_state_dict(rest)
    return model


def test_the_emulator_equals_a_model_built_without_the_dropped_blocks(source, tmp_path):
    """Compares logits, and texts generated with a cache."""
    built_emulator(tmp_path, source)
    table = json.loads((tmp_path / "layers.json").read_text())
    block_numbers = sorted(numbers(table["adapted"] + table["kept"]))
    assert (block_numbers, numbers(table["dropped"])) == ([0, 1, 4, 5, 6], [2, 3])
    model, plain = DROP.open(tmp_path, source, CPU), shallow(source, block_numbers)
    assert [type(model.model.layers[i]) is IdentityBlock for i in range(DEPTH)] == [
        i in (2, 3) for i in range(DEPTH)
    ]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    generated = [one.generate(IDS, attention_mask=mask, **settings) for one in (model, plain)]
    assert torch.equal(*generated)
    assert generated[0].shape[1] == 18


@pytest.mark.parametrize("lean", [False, True])
def test_recomputed_layers_give_the_same_gradients(source, tmp_path, lean):
    built_emulator(tmp_path, source)

    def gradients(again: bool):
        model = DROP.open(tmp_path, source, CPU)
        torch.manual_seed(0)
        tuned = get_peft_model(
            model, LoraConfig(r=2, target_modules=adapted(tmp_path, source, TARGETS))
        )
        if again and lean:
            assert "LlamaMLP" in fuse_modules(model, torch.float32)
            recompute_layers(model)
        elif again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tuned.train()
        tuned(input_ids=IDS, labels=IDS).loss.backward()
        return {n: p.grad for n, p in tuned.named_parameters() if p.requires_grad}

    once, twice = gradients(False), gradients(True)
    assert len(once) == 2 * 7 * 3
    assert sum(float(grad.abs().sum()) for grad in once.values()) > 1
    for name, grad in once.items():
        torch.testing.assert_close(twice[name], grad, atol=1e-6, rtol=1e-4)


def test_only_the_ends_are_adapted_and_peft_loads_the_adapter_on_the_original(source, tmp_path):
    built_emulator(tmp_path, source)
    targets = adapted(tmp_path, source, r"model\.layers\.\d+\.mlp\.up_proj|.*q_proj")
    tuned = get_peft_model(
        DROP.open(tmp_path, source, CPU), LoraConfig(r=2, target_modules=targets)
    )
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    whole = LlamaForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(whole, tmp_path / "adapter")
    loaded_parameters = {n: p for n, p in loaded.named_parameters() if ".lora_" in n}
    own = {n: p for n, p in tuned.named_parameters() if ".lora_" in n}
    assert loaded_parameters.keys() == own.keys()
    assert len(loaded_parameters) == 2 * 2 * 3
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in loaded_parameters} == {0, 5, 6}
    assert all(torch.equal(loaded_parameters[name], own[name]) for name in own)


def test_block_10_is_distinguished_from_block_1(tmp_path):
    (tmp_path / "layers.json").write_text(json.dumps({"adapted": ["model.layers.1"]}))
    model = tiny_llama(tiny_tokenizer(chat=True), num_hidden_layers=12)
    every = [name for name, _ in model.named_modules() if re.fullmatch(TARGETS, name)]
    layers = DROP.targets(tmp_path, every)
    config = LoraConfig(r=2, target_modules=layers)
    names = [n for n, _ in get_peft_model(model, config).named_parameters() if ".lora_A" in n]
    assert len(names) == 7
    assert all(".layers.1." in name for name in names)


def test_the_vision_tower_of_a_vision_language_model_is_not_dropped(tmp_path):
    model = tiny_internvl()
    model.config.text_config.num_hidden_layers = 5
    model.config.text_config.layer_types = ["full_attention"] * 5
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(model.config)
    whole.save_pretrained(tmp_path / "model")
    source = Source(tmp_path / "model", "vl", "0", torch.float32, AutoModelForImageTextToText)
    blocks = block_stack(source)
    assert blocks == [f"model.language_model.layers.{i}" for i in range(5)]
    drop = LayerDrop(first=1, last=1)
    layers = {n: shape for n, shape in source.linears.items() if ".layer" in n}
    tower = sum(m * n for name, (m, n) in layers.items() if ".vision_tower." in name)
    total = sum(m * n for m, n in layers.values())
    ratio = (tower + 4.01 * (total - tower) / 5) / total
    plan = drop.plan(source, layers, Compression(ratio, "linears", 16))
    assert numbers(plan["dropped"]) == [2]
    drop.build(tmp_path, source, BuildInputs(plan, None, None, None), device=CPU)
    opened = drop.open(tmp_path, source, CPU)
    with torch.no_grad():
        before, after = whole(**image_batch()).logits, opened(**image_batch()).logits
        whole.model.language_model.layers[2] = IdentityBlock(None)
        torch.testing.assert_close(after, whole(**image_batch()).logits)
    assert (before - after).abs().max() > 1e-3


# Its size, and four bits -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 4])
def test_the_size_is_the_sum_of_the_tensors(source, tmp_path, bits):
    facts = built_emulator(tmp_path, source, bits)
    model = DROP.open(tmp_path, source, CPU, precision=precision_of(bits))
    packed = [one.matrix for one in model.modules() if isinstance(one, Nf4Linear)]
    apart = {id(one.weight) for one in model.modules() if isinstance(one, Nf4Linear)}
    plain = [parameter for parameter in model.parameters() if id(parameter) not in apart]
    counted = sum(p.numel() for p in plain) + sum(m.shape[0] * m.shape[1] for m in packed)
    size = sum(p.nbytes for p in plain) + sum(matrix.nbytes for matrix in packed)
    assert (facts["parameters"], facts["bytes"], facts["bits"]) == (counted, size, bits)
    assert len(packed) == (5 * 7 if bits == 4 else 0)
    assert facts["share_of_linears"] == pytest.approx(5 / 7, abs=1e-4)
    assert facts["dropped"] == 2


def test_the_residual_is_the_rounding_error_in_four_bits_and_none_in_sixteen(source, tmp_path):
    layer = "model.layers.0.mlp.up_proj"
    built_emulator(tmp_path, source, 16)
    assert DROP.residual(tmp_path, source, layer) is None
    built_emulator(tmp_path, source, 4)
    weight = source.weight(layer)
    gap = DROP.residual(tmp_path, source, layer, precision=NF4)
    assert 0.05 < float(gap.norm() / weight.norm()) < 0.15
    expected = weight.double() - NF4.quantize(weight).dequantize().double()
    torch.testing.assert_close(gap, expected)
