"""Single tensors read by name from files, drawn from a seed, or described by their shape alone."""

import copy
import weakref
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import TINY_INTERNVL, image_batch, tiny_internvl, tiny_llama, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig

from emloc.adapters.fold import merge
from emloc.adapters.saved import SavedLora
from emloc.errors import ConfigError
from emloc.models.checkpoint.random_weights import RandomWeights, tensor_inits
from emloc.models.checkpoint.source import Source
from emloc.tensors.linalg.correct import LoraPair
from emloc.tensors.nn.factorized import Factorized

CPU = torch.device("cpu")
PROJECTION = "model.language_model.layers.0.mlp.down_proj"


def random_source(dtype: torch.dtype = torch.float32, seed: int = 0, **changed) -> Source:
    shape = copy.deepcopy(TINY_INTERNVL) | changed
    return Source(None, "tiny", "random", dtype, AutoModelForImageTextToText, shape, seed)


def text(shape: LlamaConfig, folder: Path | None = None) -> Source:
    return Source(
        folder, "tiny", "random", torch.float32, AutoModelForCausalLM, shape.to_dict(), seed=0
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder with a vision-language checkpoint in several files, written by transformers."""
    home = tmp_path_factory.mktemp("internvl")
    tiny_internvl().save_pretrained(home, max_shard_size="60KB")
    return home


@pytest.fixture
def stored(folder) -> Source:
    return Source(folder, "tiny", "folder", torch.float32, AutoModelForImageTextToText)


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(**image_batch()).logits


# Random ------------------------------------------------------------------------------------------


def test_a_random_tensor_is_equal_at_every_read():
    source = random_source()
    names = list(source.sizes)
    whole = dict(source.read(names))
    assert list(whole) == names
    for name in names[::-1]:
        [(_, alone)] = random_source().read([name])
        assert torch.equal(alone, whole[name])
    assert torch.equal(source.weight(PROJECTION), whole[f"{PROJECTION}.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_random_model_contains_the_tensors_that_are_read(dtype):
    source = random_source(dtype)
    loaded, filled = source.load(CPU), source.skeleton()
    source.fill(filled, list(source.sizes), CPU)
    read = dict(source.read(list(source.sizes)))
    for model in (loaded, filled):
        parameters = dict(model.named_parameters())
        assert parameters.keys() == read.keys()
        assert all(torch.equal(parameters[name], tensor) for name, tensor in read.items())
    assert {tensor.dtype for tensor in read.values()} == {dtype}


def test_random_weights_do_not_depend_on_the_torch_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = random_source().weight(PROJECTION)
    torch.manual_seed(4)
    assert torch.equal(random_source().weight(PROJECTION), first)
    torch.manual_seed(3)
    random_source().load(CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_depend_on_seed_and_name():
    source = random_source()
    one = source.weight(PROJECTION)
    assert (one - random_source(seed=1).weight(PROJECTION)).abs().max() > 0.05
    assert (one - source.weight(PROJECTION.replace(".0.", ".1."))).abs().max() > 0.05


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("model.language_model.layers.1.mlp.up_proj.weight", 0, 0.04),
        ("model.language_model.embed_tokens.weight", 0, 0.04),
        ("model.vision_tower.encoder.layer.1.mlp.fc1.weight", 0, 0.05),
        ("model.vision_tower.embeddings.patch_embeddings.projection.weight", 0, 0.05),
        ("model.vision_tower.embeddings.position_embeddings", 0, 0.05),
        ("model.multi_modal_projector.linear_1.weight", 0, 0.02),
        ("lm_head.weight", 0, 0.02),
        ("model.vision_tower.encoder.layer.0.lambda_2", 0.3, 0),
        ("model.language_model.norm.weight", 1, 0),
        ("model.vision_tower.encoder.layer.0.layernorm_after.weight", 1, 0),
        ("model.vision_tower.encoder.layer.0.layernorm_after.bias", 0, 0),
        ("model.language_model.layers.0.self_attn.q_proj.bias", 0, 0),
    ],
)
def test_each_kind_of_parameter_is_initialised_by_its_configuration(name, mean, std):
    [(_, tensor)] = random_source().read([name])
    many = tensor.numel()
    assert float(tensor.mean()) == pytest.approx(mean, abs=max(4 * std / many**0.5, 1e-6))
    assert float(tensor.std()) == pytest.approx(std, rel=4 / (2 * many) ** 0.5, abs=1e-6)


def test_layer_scales_are_a_tenth_by_default():
    model = tiny_internvl()
    del model.config.vision_config.layer_scale_init_value
    [scale] = {draw.mean for name, draw in tensor_inits(model).items() if "lambda" in name}
    assert scale == 0.1


def test_random_weights_are_drawn_on_one_device_and_moved():
    """Reads from two devices must give the same model."""
    draws = tensor_inits(tiny_internvl())
    name = f"{PROJECTION}.weight"
    [(_, here)] = RandomWeights(0, draws, torch.float32, "cpu").read([name], CPU)
    [(_, away)] = RandomWeights(0, draws, torch.float32, "cpu").read([name], torch.device("meta"))
    assert here.device == CPU
    assert away.is_meta
    assert away.shape == here.shape


def test_a_random_model_reads_images_and_text():
    model = random_source().load(CPU)
    actual = logits(model)
    assert actual.shape == (2, 10, 261)
    assert bool(actual.isfinite().all())
    other = image_batch()
    other["pixel_values"] = other["pixel_values"] + 1
    with torch.no_grad():
        changed = (model(**other).logits - actual).abs()
    assert float(changed[:, :2].max()) == 0  # tokens before the image do not attend to the image
    assert float(changed[:, 6:].max()) > 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_the_embedding(tied):
    source = text(tiny_llama(tiny_tokenizer(True), tie_word_embeddings=tied).config)
    model = source.load(CPU)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in source.weights.names) != tied


def test_random_weights_use_the_tokenizer_of_a_folder(checkpoint):
    config = tiny_llama(tiny_tokenizer(True)).config
    assert (
        text(config, checkpoint).tokenizer()("a").input_ids == tiny_tokenizer(True)("a").input_ids
    )
    with pytest.raises(ConfigError) as caught:
        text(config).tokenizer()
    assert str(caught.value) == (
        "tiny: without a checkpoint there is no tokenizer; set model.source=/path/to/checkpoint"
    )


# Files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_a_vision_language_checkpoint_equals_from_pretrained(folder, dtype):
    ours = Source(folder, "tiny", "folder", dtype, AutoModelForImageTextToText).load(CPU)
    other = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    assert type(ours) is type(other)
    batch = image_batch() | {"pixel_values": image_batch()["pixel_values"].to(dtype)}
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, other(**batch).logits)


def test_tensors_have_the_names_of_the_model_although_the_files_differ(stored):
    names = {name for name, _ in tiny_internvl().named_parameters()}
    assert set(stored.weights.names) == names
    files = stored.folder.glob("*.safetensors")
    written = {name for file in files for name in load_file(file)}
    assert len(written - names) > 40


class RecordingFile:
    """An open safetensors file that records opened and closed files and returned tensors."""

    opened: ClassVar[list[str]] = []
    closed: ClassVar[list[str]] = []
    returned: ClassVar[list[weakref.ref]] = []
    alive: ClassVar[list[int]] = []  # number of returned tensors still in memory, at each read

    def __init__(self, path, framework, device="cpu"):
        assert device == "cpu"
        self.opened.append(path.name)
        self.path, self.file = path, safe_open(path, framework=framework, device=device)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *why):
        self.closed.append(self.path.name)
        return self.file.__exit__(*why)

    def get_tensor(self, name):
        self.alive.append(sum(one() is not None for one in self.returned))
        tensor = self.file.get_tensor(name)
        self.returned.append(weakref.ref(tensor))
        return tensor


@pytest.fixture
def recording_file(monkeypatch):
    for book in (
        RecordingFile.opened,
        RecordingFile.closed,
        RecordingFile.returned,
        RecordingFile.alive,
    ):
        book.clear()
    monkeypatch.setattr("emloc.models.checkpoint.weights.safe_open", RecordingFile)
    return RecordingFile


def test_one_file_is_open_at_a_time_and_none_after_a_read(stored, recording_file):
    names = list(stored.weights.names)
    stored.weight(PROJECTION, CPU)
    assert len(recording_file.opened) == len(recording_file.closed) == 1
    for _ in stored.read(names):
        assert len(recording_file.opened) - len(recording_file.closed) == 1
    assert len(recording_file.opened) == 1 + len(list(stored.folder.glob("*.safetensors")))
    assert recording_file.closed == recording_file.opened


def test_each_converted_tensor_is_freed_before_the_next_read(folder, recording_file):
    source = Source(folder, "tiny", "folder", torch.bfloat16, AutoModelForImageTextToText)
    source.load(CPU)
    assert len(recording_file.alive) == len(source.sizes)
    assert set(recording_file.alive) == {0}


@pytest.mark.parametrize("random", [True, False], ids=["random", "files"])
def test_replaced_layers_of_a_vision_language_model_are_not_read(stored, random):
    source = random_source() if random else stored
    layer = "model.vision_tower.encoder.layer.1.mlp.fc1"
    weight = source.weight(layer)
    replace = {layer: Factorized(torch.eye(len(weight)), weight, source.bias(layer, CPU))}
    model = source.load(CPU, replace)
    assert model.get_submodule(layer) is replace[layer]
    torch.testing.assert_close(logits(model), logits(source.load(CPU)), atol=1e-6, rtol=0)


def test_an_adapter_is_merged_into_files_with_other_tensor_names(stored, tmp_path):
    torch.manual_seed(0)
    pair = LoraPair(torch.randn(3, 48), torch.randn(32, 3), 0.5)
    target = merge(stored, SavedLora({PROJECTION: pair}, {}), tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float32)
    before = tiny_internvl()
    for name, parameter in merged.named_parameters():
        delta = pair.scale * pair.b @ pair.a if name == f"{PROJECTION}.weight" else 0
        torch.testing.assert_close(parameter, before.get_parameter(name) + delta)


def test_merging_into_random_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        merge(random_source(), SavedLora({}, {}), tmp_path / "merged")
    assert str(caught.value) == (
        "random weights of seed 0: there is no checkpoint to merge into; set model.source"
    )


# Neither -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda source: list(source.read(["lm_head.weight"])),
        lambda source: source.weight("lm_head"),
        lambda source: source.bias("lm_head", CPU),
        lambda source: source.load(CPU),
        lambda source: source.fill(source.skeleton(), ["lm_head.weight"], CPU),
        lambda source: source.require(["lm_head.weight"]),
    ],
    ids=["read", "weight", "bias", "load", "fill", "require"],
)
def test_a_shape_without_weights_gives_all_other_facts(read):
    source = Source(
        None, "tiny", "shape", torch.float32, AutoModelForImageTextToText, TINY_INTERNVL
    )
    model = tiny_internvl()
    assert source.sizes == {name: one.numel() for name, one in model.named_parameters()}
    assert len(source.linears) == 2 * 6 + 2 + 2 * 7 + 1
    assert source.config.vision_config.hidden_size == 16
    assert all(parameter.is_meta for parameter in source.skeleton().parameters())
    with pytest.raises(ConfigError) as caught:
        read(source)
    assert str(caught.value) == (
        "tiny: only its shape is known here; set model.source=/path/to/checkpoint "
        "or model.weights=random"
    )


def test_weights_are_read_from_a_folder_by_default(checkpoint):
    source = Source(checkpoint, "tiny", "folder", torch.float32)
    assert source.weights.files == [checkpoint / "model.safetensors"]
    assert source.auto is AutoModelForCausalLM
