"""Adapter folders of PEFT are read and written unchanged; other adapters than LoRA are refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny import linears, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

from emloc.adapters.lora import Lora
from emloc.adapters.saved import copy_adapter, lora_of, name_base, read_lora
from emloc.config.settings import LoraSettings
from emloc.errors import ConfigError
from emloc.tensors.linalg.correct import LoraPair

IDS = torch.arange(24).reshape(2, 12) + 5
TARGETS = ["q_proj", "v_proj", "down_proj"]


def base() -> nn.Module:
    return tiny_llama(tiny_tokenizer(chat=True))


def tuned(**settings) -> PeftModel:
    """Return a model with a LoRA whose B is far from zero, as after a training."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base(), LoraConfig(**(values | settings))).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def scalings(model: nn.Module) -> dict[str, float]:
    """Layer -> the scale that PEFT multiplies the update by."""
    return {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.fixture
def saved(tmp_path):
    """Function that saves a PEFT model and returns its folder."""

    def save(model: PeftModel, name: str = "adapter") -> Path:
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        return tmp_path / name

    return save


def test_peft_loads_an_adapter_that_was_read_and_saved(saved, tmp_path):
    model = tuned()
    folder = saved(model)
    read = read_lora(folder)
    read.save(tmp_path / "again")
    again = PeftModel.from_pretrained(base(), tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(base()))
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json"}
    first, second = (
        load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "again")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read.config == json.loads((folder / "adapter_config.json").read_text())
    assert read_lora(tmp_path / "again").config == read.config


def test_a_pair_equals_the_update_of_its_layer(saved):
    model = tuned()
    pairs = read_lora(saved(model)).pairs
    assert set(pairs) == {
        f"model.layers.{i}.{place}"
        for i in range(2)
        for place in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    for layer, pair in pairs.items():
        module = model.base_model.model.get_submodule(layer)
        assert pair.a.shape == (4, module.in_features)
        assert pair.b.shape == (module.out_features, 4)
        torch.testing.assert_close(pair.delta, module.get_delta_weight("default"))


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 4, "lora_alpha": 4}, 1.0),
        ({"r": 4, "lora_alpha": 16}, 4.0),
        ({"r": 8, "lora_alpha": 1}, 0.125),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 3.0),
    ],
)
def test_the_scale_is_alpha_over_the_rank_or_its_square_root(saved, settings, scale):
    model = tuned(**settings)
    pairs = read_lora(saved(model)).pairs
    assert {pair.scale for pair in pairs.values()} == {scale}
    assert {layer: pair.scale for layer, pair in pairs.items()} == scalings(model)


@pytest.mark.filterwarnings("ignore:The following")  # some patterns match nothing on purpose
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [
        ({"q_proj": 2}, {}),
        ({}, {"q_proj": 32}),
        ({"q_proj": 2, "down_proj": 6}, {"v_proj": 3, "q_proj": 5}),
        ({r"model.layers.0.*": 2}, {r"layers.1.mlp.down_proj": 7}),
        ({r"layers\.\d+\.self_attn\.[qv]_proj": 3, "q_proj": 5}, {r"1\.self_attn\..*": 9}),
        ({"proj": 2, "_proj": 3, "j": 5}, {"proj": 2}),
        ({"^model.layers.1.self_attn.q_proj": 2}, {"^layers.0.self_attn.q_proj": 32}),
    ],
)
def test_patterns_of_rank_and_alpha_are_read_as_by_peft(saved, ranks, alphas, rslora):
    model = tuned(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    pairs = read_lora(saved(model)).pairs
    assert {layer: pair.scale for layer, pair in pairs.items()} == scalings(model)
    for layer, pair in pairs.items():
        delta = model.base_model.model.get_submodule(layer).get_delta_weight("default")
        torch.testing.assert_close(pair.delta, delta)


def test_a_model_in_memory_gives_the_same_adapter_as_its_folder(saved):
    model = tuned(rank_pattern={"q_proj": 2})
    inside, outside = lora_of(model), read_lora(saved(model))
    assert inside.pairs.keys() == outside.pairs.keys()
    for layer, pair in inside.pairs.items():
        assert torch.equal(pair.a, outside.pairs[layer].a)
        assert torch.equal(pair.b, outside.pairs[layer].b)
        assert pair.scale == outside.pairs[layer].scale
    with pytest.raises(ConfigError, match="adapter must be a PEFT model or the folder of one"):
        lora_of(base())


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_B.bias"),
    ],
    ids=["dora", "embedding", "bias"],
)
def test_variants_of_lora_are_refused_by_name(saved, settings, named):
    folder = saved(tuned(**settings))
    with pytest.raises(ConfigError) as caught:
        read_lora(folder)
    assert re.fullmatch(
        rf"{folder}: \S*{re.escape(named)}\S* is no LoRA matrix; "
        "recovery and merge need plain LoRA",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens=[5, 6]"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication=[[0, 2], [1, 2]]"),
    ],
)
def test_an_option_that_keeps_the_names_of_a_lora_is_refused(saved, settings, option):
    folder = saved(tuned(**settings))
    with pytest.raises(ConfigError) as caught:
        read_lora(folder)
    assert str(caught.value) == (
        f"{folder}: a LoRA with {option} is no plain LoRA; recovery and merge need plain LoRA"
    )


@pytest.mark.parametrize(
    ("name", "content"), [("adapter_config.json", "{"), ("adapter_model.safetensors", "")]
)
def test_a_damaged_file_is_named(saved, name, content):
    folder = saved(tuned())
    (folder / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_lora(folder)
    assert str(caught.value).startswith(f"{folder / name} cannot be read (")
    assert str(caught.value).endswith("); save the adapter again")


def test_a_missing_matrix_is_named(saved):
    folder = saved(tuned())
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj.lora_B.weight"
    del tensors[f"base_model.model.{name}"]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError) as caught:
        read_lora(folder)
    assert str(caught.value) == f"{folder}: {name} is missing; save it again"


def test_the_active_adapter_of_a_model_in_memory_is_read(saved):
    model = tuned()
    other = LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=1)
    model.add_adapter("other", other)
    model.set_adapter("other")
    read = lora_of(model)
    assert len(read.pairs) == 2
    assert {pair.scale for pair in read.pairs.values()} == {0.5}
    folder = saved(model)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=rf"this is no adapter folder; pass {folder}/other$"):
        read_lora(folder)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="several adapters are active: default, other"):
        lora_of(model)


@pytest.mark.parametrize("start", ["pissa_niter_4", "olora"])
def test_an_initialisation_that_changes_the_model_is_refused(saved, start):
    folder = saved(tuned(init_lora_weights=start))
    with pytest.raises(ConfigError, match=f"initialised by {start.split('_')[0]}, which changes"):
        read_lora(folder)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_lora(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: the file adapter_model.safetensors is missing; this is no adapter folder"
    )


def test_a_recovered_adapter_is_marked_and_cannot_be_recovered_again(saved, tmp_path):
    read = read_lora(saved(tuned()))
    assert read.recovered is None

    def double(layer: str, pair: LoraPair) -> LoraPair:
        return LoraPair(pair.a, 2 * pair.b, pair.scale)

    recovered = read.map(double, {"by": "test"})
    assert read.recovered is None
    recovered.save(tmp_path / "carried")
    again = read_lora(tmp_path / "carried")
    assert again.recovered == {"by": "test"}
    for layer, pair in read.pairs.items():
        assert torch.equal(again.pairs[layer].b, 2 * pair.b)
        assert torch.equal(again.pairs[layer].a, pair.a)
    for one in (recovered, again):
        with pytest.raises(ConfigError, match=r"already recovered .* by \{'by': 'test'\}; pass th"):
            one.map(double, {"by": "test"})
    # PEFT ignores the mark.
    assert PeftModel.from_pretrained(base(), tmp_path / "carried").peft_config["default"].r == 4


def test_a_changed_pair_may_be_a_slice_of_a_larger_matrix(saved, tmp_path):
    """Slices of larger matrices are stored as contiguous matrices."""
    read = read_lora(saved(tuned()))
    wide = {k: LoraPair(torch.cat([p.a, p.a])[::2], p.b, p.scale) for k, p in read.pairs.items()}
    read.map(lambda layer, _: wide[layer], {"by": "test"}).save(tmp_path / "out")
    saved_lora = read_lora(tmp_path / "out")
    assert all(torch.equal(saved_lora.pairs[layer].a, pair.a) for layer, pair in wide.items())


def test_copying_an_adapter_replaces_the_target_folder(saved, tmp_path):
    folder, target = saved(tuned()), tmp_path / "run" / "adapter"
    target.mkdir(parents=True)
    (target / "old").write_text("")
    copy_adapter(folder, target)
    assert {p.name for p in target.iterdir()} == {p.name for p in folder.iterdir()}
    assert (target / "adapter_model.safetensors").read_bytes() == (
        folder / "adapter_model.safetensors"
    ).read_bytes()


def test_lora_attaches_a_peft_lora_with_the_given_settings(tmp_path):
    lora = LoraSettings(rank=4, alpha=6.0, dropout=0.25)
    plain = base()
    model = Lora().attach(plain, lora, linears(plain, r".*\.(q_proj|down_proj)"))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 6.0, 0.25, "none")
    assert set(scalings(model).values()) == {1.5}
    assert len(scalings(model)) == 4
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert all(".lora_" in name for name in trained)
    Lora().save(model, tmp_path / "adapter", "somebody/model")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "somebody/model"
    assert {pair.scale for pair in read_lora(tmp_path / "adapter").pairs.values()} == {1.5}


# What PEFT is given -------------------------------------------------------------------------------


ONE = LoraSettings(rank=2, alpha=2.0, dropout=0.0)


def adapted(model: PeftModel) -> set[str]:
    return set(scalings(model))


class Towers(LlamaForCausalLM):
    """A model with a second tower whose layer names end like those of the first."""

    def __init__(self, config):
        super().__init__(config)
        self.second = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList()})})
        block = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(32, 64, bias=False)})})
        self.second["model"]["layers"].append(block)


def test_a_pattern_that_also_matches_containers_adapts_only_linears():
    plain = base()
    # The pattern also matches the container `mlp` and its activation.
    layers = linears(plain, r".*layers\.0\.mlp.*")
    assert len(layers) == 3
    assert adapted(Lora().attach(plain, ONE, layers)) == set(layers)


def test_a_layer_is_adapted_alone_if_another_name_ends_like_its_name(tmp_path):
    """PEFT also matches names that end like a listed name."""
    layer = "model.layers.0.mlp.up_proj"
    model = Towers(base().config)
    assert f"second.{layer}" in linears(model, ".*")
    tuned = Lora().attach(model, ONE, [layer])
    assert adapted(tuned) == {layer}
    Lora().save(tuned, tmp_path, "somebody/model")
    assert adapted(PeftModel.from_pretrained(Towers(base().config), tmp_path)) == {layer}


def test_a_layer_missing_in_the_model_is_refused():
    with pytest.raises(ConfigError) as caught:
        Lora().attach(base(), ONE, ["model.layers.0.mlp.up_proj", "model.layers.7.mlp.up_proj"])
    assert str(caught.value) == (
        "PEFT cannot adapt exactly the chosen layers: model.layers.7.mlp.up_proj differs; "
        "set model.lora_targets"
    )


def test_the_saved_configuration_lists_the_full_name_of_each_layer(tmp_path):
    """PEFT shortens lists of 20 or more names to endings.

    The endings are unique in the emulator, but a larger original model may have further matches.
    """
    small = tiny_llama(tiny_tokenizer(chat=True), num_hidden_layers=4)
    layers = linears(small, r"model\.layers\.[0123]\..*_proj")
    assert len(layers) == 28
    tuned = Lora().attach(small, ONE, layers)
    assert len(tuned.peft_config["default"].target_modules) < 28
    Lora().save(tuned, tmp_path, "somebody/model")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(layers)
    original = tiny_llama(tiny_tokenizer(chat=True), num_hidden_layers=6)
    assert adapted(PeftModel.from_pretrained(original, tmp_path)) == set(layers)


def test_two_trainings_save_identical_configurations(tmp_path):
    for folder in ("one", "two"):
        plain = base()
        tuned = Lora().attach(plain, ONE, linears(plain, r".*_proj"))
        Lora().save(tuned, tmp_path / folder, "somebody/model")
    one, two = (tmp_path / name / "adapter_config.json" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_models_that_generate_no_text_are_adapted():
    config = RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=40,
    )  # fmt: skip
    model = RobertaForSequenceClassification(config)
    layers = linears(model, r".*layer\.0\..*")
    tuned = Lora().attach(model, ONE, layers, modules_to_save=["classifier"])
    assert tuned.peft_config["default"].task_type is None
    assert adapted(tuned) == set(layers)
    ids = torch.arange(5, 15).reshape(2, 5)
    tuned(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert {name.split(".")[-1] for name in trained} == {"weight", "bias"}
    assert sum(".classifier." in name for name in trained) == 4
    assert all(".lora_" in name or ".classifier." in name for name in trained)


# Modules trained whole ----------------------------------------------------------------------------


def with_head() -> PeftModel:
    """Return a model with a LoRA far from zero and a trained head."""
    plain = base()
    layers = linears(plain, r".*(q_proj|lm_head)")
    model = Lora().attach(plain, ONE, layers, modules_to_save=["lm_head"])
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_a_fully_trained_module_is_saved_and_read_by_its_name(tmp_path):
    model = with_head()
    assert adapted(model) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    Lora().save(model, tmp_path / "one", "somebody/model")
    read = read_lora(tmp_path / "one")
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert read.extras.keys() == {"lm_head.weight"}
    assert torch.equal(read.extras["lm_head.weight"], head)
    assert not torch.equal(head, base().lm_head.weight)
    read.save(tmp_path / "two")
    for folder in ("one", "two"):
        assert torch.equal(logits(Lora().load(base(), tmp_path / folder)), logits(model))
    assert torch.equal(lora_of(model).extras["lm_head.weight"], head)


def test_changing_the_pairs_keeps_fully_trained_modules(tmp_path):
    Lora().save(with_head(), tmp_path / "one", "somebody/model")
    read = read_lora(tmp_path / "one")
    changed = read.map(lambda _, pair: LoraPair(2 * pair.a, pair.b, pair.scale), {"by": "test"})
    changed.save(tmp_path / "two")
    again = read_lora(tmp_path / "two").extras
    assert again.keys() == read.extras.keys() == {"lm_head.weight"}
    assert torch.equal(again["lm_head.weight"], read.extras["lm_head.weight"])


# State --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [with_head, lambda: tuned(use_dora=True)], ids=["head", "dora"])
def test_a_state_contains_all_trained_tensors_and_restores_them(make):
    model = make()
    state = {name: tensor.clone() for name, tensor in Lora().state(model).items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert state.keys() == trained.keys()
    before = logits(model)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.3)
    assert not torch.equal(logits(model), before)
    Lora().restore(model, state)
    assert torch.equal(logits(model), before)
    state.popitem()
    with pytest.raises(ValueError, match="the checkpoint and the model differ in base_model"):
        Lora().restore(model, state)


def test_a_saved_adapter_is_loaded_trainable_or_frozen(tmp_path):
    model = with_head()
    Lora().save(model, tmp_path, "somebody/model")
    frozen = Lora().load(base(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())
    going_on = Lora().load(base(), tmp_path, trainable=True)
    state = Lora().state(going_on)
    assert state.keys() == Lora().state(model).keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in Lora().state(model).items())


def test_another_base_is_named_in_the_configuration_and_in_the_model_card(tmp_path):
    plain = base()
    model = Lora().attach(plain, ONE, linears(plain, r".*_proj"))
    Lora().save(model, tmp_path, "somebody/model")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nbase_model: somebody/model\n")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    name_base(tmp_path, "/my/model", "v2")
    changed = {"base_model_name_or_path": "/my/model", "revision": "v2"}
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == config | changed
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == weights
    # The name is twice in the card: as its base, and in a tag.
    assert card.count("somebody/model") == 2
    expected = card.replace("somebody/model", "/my/model")
    assert (tmp_path / "README.md").read_text() == expected


def test_an_adapter_that_is_no_peft_folder_names_no_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"gates": 3}')
    name_base(tmp_path, "/my/model")
    assert (tmp_path / "adapter_config.json").read_text() == '{"gates": 3}'
