"""Files, names and tied parameters are chosen as `from_pretrained` chooses them, or refused."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from emloc.adapters.fold import merge
from emloc.adapters.saved import SavedLora
from emloc.calibration.blockwise import iterate_checkpoint
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.tensors.linalg.correct import LoraPair

CPU = torch.device("cpu")
IDS = torch.arange(24).reshape(2, 12) + 5
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SINGLE = "model.safetensors"


def write(folder: Path, *, tied: bool = False, **settings) -> LlamaForCausalLM:
    model = tiny_llama(tiny_tokenizer(True), tie_word_embeddings=tied)
    model.save_pretrained(folder, **settings)
    return model


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Add tensors to the file, or remove them from it; `__` in a name stands for a dot."""
    stored = load_file(folder / SINGLE)
    for key, tensor in tensors.items():
        name = key.replace("__", ".")
        stored.pop(name, None)
        stored |= {} if tensor is None else {name: tensor}
    save_file(stored, folder / SINGLE, metadata={"format": "pt"})


def source_of(folder: Path, dtype: torch.dtype = torch.float32) -> Source:
    return Source(folder, "tiny", "identity", dtype)


def assert_equals_from_pretrained(folder: Path) -> None:
    """Compare the logits of the loaded model with those of `from_pretrained`."""
    ours, other = source_of(folder).load(CPU), AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, other(IDS).logits)


# Tied parameters ---------------------------------------------------------------------------------


def test_a_tied_head_with_values_of_its_own_is_not_tied(tmp_path):
    write(tmp_path, tied=True)
    head = torch.randn(261, 32)
    change(tmp_path, lm_head__weight=head)
    source = source_of(tmp_path)
    model = source.load(CPU)
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    model.tie_weights()  # as trainers do
    assert torch.equal(model.lm_head.weight, head)
    assert HEAD in source.sizes
    assert_equals_from_pretrained(tmp_path)


def test_a_tied_head_with_the_values_of_the_embedding_stays_tied(tmp_path):
    write(tmp_path, tied=True)
    change(tmp_path, lm_head__weight=load_file(tmp_path / SINGLE)[EMBEDDING].clone())
    source = source_of(tmp_path)
    model = source.load(CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert HEAD not in source.sizes
    assert_equals_from_pretrained(tmp_path)


def test_a_tied_embedding_is_read_from_the_head_if_only_the_head_is_stored(tmp_path):
    write(tmp_path, tied=True)
    embedding = load_file(tmp_path / SINGLE)[EMBEDDING].clone()
    change(tmp_path, lm_head__weight=embedding, model__embed_tokens__weight=None)
    source = source_of(tmp_path)
    source.require(list(source.sizes))
    assert torch.equal(dict(source.read([EMBEDDING]))[EMBEDDING], embedding)
    blocks = ["model.layers.0", "model.layers.1"]
    for block in iterate_checkpoint(source, [{"input_ids": IDS}], blocks, CPU):
        block.peek(lambda mask: None)
    assert_equals_from_pretrained(tmp_path)


def test_a_missing_head_is_refused_unless_it_is_tied(tmp_path):
    write(tmp_path / "untied").model.save_pretrained(tmp_path / "bare")
    write(tmp_path / "tied", tied=True).model.save_pretrained(tmp_path / "bare tied")
    change(tmp_path / "untied", lm_head__weight=None)
    assert HEAD not in load_file(tmp_path / "bare" / SINGLE)
    for name in ("untied", "bare"):
        with pytest.raises(ConfigError) as caught:
            source_of(tmp_path / name).load(CPU)
        assert str(caught.value) == (
            f"{tmp_path / name}: holds no tensor {HEAD}; set model.source to another checkpoint"
        )
    names = load_file(tmp_path / "bare tied" / SINGLE)
    assert not any(name.startswith("model.") for name in names)
    assert_equals_from_pretrained(tmp_path / "bare tied")


# Files -------------------------------------------------------------------------------------------


def test_a_single_file_comes_before_an_index(tmp_path):
    write(tmp_path, max_shard_size="30KB")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        other = LlamaForCausalLM(AutoConfig.from_pretrained(tmp_path))
    other.save_pretrained(tmp_path / "newer")
    shutil.move(tmp_path / "newer" / SINGLE, tmp_path / SINGLE)
    source = source_of(tmp_path)
    assert torch.equal(source.load(CPU).lm_head.weight, other.lm_head.weight)
    assert_equals_from_pretrained(tmp_path)
    target = merge(source, SavedLora({}, {}), tmp_path / "merged")
    assert not list(target.glob("*.index.json"))
    assert torch.equal(source_of(target).load(CPU).lm_head.weight, other.lm_head.weight)


def test_a_file_that_the_configuration_names_is_read(tmp_path):
    write(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / "weights.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    text = json.dumps(config | {"transformers_weights": "weights.safetensors"})
    (tmp_path / "config.json").write_text(text)
    assert_equals_from_pretrained(tmp_path)
    outside = json.dumps(config | {"transformers_weights": "../weights.safetensors"})
    (tmp_path / "config.json").write_text(outside)
    with pytest.raises(ConfigError, match=r"transformers_weights=\.\./weights\.safetensors is no"):
        source_of(tmp_path).load(CPU)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.fp16.safetensors"])
def test_other_files_with_weights_are_refused_with_the_way_to_convert_them(name, tmp_path):
    write(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        source_of(tmp_path).load(CPU)
    assert str(caught.value) == (
        f"{tmp_path}: no model.safetensors, only {name}, which is not read; load it once with "
        "transformers and write it with save_pretrained, then set model.source to the new folder"
    )


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_damaged_file_is_named(size, tmp_path):
    write(tmp_path)
    content = (tmp_path / SINGLE).read_bytes()
    assert len(content) > 20_000
    (tmp_path / SINGLE).write_bytes(content[:size])
    with pytest.raises(ConfigError) as caught:
        source_of(tmp_path).load(CPU)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / SINGLE}: the file is damaged: it ")
    assert text.endswith("; download it again, or set model.source to another checkpoint")
    assert "\n" not in text


def test_a_damaged_index_is_named(tmp_path):
    write(tmp_path, max_shard_size="30KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text()[:50])
    with pytest.raises(ConfigError, match=r"^\S*index\.json: the file is damaged: "):
        source_of(tmp_path).load(CPU)


def test_tensors_without_a_parameter_are_reported_in_one_line(tmp_path, caplog):
    write(tmp_path)
    change(
        tmp_path,
        model__layers__7__mlp__up_proj__weight=torch.ones(2),
        vision__bias=torch.ones(2),
        # Older releases stored these; `from_pretrained` does not report them, either.
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
    )
    with caplog.at_level(logging.INFO, "emloc"):
        source_of(tmp_path).load(CPU)
    assert [record.getMessage() for record in caplog.records] == [
        "model: tensors in the files without a parameter in the model, which are not read: 2 "
        "(first: model.layers.7.mlp.up_proj.weight in model.safetensors)"
    ]
    assert_equals_from_pretrained(tmp_path)


# Names and conversions ---------------------------------------------------------------------------

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
}
# The files of Pythia have other names than the model. Those of the other models hold several
# parameters in one tensor, or the experts of one parameter in tensors of their own.
CONVERTED = {
    "gpt_neox": ({"num_hidden_layers": 2}, r"layers\.1\.attention\.query_key_value"),
    "hrm_text": (
        {"num_layers_per_stack": 1, "num_key_value_heads": 4, "head_dim": 8},
        r"H_module\.layers\.0\.(self_attn|mlp)\..*_proj",
    ),
    "mixtral": (
        {"num_hidden_layers": 1, "num_key_value_heads": 2, "num_local_experts": 4},
        r"layers\.0\.self_attn\..*_proj",
    ),
}


def written(kind: str, folder: Path) -> Source:
    """A source of a random model of this type."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **CONVERTED[kind][0])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return source_of(folder)


@pytest.mark.parametrize("kind", CONVERTED)
def test_tensors_are_named_and_converted_by_the_table_of_transformers(kind, tmp_path):
    source = written(kind, tmp_path)
    assert not source.sizes.keys() <= load_file(tmp_path / SINGLE).keys()
    source.require(list(source.sizes))
    assert_equals_from_pretrained(tmp_path)
    for name, tensor in source.read(list(source.sizes)):
        [(_, alone)] = source.read([name])
        assert torch.equal(alone, tensor)


@pytest.mark.parametrize("kind", CONVERTED)
def test_an_adapter_is_merged_into_converted_tensors(kind, tmp_path):
    source = written(kind, tmp_path / "original")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "original").state_dict()
    stored = load_file(tmp_path / "original" / SINGLE)
    pattern = re.compile(rf".*\.{CONVERTED[kind][1]}")
    layers = [layer for layer in source.linears if pattern.fullmatch(layer)]
    assert layers
    pairs = {
        layer: LoraPair(torch.randn(3, columns), torch.randn(rows, 3), 0.5)
        for layer, (rows, columns) in source.linears.items()
        if layer in layers
    }
    target = merge(source, SavedLora(pairs, {}), tmp_path / "merged")
    shapes = {name: tensor.shape for name, tensor in load_file(target / SINGLE).items()}
    assert shapes == {name: tensor.shape for name, tensor in stored.items()}
    after = AutoModelForCausalLM.from_pretrained(target).state_dict()
    for layer, pair in pairs.items():
        before[f"{layer}.weight"] += pair.scale * pair.b @ pair.a
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor)


def test_converted_tensors_of_another_shape_are_refused(tmp_path):
    source = written("mixtral", tmp_path)
    name = next(n for n in load_file(tmp_path / SINGLE) if ".experts.2." in n)
    stored = load_file(tmp_path / SINGLE)
    del stored[name]
    save_file(stored, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.safetensors: .*; set model\.source to another"):
        source.load(CPU)
