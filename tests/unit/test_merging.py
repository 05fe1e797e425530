"""A merged checkpoint is the original with its adapter added, in files with the same names."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import linears, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from emloc.adapters.fold import merge
from emloc.adapters.lora import Lora
from emloc.adapters.rounding import Rounding
from emloc.adapters.saved import SavedLora, copy_adapter, read_adapter, read_lora
from emloc.config.settings import LoraSettings
from emloc.errors import ConfigError
from emloc.models.checkpoint.source import Source
from emloc.stages.merge_run import merge_run
from emloc.tensors.linalg.correct import LoraPair

IDS = torch.arange(24).reshape(2, 12) + 5
KINDS = {
    "one file": {},
    "sharded": {"max_shard_size": "30KB"},
    "tied": {"tie_word_embeddings": True},
    "bfloat16": {"dtype": torch.bfloat16},
}


def checkpoint(folder: Path, *, max_shard_size="5GB", dtype=torch.float32, **overrides) -> Source:
    tokenizer = tiny_tokenizer(chat=True)
    model = tiny_llama(tokenizer, **overrides).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return Source(folder, "somebody/model", "identity", dtype)


def adapter(source: Source, folder: Path, dtype: torch.dtype | None = None, **settings) -> Path:
    """Save a random PEFT adapter for all layers and return its folder."""
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=source.dtype)
    values = {"r": 4, "lora_alpha": 6, "target_modules": r".*_proj", "task_type": "CAUSAL_LM"}
    tuned = get_peft_model(model, LoraConfig(**(values | settings)))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
            parameter.data = parameter.data.to(dtype or parameter.dtype)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_equals_the_model_with_its_adapter(tmp_path, kind):
    source = checkpoint(tmp_path / "base", **KINDS[kind])
    folder = adapter(source, tmp_path / "adapter", rank_pattern={"q_proj": 2})
    target = merge(source, read_lora(folder), tmp_path / "deep" / "merged")
    assert target == tmp_path / "deep" / "merged"
    merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    before = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, folder))
    # Absolute tolerance, for logits up to 3.
    close = 1e-5 if source.dtype == torch.float32 else 5e-2
    assert (expected - before).abs().max() > 10 * close
    torch.testing.assert_close(logits(merged), expected, atol=close, rtol=0)
    files = {path.name for path in source.folder.iterdir()}
    assert {path.name for path in target.iterdir()} == files
    assert (len(list(target.glob("*.safetensors"))) > 1) == (kind == "sharded")
    text = "as before"
    assert (
        AutoTokenizer.from_pretrained(target)(text).input_ids == source.tokenizer()(text).input_ids
    )
    assert not (tmp_path / "deep" / "merged.partial").exists()


def test_only_adapted_weights_change_and_all_dtypes_stay(tmp_path):
    source = checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    pairs = read_lora(adapter(source, tmp_path / "adapter", target_modules=["q_proj"]))
    target = merge(source, pairs, tmp_path / "merged")
    old, new = (load_file(f / "model.safetensors") for f in (source.folder, target))
    assert old.keys() == new.keys()
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"{layer}.weight" for layer in pairs.pairs}
    assert len(changed) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_merged_weight_is_summed_in_float32_and_rounded_once(tmp_path, dtype):
    """Also for a bfloat16 adapter, whose product B A would be rounded before the sum."""
    source = checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    pairs = read_lora(adapter(source, tmp_path / "adapter", dtype)).pairs
    assert {pair.a.dtype for pair in pairs.values()} == {dtype}
    merge(source, read_lora(tmp_path / "adapter"), tmp_path / "merged")
    new = load_file(tmp_path / "merged" / "model.safetensors")
    for layer, pair in pairs.items():
        exact = source.weight(layer).double() + 1.5 * (pair.b.double() @ pair.a.double())
        assert pair.scale == 1.5
        # Half a unit in the last place, and a little for float32.
        error = (new[f"{layer}.weight"].double() - exact).abs() / exact.abs().clamp(min=1e-3)
        assert error.max() < 2**-8 + 1e-5


def test_an_existing_folder_is_not_overwritten(tmp_path):
    source = checkpoint(tmp_path / "base")
    read = read_lora(adapter(source, tmp_path / "adapter"))
    target = tmp_path / "merged"
    target.mkdir()
    with pytest.raises(ConfigError) as caught:
        merge(source, read, target)
    assert str(caught.value) == f"{target} is already there; give another folder with --to"
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ({"num_hidden_layers": 1}, {}),
        # A tied head has no weight of its own: merging into it would change the embedding.
        ({"tie_word_embeddings": True}, {"target_modules": ["lm_head", "q_proj"]}),
    ],
    ids=["smaller model", "tied head"],
)
def test_an_adapter_for_layers_missing_in_the_checkpoint_is_refused(tmp_path, base, settings):
    made_for = checkpoint(tmp_path / "large")
    read = read_lora(adapter(made_for, tmp_path / "adapter", **settings))
    source = checkpoint(tmp_path / "base", **base)
    with pytest.raises(ConfigError, match=r"^the model has no layer (lm_head|model\.layers\.1)"):
        merge(source, read, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "merged.partial").exists()


def test_an_interrupted_merge_leaves_no_checkpoint_and_can_be_repeated(tmp_path, monkeypatch):
    source = checkpoint(tmp_path / "base", max_shard_size="30KB")
    read = read_lora(adapter(source, tmp_path / "adapter"))
    target = tmp_path / "merged"
    with monkeypatch.context() as patch:
        patch.setattr("emloc.adapters.fold.save_file", _full_disk)
        with pytest.raises(OSError, match="no space"):
            merge(source, read, target)
    assert not target.exists()
    merge(source, read, target)
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert {target / name for name in index.values()} == set(target.glob("*.safetensors"))


def _full_disk(*_, **__):
    raise OSError("no space left")


@pytest.mark.parametrize("emulator", ["full.Full", "svd.Svd"])
def test_a_run_is_merged_into_the_model_of_its_settings(tmp_path, emulator):
    """Also works for runs that were made before an emulator got a new setting."""
    source = checkpoint(tmp_path / "base")
    run = tmp_path / "run"
    copy_adapter(adapter(source, tmp_path / "adapter"), run / "adapter")
    model = OmegaConf.create(
        {
            "_target_": "emloc.models.text.TextModel",
            "name": "tiny",
            "id": "somebody/model",
            "revision": None,
            "source": str(source.folder),
            "wheel": None,
            "dtype": "float32",
            "max_length": 64,
            "lora_targets": ".*",
            "emulator_targets": ".*",
            "excluded": {},
        }
    )
    parts = {
        "emulator": {"_target_": f"emloc.emulators.{emulator}"},
        "compression": {"ratio": 0.5, "of": "linears", "bits": 16},
        "adapter": {"_target_": "emloc.adapters.lora.Lora"},
    }
    if emulator == "svd.Svd":
        parts["emulator"] |= {"algorithm": "subspace", "aware": True, "multiple": 1}
    OmegaConf.save({"model": model, **parts}, run / "config.yaml")
    merged = merge_run(run, run / "merged")
    expected = merge(source, read_lora(run / "adapter"), tmp_path / "by hand")
    for name in ("model.safetensors", "config.json"):
        assert (merged / name).read_bytes() == (expected / name).read_bytes()


def test_a_folder_without_a_run_or_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        merge_run(tmp_path, tmp_path / "merged")
    assert str(caught.value) == f"{tmp_path} is not a run folder; pass one such as runs/demo/<run>"
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        merge_run(tmp_path, tmp_path / "merged")
    assert str(caught.value) == (
        f"{tmp_path} has no adapter: its method trains none, or the run is not finished"
    )


# Modules that were trained whole ------------------------------------------------------------------


def classifier(folder: Path, *, head: bool, **saving) -> Source:
    """Write a random RoBERTa classifier whose checkpoint may lack the head."""
    config = RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=40, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(config)
    state = {k: v for k, v in model.state_dict().items() if head or "classifier" not in k}
    model.save_pretrained(folder, state_dict=state, **saving)
    auto = AutoModelForSequenceClassification
    return Source(folder, "somebody/roberta", "identity", torch.float32, auto)


@pytest.mark.parametrize("saving", [{}, {"max_shard_size": "8KB"}], ids=["one file", "sharded"])
@pytest.mark.parametrize("head", [True, False], ids=["its own head", "a fresh head"])
def test_a_trained_head_is_merged_also_into_a_checkpoint_without_a_head(tmp_path, head, saving):
    source = classifier(tmp_path / "base", head=head, **saving)
    assert ("classifier.dense.weight" in source.weights.names) == head
    torch.manual_seed(1)
    plain = RobertaForSequenceClassification.from_pretrained(source.folder).eval()
    layers = linears(plain, r"roberta\..*(query|dense)")
    tuned = Lora().attach(plain, LoraSettings(2, 4.0, 0.0), layers, modules_to_save=["classifier"])
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    Lora().save(tuned, tmp_path / "adapter", source.name)
    read = read_lora(tmp_path / "adapter")
    assert len(read.extras) == 4
    target = Lora().merge(source, tmp_path / "adapter", tmp_path / "merged")
    merged = RobertaForSequenceClassification.from_pretrained(target).eval()
    ids = IDS.clamp(max=40)
    with torch.no_grad():
        expected = tuned(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    state = merged.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in read.extras.items())
    files = {path.name for path in source.folder.iterdir()}
    assert {path.name for path in target.iterdir()} == files
    index = target / "model.safetensors.index.json"
    assert index.exists() == bool(saving)
    if saving:
        table = json.loads(index.read_text())
        tensors = {path.name: load_file(path) for path in target.glob("*.safetensors")}
        assert {n: f for f, tensors_of_file in tensors.items() for n in tensors_of_file} == table[
            "weight_map"
        ]
        size = sum(
            tensor.nbytes
            for tensors_of_file in tensors.values()
            for tensor in tensors_of_file.values()
        )
        assert table["metadata"]["total_size"] == size


def test_a_merged_head_has_the_dtype_of_the_checkpoint(tmp_path):
    source = checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    head = torch.randn(source.linears["lm_head"])
    merge(source, SavedLora({}, {}, extras={"lm_head.weight": head}), tmp_path / "merged")
    merged_tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged_tensors["lm_head.weight"], head.bfloat16())
    before = load_file(source.folder / "model.safetensors")
    others = before.keys() - {"lm_head.weight"}
    assert all(torch.equal(merged_tensors[name], before[name]) for name in others)


def test_a_parameter_missing_in_the_model_is_refused(tmp_path):
    source = checkpoint(tmp_path / "base")
    other = SavedLora({}, {}, extras={"score.weight": torch.ones(2, 32)})
    with pytest.raises(ConfigError) as caught:
        merge(source, other, tmp_path / "merged")
    assert str(caught.value) == (
        "the model has no parameter score.weight; the adapter is for another model"
    )
    assert not (tmp_path / "merged.partial").exists()


def test_a_fresh_head_gives_the_merged_model_a_configuration_of_its_own(tmp_path):
    """The original has two classes and another task."""
    plain = classifier(tmp_path / "base", head=False)
    path = plain.folder / "config.json"
    settings = json.loads(path.read_text()) | {"architectures": ["RobertaForMaskedLM"]}
    labels = {name: settings.pop(name) for name in ("id2label", "label2id")}
    assert len(labels["id2label"]) == 3
    path.write_text(json.dumps(settings))
    changed = {"fresh_modules": ("classifier",), "config_changes": {"num_labels": 3}}
    source = replace(plain, **changed)
    head = {
        name: torch.randn(tensor.shape)
        for name, tensor in source.meta_model.named_parameters()
        if name.startswith("classifier.")
    }
    merge(source, SavedLora({}, {}, extras=head), tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 3
    assert merged.config.architectures == ["RobertaForSequenceClassification"]
    assert all(torch.equal(merged.state_dict()[name], tensor) for name, tensor in head.items())


# Other files of the original ---------------------------------------------------------------------

OTHER_WEIGHTS = [
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"),
    *("consolidated.safetensors", "model.fp16.safetensors", "consolidated.00.pth", "weights.pt"),
    *("model-q4.gguf", "model.onnx", "model.onnx_data", "tf_model.h5", "flax_model.msgpack"),
    *("model.fp16.safetensors.index.json", "rust_model.ot", "weights.npz", "model.ckpt"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "manifest.json"),
    *("original/consolidated.00.pth", "original/params.json", "onnx/model.onnx"),
]
COMPANIONS = [
    *("README.md", "LICENSE", "modeling_own.py", "chat_template.jinja", "processor_config.json"),
    *("preprocessor_config.json", "tokenizer.model", "vocab.json", "merges.txt", "qwen.tiktoken"),
    *("special_tokens_map.json", "additional_chat_templates/tool_use.jinja"),
]


def test_other_weights_of_the_original_are_not_copied_and_all_other_files_are(tmp_path):
    source = checkpoint(tmp_path / "base")
    read = read_lora(adapter(source, tmp_path / "adapter"))
    own = {path.name for path in source.folder.iterdir()}
    for name in {*OTHER_WEIGHTS, *COMPANIONS} - own:
        (source.folder / name).parent.mkdir(exist_ok=True)
        (source.folder / name).write_text("{}")
    target = merge(source, read, tmp_path / "merged")
    files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert files == own | {*COMPANIONS}


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_the_index_lists_every_tensor_of_every_file_with_the_size_of_all(tmp_path, dtype):
    source = checkpoint(tmp_path / "base", max_shard_size="15KB", dtype=torch.bfloat16)
    target = merge(source, read_lora(adapter(source, tmp_path / "adapter")), tmp_path / "m", dtype)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    tensors = {path.name: load_file(path) for path in target.glob("*.safetensors")}
    assert len(tensors) > 1
    assert index["weight_map"] == {name: file for file, one in tensors.items() for name in one}
    size = sum(tensor.nbytes for one in tensors.values() for tensor in one.values())
    assert index["metadata"]["total_size"] == size
    old = json.loads((source.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == old["metadata"]["total_parameters"]


@pytest.mark.parametrize(
    ("layer", "other"),
    [("lm_head", "model.embed_tokens"), ("model.embed_tokens", "lm_head")],
)
def test_a_module_trained_in_full_that_shares_its_weight_is_refused(tmp_path, layer, other):
    source = checkpoint(tmp_path / "base", tie_word_embeddings=True)
    shape = source.meta_model.get_parameter("model.embed_tokens.weight").shape
    with pytest.raises(ConfigError) as caught:
        merge(
            source,
            SavedLora({}, {}, extras={f"{layer}.weight": torch.ones(shape)}),
            tmp_path / "merged",
        )
    assert str(caught.value) == (
        f"the model has no layer {layer} with a weight of its own: it shares the weight of {other},"
        " and a merge would change both; use the adapter unmerged, or train without this layer "
        "(model.lora_targets)"
    )
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("value", "dtype", "remedy"),
    [
        (float("nan"), torch.float32, "a new training"),
        (1e5, torch.float16, "--dtype float32"),
    ],
)
def test_a_merged_weight_that_is_not_finite_is_refused(tmp_path, value, dtype, remedy):
    source = checkpoint(tmp_path / "base", dtype=dtype)
    layer = "model.layers.0.mlp.up_proj"
    rows, columns = source.linears[layer]
    pair = LoraPair(torch.ones(1, columns), torch.full((rows, 1), value), 1.0)
    with pytest.raises(ConfigError) as caught:
        merge(source, SavedLora({layer: pair}, {}), tmp_path / "merged")
    assert str(caught.value) == (
        f"{layer}.weight: weight plus adapter is not finite in {dtype}; this needs {remedy}"
    )
    assert not (tmp_path / "merged").exists()


# Rounding ----------------------------------------------------------------------------------------


def test_the_share_that_survives_is_that_of_the_energy():
    """Steps of bfloat16 are 2**-7 above 1: an update of less than half a step is lost."""
    weight = torch.ones(3, dtype=torch.bfloat16)
    updates = {
        "first": torch.tensor([0.003, 2**-7, 0.01]),
        "whole": torch.full((3,), 2.0**-6),
        "lost": torch.full((3,), 2.0**-10),
        "none": torch.zeros(3),
    }
    rounding = Rounding()
    for layer, update in updates.items():
        rounding.add(layer, weight, weight + update, (weight + update).bfloat16())
    lost = 0.003**2 + 0 + (0.01 - 2**-7) ** 2
    energy = 0.003**2 + 2**-14 + 0.01**2
    assert rounding.share("first") == pytest.approx(1 - lost / energy, abs=1e-4)
    assert [rounding.share(one) for one in ("whole", "lost", "none")] == [1, 0, 1]
    total = 1 - (lost + 3 * 2**-20) / (energy + 3 * 2**-12 + 3 * 2**-20)
    assert rounding.total_share == pytest.approx(total, abs=1e-4)
    assert rounding.line == (
        f"merge: {total:.1%} of the adapter survives rounding to bfloat16: 1 - |rounding error|² / "
        "|update|² over 4 layers, least in lost (0.0%); --dtype float32 keeps all of it, in a "
        "checkpoint of twice the size"
    )


@given(st.integers(0, 2**32), st.floats(-6, 1), st.sampled_from([torch.bfloat16, torch.float16]))
def test_the_share_lies_between_0_and_1_and_grows_with_the_update(seed, exponent, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, generator=generator).to(dtype)
    update = torch.randn(64, generator=generator)
    rounding = Rounding()
    for name, factor in (("small", 10**exponent), ("large", 1000 * 10**exponent)):
        total = weight.float() + factor * update
        rounding.add(name, weight, total, total.to(dtype))
    assert -1e-6 <= rounding.share("small") <= rounding.share("large") + 0.05 <= 1.05


def test_a_merge_in_16_bits_says_what_survives_and_one_in_32_bits_keeps_all(tmp_path, caplog):
    caplog.set_level("INFO")
    source = checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    folder = adapter(source, tmp_path / "adapter", lora_alpha=5e-4)
    read = read_adapter(folder)
    short = merge(source, read, tmp_path / "short")
    [line] = [line for line in caplog.messages if "survives" in line]
    long = Lora().merge(source, folder, tmp_path / "long", torch.float32)
    assert [line for line in caplog.messages if "survives" in line] == [line]
    old, rounded, exact = (
        load_file(one / "model.safetensors") for one in (source.folder, short, long)
    )
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    energy = lost = 0.0
    for name, tensor in exact.items():
        if name.removesuffix(".weight") not in read.pairs:
            assert torch.equal(tensor, old[name].float())
            continue
        assert torch.equal(tensor.bfloat16(), rounded[name])
        energy += float((tensor - old[name].float()).double().square().sum())
        lost += float((tensor - rounded[name].float()).double().square().sum())
    assert 0.05 < lost / energy < 0.95
    assert f"merge: {1 - lost / energy:.1%} of the adapter survives rounding to bfloat16" in line
    settings = [json.loads((one / "config.json").read_text()) for one in (source.folder, long)]
    assert settings[1] == settings[0] | {"dtype": "float32"}
    assert (short / "config.json").read_bytes() == (source.folder / "config.json").read_bytes()


def test_the_type_of_weights_is_changed_in_every_section_of_the_configuration(tmp_path):
    source = checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    path = source.folder / "config.json"
    settings = json.loads(path.read_text())
    del settings["dtype"]
    parts = {"torch_dtype": "bfloat16", "section": {"dtype": "bfloat16", "hidden_size": 8}}
    path.write_text(json.dumps(settings | parts))
    merge(source, SavedLora({}, {}), tmp_path / "merged", torch.float32)
    assert json.loads((tmp_path / "merged/config.json").read_text()) == settings | {
        "torch_dtype": "float32",
        "section": {"dtype": "float32", "hidden_size": 8},
    }
