"""Weights that are stored quantised are dequantised while they are read, or refused in words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise, int8_vectorwise_quant, quantize_4bit
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    Mxfp4Config,
)

from emloc.adapters.fold import merge
from emloc.adapters.saved import SavedLora
from emloc.errors import ConfigError
from emloc.models.checkpoint.bitsandbytes import Dequantize4bit
from emloc.models.checkpoint.source import Source
from emloc.tensors.linalg.correct import LoraPair

CPU = torch.device("cpu")
IDS = torch.arange(24).reshape(2, 12) + 5
BLOCK = 16
PROJECTION = "model.layers.1.mlp.down_proj"
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
INT4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
MXFP4 = {"quant_method": "mxfp4"}
# A quantiser of one weight: its tensors by the suffix of their names, and the dequantised weight.
Quantise = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Eight bits with a scale per block of 16 x 16."""
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.reshape(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    numbers = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    plain = (numbers.float() * scales[:, None, :, None]).reshape(weight.shape)
    return {"": numbers.reshape(weight.shape), "_scale_inv": scales}, plain


def int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Eight bits with a scale per row, as bitsandbytes stores them."""
    numbers, scales, _ = int8_vectorwise_quant(weight.half())
    return {"": numbers, "/SCB": scales}, numbers.float() * scales[:, None] / 127


def int4(
    weight: Tensor, kind: str = "nf4", *, double: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Four bits with a scale per 64 numbers, as bitsandbytes stores them; `double`: in 8 bits."""
    codes, state = quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    absmax = state.absmax
    if double:
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    parts = {f".{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    levels = state.code[torch.stack([codes >> 4, codes & 15], -1).reshape(-1, 64).long()]
    return {"": codes, **parts}, (levels * absmax[:, None]).reshape(weight.shape)


def write(folder: Path, quantise: Quantise, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Write a Llama whose blocks are quantised; return all of its weights, dequantised."""
    tiny_llama(tiny_tokenizer(True)).save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        parts = {"": tensor}
        if ".layers." in name and "proj" in name:
            parts, plain[name] = quantise(tensor)
        for suffix, part in parts.items():
            # bitsandbytes puts the scales of 8 bits beside the weight, not below it.
            key = name.removesuffix("weight") + suffix[1:] if suffix[:1] == "/" else name + suffix
            stored[key] = part
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    configure(folder, settings)
    return plain


def configure(folder: Path, settings: dict[str, Any] | None) -> None:
    """Write the settings of the quantisation into config.json; None: remove them."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    config |= {"quantization_config": settings} if settings else {}
    (folder / "config.json").write_text(json.dumps(config))


def source_of(folder: Path, dtype: torch.dtype = torch.float32) -> Source:
    return Source(folder, "tiny", "identity", dtype)


@pytest.mark.parametrize(
    ("quantise", "settings"),
    [
        (fp8, FP8),
        (int8, INT8),
        (int4, INT4),
        (lambda weight: int4(weight, double=True), INT4),
        (lambda weight: int4(weight, "fp4"), INT4),
    ],
    ids=["fp8", "int8", "nf4", "nf4 in double", "fp4"],
)
def test_a_quantised_weight_is_read_with_its_scales(quantise, settings, tmp_path):
    plain = write(tmp_path, quantise, settings)
    source = source_of(tmp_path)
    read = dict(source.read(list(source.sizes)))
    assert read.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(read[name], tensor, atol=1e-6, rtol=1e-5)
    assert torch.equal(source.weight(PROJECTION), read[f"{PROJECTION}.weight"])
    rounded = source_of(tmp_path, torch.bfloat16).weight(PROJECTION)
    assert torch.equal(rounded, read[f"{PROJECTION}.weight"].bfloat16())


def test_an_older_transformers_is_refused_with_the_release_to_install(tmp_path, monkeypatch):
    write(tmp_path, int8, INT8)
    monkeypatch.delattr("transformers.quantizers.HfQuantizer.get_load_operations")
    with pytest.raises(ConfigError, match=r"bitsandbytes_8bit.*pip install 'transformers>=5\.21'"):
        source_of(tmp_path).load(torch.device("cpu"))


def test_four_bits_of_any_shape_are_dequantised():
    """The last block may be incomplete, and rows may end within a block."""
    for shape in ((5, 7), (3, 48), (32, 64), (1, 2)):
        weight = torch.randn(shape)
        codes, state = quantize_4bit(weight, quant_type="nf4")
        parts = {f"weight.{name}": [part] for name, part in state.as_dict(packed=True).items()}
        actual = Dequantize4bit(None).convert({"weight": [codes], **parts})["weight"]
        assert actual.shape == shape
        halves = torch.cat([codes >> 4, codes & 15], 1).flatten()[: weight.numel()].long()
        scales = state.absmax.repeat_interleave(64)[: weight.numel()]
        torch.testing.assert_close(actual, (state.code[halves] * scales).reshape(shape))


def test_a_model_in_eight_bits_equals_that_of_from_pretrained(tmp_path):
    write(tmp_path, fp8, FP8)
    settings = FineGrainedFP8Config(dequantize=True)
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, dtype=torch.float32
    )
    ours = source_of(tmp_path).load(CPU)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, other(IDS).logits)
    assert getattr(ours.config, "quantization_config", None) is None


def test_experts_in_four_bits_equal_those_of_from_pretrained(tmp_path):
    torch.manual_seed(0)
    experts, width, inner = 2, 32, 64
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=experts,
        num_experts_per_tok=1,
    )
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, rows, columns in (("gate_up_proj", 2 * inner, width), ("down_proj", width, inner)):
        key = f"model.layers.0.mlp.experts.{name}"
        del tensors[key]
        shape = (experts, rows, columns // 32)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    configure(tmp_path, MXFP4)
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    ).state_dict()
    ours = source_of(tmp_path).load(CPU).state_dict()
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in other.items())
    target = merge(source_of(tmp_path), SavedLora({}, {}), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize(("quantise", "settings"), [(fp8, FP8), (int4, INT4)], ids=["fp8", "nf4"])
def test_a_merged_checkpoint_is_dequantised(quantise, settings, tmp_path):
    plain = write(tmp_path / "original", quantise, settings)
    pair = LoraPair(torch.randn(3, 64), torch.randn(32, 3), 0.5)
    plain_pair = LoraPair(torch.randn(3, 32), torch.randn(261, 3), 0.5)  # of a plain weight
    source = source_of(tmp_path / "original")
    adapter = SavedLora({PROJECTION: pair, "lm_head": plain_pair}, {})
    target = merge(source, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).state_dict()
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    assert load_file(target / "model.safetensors").keys() == plain.keys()
    plain[f"{PROJECTION}.weight"] += pair.scale * pair.b @ pair.a
    plain["lm_head.weight"] += plain_pair.scale * plain_pair.b @ plain_pair.a
    for name, tensor in plain.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-5)


def test_the_index_of_a_merged_checkpoint_lists_no_scales(tmp_path):
    plain = write(tmp_path / "original", fp8, FP8)
    tensors = load_file(tmp_path / "original" / "model.safetensors")
    (tmp_path / "original" / "model.safetensors").unlink()
    weight_map = {}
    for index, scales in enumerate((False, True)):  # the scales lie in the other file
        part = {n: t for n, t in tensors.items() if n.endswith("_scale_inv") == scales}
        file = f"model-0000{index + 1}-of-00002.safetensors"
        save_file(part, tmp_path / "original" / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    name = "model.safetensors.index.json"
    (tmp_path / "original" / name).write_text(json.dumps(index))
    pair = LoraPair(torch.randn(3, 64), torch.randn(32, 3), 0.5)
    source = source_of(tmp_path / "original")
    target = merge(source, SavedLora({PROJECTION: pair}, {}), tmp_path / "merged")
    written = json.loads((target / name).read_text())
    assert set(written["weight_map"]) == set(plain)
    assert written["metadata"]["total_size"] == sum(tensor.nbytes for tensor in plain.values())
    merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    changed = merged.get_submodule(PROJECTION).weight
    expected = plain[f"{PROJECTION}.weight"] + pair.scale * pair.b @ pair.a
    torch.testing.assert_close(changed, expected)


REMEDY = "set model.source to the unquantised checkpoint"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq (package gptqmodel), which transformers"),
        ({"quant_method": "awq", "bits": 4}, "awq (package gptqmodel), which transformers"),
        ({"quant_method": "modelopt"}, "modelopt (package nvidia-modelopt), which transformers"),
        ({"quant_method": "novel"}, "novel, which transformers"),
    ],
    ids=["gptq", "awq", "modelopt", "unknown"],
)
def test_a_format_that_cannot_be_dequantised_is_refused(settings, reason, checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path)
    configure(folder, settings)
    with pytest.raises(ConfigError) as caught:
        source_of(folder).load(CPU)
    assert str(caught.value) == (
        f"{folder}: config.json: the weights are quantised by {reason} cannot dequantise; {REMEDY}"
    )


def test_a_format_of_a_missing_package_names_the_package(checkpoint, tmp_path, monkeypatch):
    folder = copy_of(checkpoint, tmp_path)
    configure(folder, {"quant_method": "compressed-tensors", "format": "float-quantized"})
    monkeypatch.setitem(__import__("sys").modules, "compressed_tensors", None)
    with pytest.raises(ConfigError) as caught:
        source_of(folder).load(CPU)
    assert str(caught.value) == (
        f"{folder}: config.json: the weights are quantised by compressed-tensors, and are read "
        f"with its package; pip install compressed-tensors, or {REMEDY}"
    )


def test_quantised_weights_without_settings_are_refused_by_their_scales(tmp_path):
    for quantise, name, dtype in (
        (fp8, "model.layers.0.mlp.down_proj.weight_scale_inv", "F32"),
        (int8, "model.layers.0.mlp.down_proj.SCB", "F32"),
        (int4, "model.layers.0.mlp.down_proj.weight.absmax", "F32"),
    ):
        folder = tmp_path / dtype / name
        write(folder, quantise, FP8)
        configure(folder, None)
        with pytest.raises(ConfigError) as caught:
            source_of(folder).require(["lm_head.weight"])
        assert str(caught.value) == (
            f"{folder}/model.safetensors: {name} ({dtype}) belongs to quantised weights, and "
            f"config.json does not say how to dequantise them; {REMEDY}"
        )


@pytest.mark.parametrize("settings", [None, FP8], ids=["without settings", "with settings"])
def test_quantised_weights_without_scales_are_refused_by_their_dtype(settings, tmp_path):
    def without_scale(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"": weight.to(torch.float8_e4m3fn)}, weight

    write(tmp_path, without_scale, FP8)
    configure(tmp_path, settings)
    with pytest.raises(ConfigError) as caught:
        source_of(tmp_path).require(["lm_head.weight"])
    assert str(caught.value) == (
        f"{tmp_path}/model.safetensors: model.layers.0.mlp.down_proj.weight (F8_E4M3) belongs to "
        f"quantised weights, and config.json does not say how to dequantise them; {REMEDY}"
    )


def test_blocks_that_do_not_fit_the_weight_are_refused(tmp_path):
    def odd(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"": weight.to(torch.float8_e4m3fn), "_scale_inv": torch.ones(3, 3)}, weight

    write(tmp_path, odd, FP8)
    with pytest.raises(ConfigError, match=r"q_proj\.weight: Weight shape .* not divisible"):
        source_of(tmp_path).load(CPU)


def copy_of(checkpoint: Path, folder: Path) -> Path:
    """A copy of the configuration and the weights of a checkpoint."""
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    return folder
