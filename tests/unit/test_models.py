"""Every model of the configuration has its true shape and layers, and its weights can be read."""

import copy
import json
from functools import cache

import pytest
import torch
from composed import compose_cached
from omegaconf import OmegaConf
from tiny import TINY_INTERNVL, image_batch, tiny_internvl
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from emloc.config.paths import CONF
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.models.family import ModelFamily
from emloc.models.internvl import InternVL
from emloc.models.text import TextModel
from emloc.models.vision_language import VisionLanguageModel
from emloc.stages.run_config import instantiate

CPU = torch.device("cpu")
# Published number of parameters, LoRA targets, compressed layers.
MODELS = {
    "internvl2_5_2b": (2_205_754_368, 24 * 7, 24 * 7 + 24 * 6),
    "internvl2_5_4b": (3_712_637_952, 36 * 7, 36 * 7 + 24 * 6),
    "internvl2_5_8b": (8_075_365_376, 32 * 7, 32 * 7 + 24 * 6 - 1),
    "internvl2_5_26b": (25_514_186_112, 48 * 7, 48 * 7 + 45 * 6),
    "internvl2_5_38b": (38_388_164_992, 64 * 7, 64 * 7 + 45 * 6),
    "internvl2_5_78b": (78_408_318_336, 80 * 7, 80 * 7 + 45 * 6),
    "llama3_8b": (8_030_261_248, 32 * 7, 32 * 7),
    "qwen2_5_7b": (7_615_616_512, 28 * 7, 28 * 7),
    "qwen2_5_32b": (32_763_876_352, 64 * 7, 64 * 7),
    "qwen2_5_72b": (72_706_203_648, 80 * 7, 80 * 7),
    "qwen2_5_coder_0_5b": (494_032_768, 24 * 7, 24 * 7),
    "qwen2_5_coder_1_5b": (1_543_714_304, 28 * 7, 28 * 7),
    "gemma3_4b": (4_300_079_472, 34 * 7, 34 * 7 + 27 * 6),
    "tiny_internvl": (2_235_968, 4 * 7, 4 * 7 + 4 * 6),
    "tiny_internvl_r50": (1_104_520, 4 * 7, 4 * 7 + 4 * 6),
    "tiny_internvl_r25": (561_696, 4 * 7, 4 * 7 + 4 * 6),
    "smollm2_135m": (134_515_008, 30 * 7, 30 * 7),
}
# Parameters in billions, rounded as in the model cards.
CARDS = {"2b": 2.21, "4b": 3.71, "8b": 8.08, "26b": 25.51, "38b": 38.39, "78b": 78.41}


def settings(name: str, **changed) -> ModelFamily:
    written = compose_cached([f"model={name}"]).model
    written.siblings = {}  # siblings are tested as models of their own
    return instantiate(OmegaConf.merge(written, changed))


@cache
def planned(name: str) -> tuple[ModelFamily, Source]:
    model = settings(name)
    return model, model.shape_source()


def tiny(**changed) -> InternVL:
    values = {
        "name": "tiny",
        "id": "somebody/model",
        "revision": None,
        "source": "auto",
        "wheel": None,
        "weights": "random",
        "dtype": "float32",
        "max_length": 64,
        "lora_targets": r"model\.language_model\..*_proj",
        "emulator_targets": r".*_proj",
        "shape": copy.deepcopy(TINY_INTERNVL),
    }
    return InternVL(**({"system": None} | values | changed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("internvl")
    tiny_internvl().save_pretrained(home)
    return home


# The YAMLs ---------------------------------------------------------------------------------------


def test_the_table_contains_every_model():
    assert set(MODELS) == {path.stem for path in (CONF / "model").glob("[!_]*.yaml")}


@pytest.mark.parametrize("name", MODELS)
def test_a_shape_has_as_many_parameters_as_the_checkpoint(name):
    total = sum(planned(name)[1].sizes.values())
    assert total == MODELS[name][0]
    size = name.rpartition("_")[2]
    if name.startswith("internvl"):
        assert total / 1e9 == pytest.approx(CARDS[size], rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_the_target_patterns_match_the_linears_of_the_blocks(name):
    model, source = planned(name)
    adapted, compressed = model.adapted_layers(source), model.compressible_layers(source)
    assert (len(adapted), len(compressed)) == MODELS[name][1:]
    assert not any("vision" in layer or "projector" in layer for layer in adapted)
    rest = {layer for layer in source.linears if layer not in compressed}
    head = {"lm_head"}
    if "internvl" in name:
        head |= {f"model.multi_modal_projector.linear_{i}" for i in (1, 2)}
    last = {"model.language_model.layers.31.mlp.down_proj"} if name == "internvl2_5_8b" else set()
    assert rest == head | last
    assert set(adapted) <= set(compressed) | last


@pytest.mark.parametrize("name", MODELS)
def test_transformers_builds_the_model_type_of_a_shape(name):
    model, source = planned(name)
    kinds = {"internvl": InternVL, "llama": TextModel, "qwen2": TextModel}
    kinds |= {"gemma3": VisionLanguageModel}
    assert type(model) is kinds[source.config.model_type]
    assert source.auto is type(model).auto
    assert source.name == model.id
    dtype = torch.float32 if name.startswith("tiny") else torch.bfloat16
    assert {parameter.dtype for parameter in source.skeleton().parameters()} == {dtype}


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("internvl")])
def test_a_tile_is_256_tokens_of_the_vocabulary(name):
    config = planned(name)[1].config
    vision = config.vision_config
    patches = vision.image_size[0] // vision.patch_size[0]
    assert (patches * config.downsample_ratio) ** 2 == config.image_seq_length == 256
    assert config.image_token_id < config.text_config.vocab_size
    bias = planned(name)[1].sizes.get("model.vision_tower.encoder.layer.0.attention.q_proj.bias", 0)
    assert bias == (1024 if vision.hidden_size == 1024 else 0)


# Where the weights are ---------------------------------------------------------------------------


def test_random_weights_need_no_checkpoint():
    source = tiny().open()
    assert source.folder is None
    assert source.name == "somebody/model"
    with torch.no_grad():
        assert source.load(CPU)(**image_batch()).logits.shape == (2, 10, 261)


def test_the_identity_of_random_weights_contains_shape_seed_and_device_type():
    first = tiny().open()
    word, seed, shape, device = first.identity.split(":")
    assert (word, seed) == ("random", "0")
    assert device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert first.key == tiny().open().key
    other = tiny(shape=TINY_INTERNVL | {"image_token_id": 8}).open()
    assert other.identity.split(":")[2] != shape
    assert tiny(dtype="bfloat16").open().key != first.key


def test_the_folder_sets_the_shape_also_for_random_weights(folder):
    source = tiny(source=str(folder), shape={"model_type": "llama"}).open()
    assert source.config.model_type == "internvl"
    random_weight = source.weight("lm_head")
    assert torch.equal(random_weight, tiny().open().weight("lm_head"))
    stored = tiny(source=str(folder), weights="checkpoint").open().weight("lm_head")
    assert (random_weight - stored).abs().max() > 0.01


def test_a_plan_uses_the_shape_of_the_folder_if_there_is_one(folder):
    planned, stored = tiny().shape_source(), tiny(source=str(folder), shape={}).shape_source()
    assert planned.sizes == stored.sizes
    assert planned.linears == stored.linears
    with pytest.raises(ConfigError, match=r"^somebody/model: only its shape is known here; set "):
        planned.load(CPU)


@pytest.mark.parametrize("weights", ["random", "checkpoint"])
def test_a_plan_without_folder_and_shape_is_refused(weights):
    with pytest.raises(ConfigError) as caught:
        tiny(weights=weights, shape={}).shape_source()
    assert str(caught.value) == (
        "model.shape of tiny has no model_type; set model.source=/path/to/checkpoint, or "
        "model.shape to the model's configuration"
    )


# What cannot be built ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"model_type": "no_such_model"}, "Unrecognized model identifier: no_such_model"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
    ],
    ids=["kind", "value"],
)
def test_an_invalid_shape_is_refused_in_one_line(shape, reason):
    with pytest.raises(ConfigError) as caught:
        tiny(shape=shape).open().skeleton()
    message = str(caught.value)
    assert message.startswith("model.shape: transformers cannot build this model: ")
    assert reason in message
    assert "\n" not in message


def test_a_checkpoint_with_its_own_code_is_refused_without_a_prompt(tmp_path):
    config = {"model_type": "somebodys_own", "auto_map": {"AutoConfig": "configuration.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        tiny(weights="checkpoint", source=str(tmp_path)).open().skeleton()
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: config.json: transformers cannot build this model")
    assert message.endswith("; set model.source to a checkpoint in transformers' format")
    assert "\n" not in message


@pytest.mark.parametrize("shape", ["llama", "internvl"])
def test_a_text_model_and_a_vision_language_model_are_not_interchangeable(shape):
    name, auto = {
        "llama": ("smollm2_135m", AutoModelForImageTextToText),
        "internvl": ("internvl2_5_2b", AutoModelForCausalLM),
    }[shape]
    source = Source(None, "x", "x", torch.float32, auto, settings(name).shape)
    assert isinstance(source.config, type(AutoConfig.for_model(shape)))
    with pytest.raises(ConfigError) as caught:
        source.skeleton()
    assert str(caught.value) == (
        f"x: {auto.__name__} cannot build a model of type {shape}; set model or model.source"
    )


def test_targets_without_a_match_are_refused_before_weights_are_read():
    model = tiny(weights="checkpoint", lora_targets="nothing")
    with pytest.raises(ConfigError) as caught:
        model.adapted_layers(model.shape_source())
    assert str(caught.value) == (
        "model.lora_targets='nothing' matches no linear layer of tiny (one of its layers is "
        "model.vision_tower.encoder.layer.0.attention.q_proj); set model.lora_targets"
    )
