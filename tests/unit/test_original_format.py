"""Read InternVL checkpoints in the format of their authors: settings, tensors, tokenizer."""

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import TINY_INTERNVL, image_batch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    InternVLForConditionalGeneration,
)
from transformers.convert_slow_tokenizer import import_protobuf

import emloc
from emloc.adapters.fold import merge
from emloc.adapters.saved import SavedLora
from emloc.config.compose import compose
from emloc.cost.plan.blocks import DecoderBlocks
from emloc.errors import ConfigError
from emloc.models.checkpoint.fused_tensors import TensorSlice
from emloc.models.checkpoint.internvl_chat import ChatLayout, read_internvl_chat
from emloc.models.checkpoint.source import Source
from emloc.models.checkpoint.tokenizer import added_tokens, tokenizer_of
from emloc.models.checkpoint.weights import SafetensorsWeights
from emloc.models.shared_inputs import names_by_input, names_by_stored_tensor
from emloc.sweeps.job import identities
from emloc.tensors.linalg.correct import LoraPair

CPU = torch.device("cpu")
MODELS = Path(emloc.__file__).parent.parent / "conf" / "model"

# The authors' config.json for the tiny model, without the settings of its language model.
VISION = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "qk_normalization": False,
    "initializer_factor": 0.3,
    "initializer_range": 0.05,
    "drop_path_rate": 0.1,
    "use_flash_attn": True,
}
# Settings of the tiny language model; each family below adds its type and whether it is tied.
TEXT = {
    key: value
    for key, value in TINY_INTERNVL["text_config"].items()
    if key not in ("model_type", "tie_word_embeddings")
} | {"rms_norm_eps": 1e-6}
INTERNLM2 = TEXT | {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "auto_map": {"AutoModel": "modeling_internlm2.InternLM2ForCausalLM"},
    "bias": False,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
}
QWEN2 = TEXT | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 70,
}
CHAT = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    },
    "model_type": "internvl_chat",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 28,
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internvl2_5",
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "use_thumbnail": True,
}
FAMILIES = {"internlm2": INTERNLM2, "qwen2": QWEN2}


def settings(family: str, vision: dict | None = None, **changed) -> dict:
    halves = {"vision_config": VISION | (vision or {}), "llm_config": FAMILIES[family]}
    return copy.deepcopy(CHAT | halves | changed)


def native_model(family: str, **vision) -> InternVLForConditionalGeneration:
    """Return a random tiny model in transformers' format; all parameters differ."""
    shape = copy.deepcopy(TINY_INTERNVL)
    shape["vision_config"] |= vision
    shape["text_config"] |= {
        "model_type": {"internlm2": "llama", "qwen2": "qwen2"}[family],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    model = InternVLForConditionalGeneration(AutoConfig.for_model(**shape)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def authors_tensors(state: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Rename and fuse the tensors as the authors' checkpoints do."""
    remaining, tensors = dict(state), {}
    tower, layers = "model.vision_tower.", "model.language_model.layers."
    for index in range(2):
        here, there = f"{tower}encoder.layer.{index}.", f"vision_model.encoder.layers.{index}."
        for leaf in ("weight", "bias"):
            qkv = [remaining.pop(f"{here}attention.{one}_proj.{leaf}", None) for one in "qkv"]
            if qkv[0] is not None:
                tensors[f"{there}attn.qkv.{leaf}"] = torch.cat(qkv)
            for ours, theirs in (
                ("attention.projection_layer", "attn.proj"),
                ("attention.q_norm", "attn.q_norm"),
                ("attention.k_norm", "attn.k_norm"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
                ("layernorm_before", "norm1"),
                ("layernorm_after", "norm2"),
            ):
                if f"{here}{ours}.{leaf}" in remaining:
                    tensors[f"{there}{theirs}.{leaf}"] = remaining.pop(f"{here}{ours}.{leaf}")
        tensors[f"{there}ls1"] = remaining.pop(f"{here}lambda_1")
        tensors[f"{there}ls2"] = remaining.pop(f"{here}lambda_2")
        if family == "internlm2":
            here, there = f"{layers}{index}.", f"language_model.model.layers.{index}."
            q, k, v = (remaining.pop(f"{here}self_attn.{one}_proj.weight") for one in "qkv")
            heads = [
                torch.cat(
                    [q[16 * at : 16 * at + 16], k[8 * at : 8 * at + 8], v[8 * at : 8 * at + 8]]
                )
                for at in range(2)
            ]
            tensors[f"{there}attention.wqkv.weight"] = torch.cat(heads)
            for ours, theirs in (
                ("self_attn.o_proj", "attention.wo"),
                ("mlp.gate_proj", "feed_forward.w1"),
                ("mlp.down_proj", "feed_forward.w2"),
                ("mlp.up_proj", "feed_forward.w3"),
                ("input_layernorm", "attention_norm"),
                ("post_attention_layernorm", "ffn_norm"),
            ):
                tensors[f"{there}{theirs}.weight"] = remaining.pop(f"{here}{ours}.weight")
    if family == "internlm2":
        embedding = remaining.pop("model.language_model.embed_tokens.weight")
        tensors["language_model.model.tok_embeddings.weight"] = embedding
        tensors["language_model.output.weight"] = remaining.pop("lm_head.weight")
    fixed = {
        f"{tower}embeddings.cls_token": "vision_model.embeddings.class_embedding",
        f"{tower}embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
        f"{tower}embeddings.patch_embeddings.projection.": (
            "vision_model.embeddings.patch_embedding."
        ),
        "model.multi_modal_projector.layer_norm.": "mlp1.0.",
        "model.multi_modal_projector.linear_1.": "mlp1.1.",
        "model.multi_modal_projector.linear_2.": "mlp1.3.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    for name, tensor in remaining.items():
        [ours] = [ours for ours in fixed if name.startswith(ours)]
        tensors[fixed[ours] + name.removeprefix(ours)] = tensor
    return tensors


def write_checkpoint(folder: Path, config: dict, tensors: dict[str, Tensor] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<img>": 6, "<IMG_CONTEXT>": 7}))
    if tensors:
        whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        names = sorted(whole)
        index = {name: files[at % 2] for at, name in enumerate(names)}
        for file in files:
            own = {name: whole[name] for name in names if index[name] == file}
            save_file(own, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


VARIANTS = {
    "internlm2": ("internlm2", {}),
    "qwen2": ("qwen2", {}),
    "internlm2 and the larger tower": (
        "internlm2",
        {"attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm"},
    ),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request, tmp_path):
    """A model in transformers' format, and the folder of the same model in the authors' format."""
    family, vision = request.param
    theirs = {"attention_bias": "qkv_bias", "use_qk_norm": "qk_normalization"}
    config = settings(family, {theirs.get(key, key): value for key, value in vision.items()})
    model = native_model(family, **vision)
    tensors = authors_tensors(dict(model.named_parameters()), family)
    return model, write_checkpoint(tmp_path / "theirs", config, tensors)


# Tensors -----------------------------------------------------------------------------------------


def test_tensors_of_the_authors_files_equal_those_of_the_model(pair):
    model, folder = pair
    weights = SafetensorsWeights(folder, read_internvl_chat(folder).layout())
    own = dict(model.named_parameters())
    assert set(weights.names) == set(own)
    stored = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert not stored & set(own)
    read = dict(weights.read(list(own), CPU))
    assert read.keys() == own.keys()
    assert all(torch.equal(read[name], parameter) for name, parameter in own.items())
    assert all(tensor.is_contiguous() for tensor in read.values())


def test_layers_of_one_tensor_of_the_authors_files_share_an_input(pair):
    """That of the vision tower, and of the language model if it is InternLM2."""
    model, folder = pair
    weights = SafetensorsWeights(folder, read_internvl_chat(folder).layout())
    linears = [n for n, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    groups = names_by_stored_tensor(SimpleNamespace(weights=weights), linears)
    assert sorted(name for names in groups for name in names) == sorted(linears)
    together = {tuple(names) for names in groups if len(names) > 1}
    by_input = {tuple(names) for names in names_by_input(linears) if "q_proj" in names[0]}
    is_fused = "attention.wqkv" in " ".join(
        tensor for file in folder.glob("*.safetensors") for tensor in load_file(file)
    )
    assert together == {names for names in by_input if is_fused or "vision" in names[0]}


def test_a_model_built_from_the_authors_settings_gives_the_same_logits(pair):
    model, folder = pair
    chat = read_internvl_chat(folder)
    built = InternVLForConditionalGeneration(AutoConfig.for_model(**chat.shape())).eval()
    weights = SafetensorsWeights(folder, chat.layout())
    built.load_state_dict(dict(weights.read(list(weights.names), CPU)))
    with torch.no_grad():
        actual, expected = built(**image_batch()).logits, model(**image_batch()).logits
    assert torch.equal(actual, expected)
    assert float(expected.std()) > 0.1


def test_the_target_patterns_match_the_split_projections(pair):
    model, _ = pair
    conf = compose(["model=internvl2_5_8b"]).model
    linears = [n for n, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    adapted = [name for name in linears if re.fullmatch(conf["lora_targets"], name)]
    compressed = [name for name in linears if re.fullmatch(conf["emulator_targets"], name)]
    assert len(adapted) == 2 * 7
    assert len(compressed) == 2 * 7 + 2 * 6
    assert {name.split(".")[-1] for name in adapted} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    [excluded] = conf["excluded"]
    text = conf["shape"]["text_config"]
    last = f"model.language_model.layers.{text['num_hidden_layers'] - 1}.mlp.down_proj"
    assert re.fullmatch(excluded, last)
    assert not any(re.fullmatch(excluded, name) for name in linears)


def test_rows_of_a_tensor_slice():
    assert TensorSlice(1, 3, 1, 2).rows(12) == [slice(4, 8)]
    assert TensorSlice(2, 4, 0, 2).rows(16) == [slice(0, 4), slice(8, 12)]
    assert TensorSlice(2, 4, 3, 4).rows(16) == [slice(6, 8), slice(14, 16)]


def test_a_slice_is_written_to_the_rows_that_it_reads():
    stored = torch.zeros(16, 3)
    tensor = torch.arange(24.0).reshape(8, 3) + 1
    part = TensorSlice(2, 4, 0, 2)
    part.insert(stored, tensor)
    assert torch.equal(part.extract(stored, 16), tensor)
    assert int((stored == 0).all(dim=1).sum()) == 8


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_slices_of_a_fused_projection_follow_its_heads(leaf):
    layout = ChatLayout(groups=4, key_value_heads=8)
    here = "model.language_model.layers.3.self_attn"
    assert layout(f"language_model.model.layers.3.attention.wqkv.{leaf}") == {
        f"{here}.q_proj.{leaf}": TensorSlice(8, 6, 0, 4),
        f"{here}.k_proj.{leaf}": TensorSlice(8, 6, 4, 5),
        f"{here}.v_proj.{leaf}": TensorSlice(8, 6, 5, 6),
    }
    here = "model.vision_tower.encoder.layer.3.attention"
    assert layout(f"vision_model.encoder.layers.3.attn.qkv.{leaf}") == {
        f"{here}.q_proj.{leaf}": TensorSlice(1, 3, 0, 1),
        f"{here}.k_proj.{leaf}": TensorSlice(1, 3, 1, 2),
        f"{here}.v_proj.{leaf}": TensorSlice(1, 3, 2, 3),
    }


class RecordingFile:
    """An open safetensors file that records how many rows of each tensor are read."""

    reads: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, path, framework, device="cpu"):
        self.file = safe_open(path, framework=framework, device=device)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *why):
        return self.file.__exit__(*why)

    def get_slice(self, name):
        stored, reads = self.file.get_slice(name), self.reads

        class Slice:
            get_shape = stored.get_shape

            def __getitem__(self, rows):
                reads.append((name, rows.stop - rows.start))
                return stored[rows]

        return Slice()


def test_queries_keys_and_values_read_each_row_once(tmp_path, monkeypatch):
    tensors = authors_tensors(dict(native_model("internlm2").named_parameters()), "internlm2")
    folder = write_checkpoint(tmp_path, settings("internlm2"), tensors)
    weights = SafetensorsWeights(folder, read_internvl_chat(folder).layout())
    RecordingFile.reads.clear()
    monkeypatch.setattr("emloc.models.checkpoint.weights.safe_open", RecordingFile)
    list(
        weights.read(
            [f"model.language_model.layers.0.self_attn.{one}_proj.weight" for one in "qkv"], CPU
        )
    )
    fused = "language_model.model.layers.0.attention.wqkv.weight"
    assert RecordingFile.reads == [(fused, rows) for rows in (16, 16, 8, 8, 8, 8)]


def test_a_fused_tensor_with_an_indivisible_number_of_rows_is_refused(tmp_path):
    name = "vision_model.encoder.layers.0.attn.qkv.weight"
    folder = write_checkpoint(tmp_path, settings("qwen2"), {name: torch.zeros(47, 16)})
    weights = SafetensorsWeights(folder, read_internvl_chat(folder).layout())
    with pytest.raises(ConfigError) as caught:
        list(weights.read(["model.vision_tower.encoder.layer.0.attention.q_proj.weight"], CPU))
    [file] = [one for one in folder.glob("*.safetensors") if load_file(one)]
    assert str(caught.value) == (
        f"{file}: {name}: 47 rows are not 1 x 3 equal shares; "
        "set model.source to another checkpoint"
    )


# Settings ----------------------------------------------------------------------------------------

INTERNLM2_5_7B = {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "attn_implementation": "flash_attention_2",
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": 92553,
}
INTERNLM2_5_20B = INTERNLM2_5_7B | {
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_attention_heads": 48,
    "num_hidden_layers": 48,
    "rope_scaling": {"factor": 3.0, "type": "dynamic"},
}
QWEN2_5_32B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 27648,
    "max_position_embeddings": 32768,
    "max_window_layers": 70,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151674,
}
VIT_300M = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "attention_dropout": 0.0,
    "drop_path_rate": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "image_size": 448,
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-06,
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "qk_normalization": False,
    "qkv_bias": True,
}
VIT_6B = VIT_300M | {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "norm_type": "rms_norm",
    "num_attention_heads": 25,
    "num_hidden_layers": 45,
    "qk_normalization": True,
    "qkv_bias": False,
}
TRUE_SIZES = {
    "internvl2_5_8b": (VIT_300M, INTERNLM2_5_7B, 92546),
    "internvl2_5_26b": (VIT_6B, INTERNLM2_5_20B, 92546),
    "internvl2_5_38b": (VIT_6B, QWEN2_5_32B, 151667),
}


@pytest.mark.parametrize("name", TRUE_SIZES)
def test_published_settings_give_the_shapes_in_the_model_files(name, tmp_path):
    vision, text, image_token = TRUE_SIZES[name]
    config = CHAT | {"vision_config": vision, "llm_config": text, "force_image_size": 448}
    write_checkpoint(tmp_path, config)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": image_token}))
    actual = read_internvl_chat(tmp_path).shape()
    conf = yaml.safe_load((MODELS / f"{name}.yaml").read_text(encoding="utf-8"))["shape"]
    rope = actual["text_config"].pop("rope_parameters")
    planned = conf["text_config"].pop("rope_parameters")
    # Dynamic scaling changes only positions beyond max_position_embeddings, which no plan reaches.
    assert rope["rope_theta"] == planned["rope_theta"]
    assert rope["rope_type"] == ("default" if text is QWEN2_5_32B else "dynamic")
    for half in ("vision_config", "text_config"):
        one, other = actual.pop(half), conf.pop(half)
        assert one | other == one
        assert len(other) >= 12
    assert actual | conf == actual
    assert len(conf) == 5


def test_transformers_builds_a_configuration_from_the_shape(tmp_path):
    config = AutoConfig.for_model(
        **read_internvl_chat(write_checkpoint(tmp_path, settings("internlm2"))).shape()
    )
    assert config.image_token_id == 7
    assert config.image_seq_length == 4
    assert config.text_config.model_type == "llama"
    assert config.text_config.rope_parameters == {
        "rope_type": "dynamic",
        "factor": 2.0,
        "rope_theta": 1000000,
    }
    assert config.text_config.attention_bias is False
    assert config.vision_config.attention_bias is True
    assert config.vision_config.layer_scale_init_value == 0.3


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_read_from_the_language_model_settings(tied, tmp_path):
    text = QWEN2 | {"tie_word_embeddings": tied}
    folder = write_checkpoint(
        tmp_path, settings("qwen2", llm_config=text, tie_word_embeddings=not tied)
    )
    model = InternVLForConditionalGeneration(
        AutoConfig.for_model(**read_internvl_chat(folder).shape())
    )
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied


@pytest.mark.parametrize("kind", ["internvl", "llama", None])
def test_a_folder_in_another_format_is_not_read_as_internvl_chat(kind, tmp_path):
    if kind:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert read_internvl_chat(tmp_path) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"select_layer": -4}, "select_layer=-4 is not supported, only -1"),
        ({"ps_version": "v1"}, "ps_version=v1 is not supported, only v2"),
        ({"pad2square": True}, "pad2square=True is not supported, only False"),
        ({"use_thumbnail": False}, "use_thumbnail=False is not supported, only True"),
        ({"dynamic_image_size": False}, "dynamic_image_size=False is not supported, only True"),
        ({"min_dynamic_patch": 2}, "min_dynamic_patch=2 is not supported, only 1"),
        ({"use_llm_lora": 16}, "use_llm_lora=16 is not supported, only 0"),
        ({"force_image_size": 56}, "force_image_size=56 differs from vision_config.image_size=28"),
        (
            {"llm_config": TEXT | {"architectures": ["Phi3ForCausalLM"]}},
            "the language model Phi3ForCausalLM is not supported, only InternLM2ForCausalLM, "
            "LlamaForCausalLM, Qwen2ForCausalLM",
        ),
        ({"llm_config": {}}, "llm_config has no hidden_size"),
        ({"vision_config": VISION | {"patch_size": None}}, "vision_config has no patch_size"),
        (
            {"vision_config": VISION | {"qk_normalization": True, "layer_norm_eps": 1e-5}},
            "layer_norm_eps=1e-05 with qk_normalization is not supported, only 1e-06",
        ),
    ],
)
def test_settings_that_transformers_does_not_support_are_refused(changed, reason, tmp_path):
    folder = write_checkpoint(tmp_path, settings("internlm2", **changed))
    with pytest.raises(ConfigError) as caught:
        read_internvl_chat(folder).shape()
    assert str(caught.value) == (
        f"{folder}: config.json: {reason}; set model.source to another checkpoint"
    )


def test_an_old_checkpoint_without_a_pixel_shuffle_version_is_refused(tmp_path):
    config = settings("internlm2")
    del config["ps_version"]
    with pytest.raises(ConfigError, match="ps_version=v1 is not supported, only v2"):
        read_internvl_chat(write_checkpoint(tmp_path, config)).shape()


def test_an_indivisible_number_of_heads_is_refused(tmp_path):
    text = INTERNLM2 | {"num_key_value_heads": 3}
    with pytest.raises(
        ConfigError, match="4 attention heads are not divisible by 3 key/value heads"
    ):
        read_internvl_chat(
            write_checkpoint(tmp_path, settings("internlm2", llm_config=text))
        ).layout()


def test_a_tokenizer_without_image_tokens_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path, settings("qwen2"))
    (folder / "added_tokens.json").unlink()
    with pytest.raises(ConfigError) as caught:
        read_internvl_chat(folder).shape()
    assert str(caught.value) == (
        f"{folder}: no tokenizer file has the token <IMG_CONTEXT>; "
        "set model.source to a folder with the checkpoint's tokenizer"
    )


# Tokenizers --------------------------------------------------------------------------------------

TOKENS = {"<img>": 6, "<IMG_CONTEXT>": 7}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", TOKENS),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {str(i): {"content": one} for one, i in TOKENS.items()}},
        ),
        (
            "tokenizer.json",
            {"added_tokens": [{"id": i, "content": one} for one, i in TOKENS.items()]},
        ),
    ],
)
def test_added_tokens_are_read_from_each_file_that_can_hold_them(file, content, tmp_path):
    (tmp_path / file).write_text(json.dumps(content))
    assert added_tokens(tmp_path) == TOKENS


# Entries are (piece, score, kind). Kinds: 1 normal, 2 unknown, 3 control, 4 user-defined, 6 byte.
BYTES = [(f"<0x{value:02X}>", 0.0, 6) for value in range(256)]
MERGED = ["he", "ll", "hell", "hello", "▁w", "or", "▁wor", "ld", "▁world", "▁▁", "lo", "tok"]
PIECES = [
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("</s>", 0.0, 3),
    *BYTES,
    *((piece, -float(rank), 1) for rank, piece in enumerate(MERGED)),
    *((letter, -50.0 - rank, 1) for rank, letter in enumerate("▁helowrdtk[UN1]")),
    ("[UN1]", 0.0, 4),
    ("[UN2]", 0.0, 4),
]
AFTER = len(PIECES)


def sentencepiece_folder(folder: Path, prefix: bool = False, extra: bool = False, **config) -> Path:
    """Write the tokenizer files of InternLM2, with a SentencePiece model of a few pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    proto = import_protobuf().ModelProto()
    for piece, score, kind in PIECES:
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = config.pop("model_type", 2)
    proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback = 0, True
    proto.normalizer_spec.add_dummy_prefix = prefix
    proto.normalizer_spec.remove_extra_whitespaces = extra
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    names = {0: "<unk>", 1: "<s>", 2: "</s>", AFTER - 1: "<|im_start|>", AFTER: "<IMG_CONTEXT>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    values = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": {
            str(index): {"content": name, "special": True} | flags for index, name in names.items()
        },
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": {"content": "<unk>"} | flags,
        "chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values | config))
    return folder


# The token ids that SentencePiece 0.2.3 computes for these texts with this model.
EXPECTED = {
    (False, False): {
        "hello world": [262, 267],
        "hell  world": [261, 271, 267],
        " hello": [271, 262],
        "helloworld": [262, 276, 264, 266],
        "hallo": [272, 100, 260, 275],
        "höre ": [272, 198, 185, 277, 273, 271],
        "low[UN1]low": [269, 276, 286, 269, 276],
        "a[UN1] world": [100, 286, 267],
    },
    (True, False): {
        "hello world": [271, 262, 267],
        "hell  world": [271, 261, 271, 267],
        " hello": [268, 262],
        "hallo": [271, 272, 100, 260, 275],
        "höre ": [271, 272, 198, 185, 277, 273, 271],
        " [UN1]": [268, 286],
    },
    (False, True): {
        "hello world": [262, 267],
        "hell  world": [261, 267],
        " hello": [262],
        "höre ": [272, 198, 185, 277, 273],
        "low[UN1]low": [269, 276, 286, 269, 276],
    },
}


@pytest.mark.parametrize(("prefix", "extra"), EXPECTED)
def test_token_ids_equal_those_of_sentencepiece(prefix, extra, tmp_path):
    tokenizer = tokenizer_of(sentencepiece_folder(tmp_path, prefix, extra))
    actual = {
        text: tokenizer(text, add_special_tokens=False).input_ids
        for text in EXPECTED[prefix, extra]
    }
    assert actual == EXPECTED[prefix, extra]


def test_added_tokens_replace_or_follow_pieces_and_texts_begin_with_the_start_token(tmp_path):
    tokenizer = tokenizer_of(sentencepiece_folder(tmp_path))
    [w, world] = tokenizer.convert_tokens_to_ids(["▁w", "▁world"])
    ids = tokenizer("<|im_start|> world<IMG_CONTEXT><IMG_CONTEXT> w").input_ids
    assert ids == [1, AFTER - 1, world, AFTER, AFTER, w]
    assert tokenizer(" w", " world").input_ids == [1, w, 1, world]
    assert len(tokenizer) == AFTER + 1
    assert tokenizer.decode(ids) == "<s><|im_start|> world<IMG_CONTEXT><IMG_CONTEXT> w"
    assert tokenizer.decode(ids, skip_special_tokens=True) == " world w"
    assert (tokenizer.pad_token, tokenizer.eos_token_id, tokenizer.unk_token_id) == ("</s>", 2, 0)
    assert tokenizer.model_max_length == 8192
    turns = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<s>hello"


def test_start_and_end_tokens_follow_the_settings(tmp_path):
    folder = sentencepiece_folder(tmp_path, add_bos_token=False, add_eos_token=True)
    tokenizer = tokenizer_of(folder)
    assert tokenizer("hello").input_ids == [PIECES.index(("hello", -3.0, 1)), 2]


def test_broken_internlm2_tokenizer_files_are_refused(tmp_path):
    folder = sentencepiece_folder(tmp_path / "unigram", model_type=1)
    with pytest.raises(ConfigError, match=r"tokenizer\.model: no BPE model; set model"):
        tokenizer_of(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=r"unigram: no tokenizer\.model there; set model"):
        tokenizer_of(folder)
    far = {str(AFTER + 5): {"content": "<box>"}}
    folder = sentencepiece_folder(tmp_path / "gap", added_tokens_decoder=far)
    with pytest.raises(ConfigError, match="gap: the token <box> cannot have the id"):
        tokenizer_of(folder)


def qwen2_folder(folder: Path) -> Path:
    """Write tokenizer files of Qwen2 with one token per byte, beside the authors' config.json."""
    write_checkpoint(folder, settings("qwen2"))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*letters, "hi"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nh i\n")
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "<IMG_CONTEXT>"]
    ids = {name: 257 + at for at, name in enumerate(names)}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    values = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(i): {"content": name, "special": True} for name, i in ids.items()
        },
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def test_a_qwen2_tokenizer_loads_although_the_model_type_is_unknown(tmp_path):
    folder = qwen2_folder(tmp_path)
    config = AutoConfig.for_model(**read_internvl_chat(folder).shape())
    assert config.image_token_id == 261
    tokenizer = tokenizer_of(folder, config)
    assert tokenizer("<|im_start|>a<IMG_CONTEXT>").input_ids == [
        258,
        tokenizer.convert_tokens_to_ids("a"),
        261,
    ]
    assert tokenizer("hi").input_ids == [256]
    assert tokenizer.decode(tokenizer("hi there").input_ids) == "hi there"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


# Through a source --------------------------------------------------------------------------------


def source_of(folder: Path) -> Source:
    return Source(folder, "tiny", "folder", torch.float32, AutoModelForImageTextToText)


def test_a_source_in_the_authors_format_loads_the_same_model(pair):
    model, folder = pair
    source = source_of(folder)
    loaded = source.load(CPU)
    with torch.no_grad():
        assert torch.equal(loaded(**image_batch()).logits, model(**image_batch()).logits)
    layer = "model.language_model.layers.1.self_attn.k_proj"
    assert source.linears[layer] == (16, 32)
    assert torch.equal(source.weight(layer), model.get_parameter(f"{layer}.weight"))


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_is_merged_into_the_rows_of_fused_tensors(pair, tmp_path, stored, dtype):
    model, folder = pair
    torch.manual_seed(0)
    layers = [
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.self_attn.v_proj",
        "model.language_model.layers.1.mlp.down_proj",
        "model.vision_tower.encoder.layer.1.attention.k_proj",
    ]
    shapes = source_of(folder).linears
    pairs = {
        name: LoraPair(torch.randn(3, shapes[name][1]), torch.randn(shapes[name][0], 3), 0.5)
        for name in layers
    }
    folder = shutil.copytree(folder, tmp_path / "stored")
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor.to(stored) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    before = {one.name: one.read_bytes() for one in folder.glob("*.safetensors")}
    target = merge(source_of(folder), SavedLora(pairs, {}), tmp_path / "merged", dtype)
    assert before == {one.name: one.read_bytes() for one in folder.glob("*.safetensors")}
    written = [load_file(path) for path in target.glob("*.safetensors")]
    assert {tensor.dtype for one in written for tensor in one.values()} == {dtype or stored}
    merged = source_of(target).load(CPU)
    for name, parameter in merged.named_parameters():
        pair_ = pairs.get(name.removesuffix(".weight"))
        delta = pair_.scale * pair_.b @ pair_.a if pair_ else 0
        total = model.get_parameter(name).to(stored).float() + delta
        torch.testing.assert_close(parameter, total.to(dtype or stored).float())


def test_the_results_of_a_run_name_the_authors_format_and_no_other(pair, tmp_path):
    _, folder = pair
    model = native_model("qwen2")
    model.save_pretrained(tmp_path / "native")

    def recorded(source: Source) -> dict:
        opened = SimpleNamespace(open=lambda: source)
        emulator = SimpleNamespace(model=lambda *_: opened)
        run = {"model": None, "compression": None, "task": SimpleNamespace(key="rows")}
        return identities(SimpleNamespace(emulator=emulator, **run))

    authors, native = source_of(folder), source_of(tmp_path / "native")
    expected = {"data": "rows", "model": authors.key}
    assert recorded(authors) == expected | {"authors_format": "internvl_chat"}
    assert recorded(native) == {"data": "rows", "model": native.key}
    assert "authors_format" not in recorded(replace(authors, seed=0))


def test_a_checkpoint_with_dynamic_positions_can_be_planned(tmp_path):
    blocks = DecoderBlocks(source_of(write_checkpoint(tmp_path, settings("internlm2"))))
    model = blocks.first(2)
    actual = model.model.language_model(
        input_ids=torch.zeros(1, 8, dtype=torch.long, device="meta")
    )
    assert actual.last_hidden_state.shape == (1, 8, 32)


def test_a_source_in_the_authors_format_has_its_tokenizer(tmp_path):
    tokenizer = source_of(qwen2_folder(tmp_path)).tokenizer()
    assert tokenizer("hi<IMG_CONTEXT>").input_ids == [256, 261]
