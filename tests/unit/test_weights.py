"""Tensors from files, from a seed, or from nowhere: by name, one at a time."""

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
from emloc.models.checkpoint.source import Source
from emloc.models.checkpoint.weights import (
    RandomWeights,
    SafetensorsWeights,
    draws_of,
    parameter_name,
)
from emloc.tensors.linalg.correct import LoraPair
from emloc.tensors.nn.factorized import Factorized

CPU = torch.device("cpu")
PROJECTION = "model.language_model.layers.0.mlp.down_proj"


def drawn(dtype: torch.dtype = torch.float32, seed: int = 0, **changed) -> Source:
    shape = copy.deepcopy(TINY_INTERNVL) | changed
    return Source(None, "tiny", "random", dtype, AutoModelForImageTextToText, shape, seed)


def text(shape: LlamaConfig, folder: Path | None = None) -> Source:
    return Source(
        folder, "tiny", "random", torch.float32, AutoModelForCausalLM, shape.to_dict(), seed=0
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A vision-language checkpoint as transformers writes it, in several files."""
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


def test_a_random_tensor_is_the_same_at_every_read_alone_or_among_others():
    source = drawn()
    names = list(source.sizes)
    whole = dict(source.read(names))
    assert list(whole) == names
    for name in names[::-1]:
        [(_, alone)] = drawn().read([name])
        assert torch.equal(alone, whole[name])
    assert torch.equal(source.weight(PROJECTION), whole[f"{PROJECTION}.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_random_model_is_filled_and_loaded_with_what_is_read(dtype):
    source = drawn(dtype)
    loaded, filled = source.load(CPU), source.skeleton()
    source.fill(filled, list(source.sizes), CPU)
    read = dict(source.read(list(source.sizes)))
    for model in (loaded, filled):
        parameters = dict(model.named_parameters())
        assert parameters.keys() == read.keys()
        assert all(torch.equal(parameters[name], tensor) for name, tensor in read.items())
    assert {tensor.dtype for tensor in read.values()} == {dtype}


def test_torchs_own_random_numbers_are_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = drawn().weight(PROJECTION)
    torch.manual_seed(4)
    assert torch.equal(drawn().weight(PROJECTION), first)
    torch.manual_seed(3)
    drawn().load(CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_or_name_gives_other_numbers():
    source = drawn()
    one = source.weight(PROJECTION)
    assert (one - drawn(seed=1).weight(PROJECTION)).abs().max() > 0.05
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
def test_each_kind_of_parameter_starts_as_its_half_of_the_configuration_says(name, mean, std):
    [(_, tensor)] = drawn().read([name])
    many = tensor.numel()
    assert float(tensor.mean()) == pytest.approx(mean, abs=max(4 * std / many**0.5, 1e-6))
    assert float(tensor.std()) == pytest.approx(std, rel=4 / (2 * many) ** 0.5, abs=1e-6)


def test_layer_scales_are_a_tenth_where_the_configuration_says_nothing():
    model = tiny_internvl()
    del model.config.vision_config.layer_scale_init_value
    [scale] = {draw.mean for name, draw in draws_of(model).items() if "lambda" in name}
    assert scale == 0.1


def test_numbers_are_drawn_at_home_and_moved_to_where_they_are_read():
    """Where reads are from two devices, both have to see one model."""
    draws = draws_of(tiny_internvl())
    name = f"{PROJECTION}.weight"
    [(_, here)] = RandomWeights(0, draws, torch.float32, "cpu").read([name], CPU)
    [(_, away)] = RandomWeights(0, draws, torch.float32, "cpu").read([name], torch.device("meta"))
    assert here.device == CPU
    assert away.is_meta
    assert away.shape == here.shape


def test_a_random_model_reads_images_and_text():
    model = drawn().load(CPU)
    found = logits(model)
    assert found.shape == (2, 10, 261)
    assert bool(found.isfinite().all())
    other = image_batch()
    other["pixel_values"] = other["pixel_values"] + 1
    with torch.no_grad():
        changed = (model(**other).logits - found).abs()
    assert float(changed[:, :2].max()) == 0  # what stands before the image does not see it
    assert float(changed[:, 6:].max()) > 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_the_embedding(tied):
    source = text(tiny_llama(tiny_tokenizer(True), tie_word_embeddings=tied).config)
    model = source.load(CPU)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in source.weights.names) != tied


def test_random_weights_have_no_tokenizer_but_that_of_a_folder(checkpoint):
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
def test_a_vision_language_checkpoint_loads_as_from_pretrained_loads_it(folder, dtype):
    ours = Source(folder, "tiny", "folder", dtype, AutoModelForImageTextToText).load(CPU)
    other = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    assert type(ours) is type(other)
    batch = image_batch() | {"pixel_values": image_batch()["pixel_values"].to(dtype)}
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, other(**batch).logits)


def test_tensors_go_by_the_names_of_the_model_whatever_the_files_call_them(stored):
    names = {name for name, _ in tiny_internvl().named_parameters()}
    assert set(stored.weights.names) == names
    files = stored.folder.glob("*.safetensors")
    written = {name for file in files for name in load_file(file)}
    assert len(written - names) > 40
    assert {parameter_name(name) for name in written} == names
    assert {parameter_name(name) for name in names} == names


class Watched:
    """An open file that keeps book of itself and of the tensors it gave."""

    opened: ClassVar[list[str]] = []
    closed: ClassVar[list[str]] = []
    given: ClassVar[list[weakref.ref]] = []
    alive: ClassVar[list[int]] = []  # of the given ones, at each read

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
        self.alive.append(sum(one() is not None for one in self.given))
        tensor = self.file.get_tensor(name)
        self.given.append(weakref.ref(tensor))
        return tensor


@pytest.fixture
def watched(monkeypatch):
    for book in (Watched.opened, Watched.closed, Watched.given, Watched.alive):
        book.clear()
    monkeypatch.setattr("emloc.models.checkpoint.weights.safe_open", Watched)
    return Watched


def test_one_file_is_open_at_a_time_and_none_behind_a_read(stored, watched):
    names = list(stored.weights.names)
    stored.weight(PROJECTION, CPU)
    assert len(watched.opened) == len(watched.closed) == 1
    for _ in stored.read(names):
        assert len(watched.opened) - len(watched.closed) == 1
    assert len(watched.opened) == 1 + len(list(stored.folder.glob("*.safetensors")))
    assert watched.closed == watched.opened


def test_what_was_read_in_another_dtype_is_let_go_before_the_next_is_read(folder, watched):
    source = Source(folder, "tiny", "folder", torch.bfloat16, AutoModelForImageTextToText)
    source.load(CPU)
    assert len(watched.alive) == len(source.sizes)
    assert set(watched.alive) == {0}


@pytest.mark.parametrize("random", [True, False], ids=["random", "files"])
def test_what_is_replaced_is_left_out_of_a_vision_language_model(stored, random):
    source = drawn() if random else stored
    layer = "model.vision_tower.encoder.layer.1.mlp.fc1"
    weight = source.weight(layer)
    replace = {layer: Factorized(torch.eye(len(weight)), weight, source.bias(layer, CPU))}
    model = source.load(CPU, replace)
    assert model.get_submodule(layer) is replace[layer]
    torch.testing.assert_close(logits(model), logits(source.load(CPU)), atol=1e-6, rtol=0)


def test_an_adapter_is_merged_into_files_with_other_names(stored, tmp_path):
    torch.manual_seed(0)
    pair = LoraPair(torch.randn(3, 48), torch.randn(32, 3), 0.5)
    target = merge(stored, SavedLora({PROJECTION: pair}, {}), tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float32)
    before = tiny_internvl()
    for name, parameter in merged.named_parameters():
        delta = pair.scale * pair.b @ pair.a if name == f"{PROJECTION}.weight" else 0
        torch.testing.assert_close(parameter, before.get_parameter(name) + delta)


def test_there_is_nothing_to_merge_into_without_files(tmp_path):
    with pytest.raises(ConfigError) as caught:
        merge(drawn(), SavedLora({}, {}), tmp_path / "merged")
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
def test_a_shape_gives_everything_but_weights(read):
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


def test_a_folder_is_the_default(checkpoint):
    source = Source(checkpoint, "tiny", "folder", torch.float32)
    assert source.weights.files == SafetensorsWeights(checkpoint).files
    assert source.auto is AutoModelForCausalLM
