"""The library functions in a user's own script: the README's example and its guarantees."""

import copy

import pytest
import torch
from documents import ROOT, python_blocks
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import image_batch, tiny_internvl, tiny_llama, tiny_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM, default_data_collator

import emloc
from emloc import ConfigError, Factorized
from emloc.tensors.nn.factorized import Factorized as Home


@pytest.fixture
def model():
    return tiny_llama(tiny_tokenizer(chat=False))


@pytest.fixture
def batches():
    torch.manual_seed(1)
    ids = torch.randint(5, 200, (6, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return [{"input_ids": ids, "attention_mask": mask}]


def train(tuned, steps=5, batch=None):
    """Train with a plain loop, as a user would."""
    torch.manual_seed(0)
    ids = torch.randint(5, 200, (4, 12)) if batch is None else batch
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.01)
    for _ in range(steps):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def lora(target_modules="all-linear", **settings):
    return LoraConfig(r=4, lora_alpha=8, target_modules=target_modules, **settings)


def test_the_example_of_the_readme_runs(model, batches, tmp_path, monkeypatch):
    (example,) = python_blocks(ROOT / "README.md")
    assert len(example.strip().splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    names = {"model": model, "batches": batches, "train": train}
    exec(compile(example, "README.md", "exec"), names)
    assert isinstance(names["model"], PeftModel)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_example_of_the_packages_readme_runs(tiny, tmp_path, monkeypatch):
    """On the tiny model, with a cache below the home of this test."""
    _, example = python_blocks(ROOT / "emloc" / "README.md")
    settings = [word for word in tiny if word != "tracker=none"]
    composed = emloc.compose
    monkeypatch.setattr(emloc, "compose", lambda words: composed([*words, *settings]))
    monkeypatch.setenv("HOME", str(tmp_path))
    names = {}
    exec(compile(example, "emloc/README.md", "exec"), names)
    assert names["result"].recovered.folder.is_relative_to(tmp_path / ".cache" / "emloc")


def test_the_example_of_anchors_runs(model, batches, tmp_path, monkeypatch):
    example, _ = python_blocks(ROOT / "emloc" / "README.md")
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(5, 200, (16, 9))
    names = {
        "model": model,
        "batches": batches,
        "rows": [{"input_ids": row, "labels": row} for row in ids],
        "collate": default_data_collator,
    }
    exec(compile(example, "emloc/README.md", "exec"), names)
    assert names["anchors"].loss is not None
    trained = PeftModel.from_pretrained(model, "adapter")
    changes = [p for name, p in trained.named_parameters() if "lora_B" in name]
    assert all(change.any() for change in changes)


def test_the_original_is_unchanged(model, batches):
    before = copy.deepcopy(model.state_dict())
    emulator = emloc.build_emulator(model, batches, ratio=0.5)
    assert not any(isinstance(module, Home) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    own, theirs = emulator.model.embed_tokens.weight, model.model.embed_tokens.weight
    assert own.data_ptr() == theirs.data_ptr()
    assert not own.requires_grad
    assert theirs.requires_grad
    assert type(emulator) is type(model)
    assert sum(isinstance(module, Factorized) for module in emulator.modules()) == 14
    assert not model._forward_pre_hooks


def test_a_larger_ratio_is_closer_to_the_original(model, batches):
    with torch.no_grad():
        true = model(**batches[0]).logits
        gaps = []
        for ratio in (0.25, 0.5, 0.9):
            emulator = emloc.build_emulator(model, batches, ratio=ratio)
            gaps.append(float((emulator(**batches[0]).logits - true).norm()))
    assert gaps[0] > gaps[1] > gaps[2]


def test_layers_that_read_one_input_can_have_one_v(model, batches):
    emulator = emloc.build_emulator(model, batches, ratio=0.5, shared="inputs")
    own = emloc.build_emulator(model, batches, ratio=0.5)
    block, separate = emulator.model.layers[0], own.model.layers[0]
    assert block.self_attn.q_proj.v is block.self_attn.v_proj.v
    assert block.mlp.gate_proj.v is block.mlp.up_proj.v
    assert block.mlp.up_proj.rank > separate.mlp.up_proj.rank
    numbers = [sum(one.numel() for one in each.parameters()) for each in (emulator, own)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02)
    with torch.no_grad():
        true = model(**batches[0]).logits
        gaps = [float((each(**batches[0]).logits - true).norm()) for each in (emulator, own)]
    assert gaps[0] < gaps[1]
    with pytest.raises(ConfigError, match='pass shared="inputs" or shared="none"'):
        emloc.build_emulator(model, batches, ratio=0.5, shared="all")


@pytest.mark.parametrize("shared", ["none", "inputs"])
def test_the_corrected_adapter_is_exact_on_the_rows_of_a(model, batches, shared):
    emulator = emloc.build_emulator(model, batches, ratio=0.5, shared=shared)
    tuned = get_peft_model(emulator, lora())
    train(tuned)
    raw = emloc.correct(tuned, model, emulator, clamp=0)
    exact = emloc.correct(tuned, model, emulator, clamp=None)
    factors = {
        name.removesuffix(".base_layer"): module
        for name, module in emulator.named_modules()
        if isinstance(module, Factorized)
    }
    assert exact.pairs.keys() == factors.keys()
    for name, pair in exact.pairs.items():
        weight = model.get_submodule(name).weight.double()
        rows = raw.pairs[name].a.double().T
        emulated = (factors[name].product() + raw.pairs[name].delta.double()) @ rows
        torch.testing.assert_close(
            (weight + pair.delta.double()) @ rows, emulated, atol=1e-5, rtol=0
        )


def test_covariance_brings_the_outputs_closer_to_the_tuned_emulator(model, batches):
    """The guarantee of the metric for each layer, tested at the first layer of the first block."""
    emulator = emloc.build_emulator(model, batches, ratio=0.5)
    tuned = get_peft_model(emulator, lora())
    train(tuned, steps=20)
    name = "model.layers.0.self_attn.v_proj"
    raw = emloc.correct(tuned, model, emulator, clamp=0)
    new = emloc.correct(tuned, model, emulator, metric="covariance", clamp=None, batches=batches)
    recorded_inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: recorded_inputs.append(args[0])
    )
    with torch.no_grad():
        model(**batches[0])
    handle.remove()
    rows = recorded_inputs[0][batches[0]["attention_mask"].bool()].double()
    factors = emulator.get_submodule(f"{name}.base_layer")
    target = factors.product() + raw.pairs[name].delta.double()
    weight = model.get_submodule(name).weight.double()
    gaps = [
        (rows @ (weight + adapter.pairs[name].delta.double() - target).T).norm().item()
        for adapter in (raw, new)
    ]
    assert gaps[1] < gaps[0]


def test_the_saved_adapter_gives_the_corrected_weights(model, batches, tmp_path):
    emulator = emloc.build_emulator(model, batches, ratio=0.5)
    tuned = get_peft_model(emulator, lora())
    train(tuned)
    corrected = emloc.correct(tuned, model, emulator)
    corrected.save(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(
        copy.deepcopy(model), tmp_path / "adapter"
    ).merge_and_unload()
    for name, pair in corrected.pairs.items():
        expected = model.get_submodule(name).weight + pair.delta
        torch.testing.assert_close(merged.get_submodule(name).weight, expected)


def test_correcting_twice_is_refused(model, batches, tmp_path):
    emulator = emloc.build_emulator(model, batches, ratio=0.5)
    tuned = get_peft_model(emulator, lora())
    train(tuned)
    tuned.save_pretrained(tmp_path / "trained")
    emloc.correct(tmp_path / "trained", model, emulator).save(tmp_path / "once")
    with pytest.raises(ConfigError, match="already recovered"):
        emloc.correct(tmp_path / "once", model, emulator)


def test_layers_that_were_not_compressed_are_untouched(model, batches):
    emulator = emloc.build_emulator(model, batches, ratio=0.5, targets=r".*\.layers\.0\..*")
    tuned = get_peft_model(emulator, lora())
    train(tuned)
    raw = emloc.correct(tuned, model, emulator, clamp=0)
    new = emloc.correct(tuned, model, emulator)
    for name, pair in new.pairs.items():
        same = torch.equal(pair.delta, raw.pairs[name].delta)
        assert same == name.startswith("model.layers.1")


def test_biases_are_unchanged(batches):
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, **heads)).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    emulator = emloc.build_emulator(model, batches, ratio=0.9)
    query = emulator.model.layers[0].self_attn.q_proj
    assert query.bias.data_ptr() == model.model.layers[0].self_attn.q_proj.bias.data_ptr()
    x = torch.randn(3, 32)
    torch.testing.assert_close(query(x), (x.double() @ query.product().T).float() + query.bias)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": 0.001}, "leaves rank 0"),
        ({"ratio": 0.5, "targets": "nothing"}, "targets='nothing' matches no linear layer"),
    ],
)
def test_invalid_calls_are_refused_in_one_line(model, batches, settings, message):
    with pytest.raises(ConfigError) as refused:
        emloc.build_emulator(model, batches, **settings)
    assert message in str(refused.value)
    with pytest.raises(ConfigError, match="batches is empty"):
        emloc.build_emulator(model, [], ratio=0.5)


def test_covariance_needs_batches(model, batches):
    emulator = emloc.build_emulator(model, batches, ratio=0.5)
    tuned = get_peft_model(emulator, lora())
    with pytest.raises(ConfigError, match="batches belong to metric='covariance'"):
        emloc.correct(tuned, model, emulator, metric="covariance")
    with pytest.raises(ConfigError, match="clamp must be at least 0"):
        emloc.correct(tuned, model, emulator, clamp=-1)


def test_layers_outside_the_blocks_need_no_moments():
    """A LoRA on every linear layer of InternVL includes its projector, which is not compressed."""
    model, batch = tiny_internvl(), image_batch()
    emulator = emloc.build_emulator(model, [batch], ratio=0.5)
    tuned = get_peft_model(emulator, lora())
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    trained = emloc.correct(tuned, model, emulator, clamp=0)
    settings = {"metric": "covariance", "clamp": None}
    corrected = emloc.correct(tuned, model, emulator, batches=[batch], **settings)
    assert corrected.pairs.keys() == trained.pairs.keys()
    for name, pair in corrected.pairs.items():
        is_unchanged = torch.equal(pair.delta, trained.pairs[name].delta)
        assert is_unchanged == ("multi_modal_projector" in name)
    text = {name: batch[name][:, 6:] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ConfigError, match=r"no calibration token reaches .*vision_tower"):
        emloc.correct(tuned, model, emulator, batches=[text], **settings)


def test_a_fully_trained_module_is_kept_with_the_lora(model, batches, tmp_path):
    emulator = emloc.build_emulator(model, batches, ratio=0.5)
    tuned = get_peft_model(emulator, lora(["q_proj"], modules_to_save=["lm_head"]))
    train(tuned)
    head = tuned.base_model.model.lm_head.modules_to_save["default"].weight
    recovered = emloc.correct(tuned, model, emulator)
    assert recovered.extras.keys() == {"lm_head.weight"}
    assert torch.equal(recovered.extras["lm_head.weight"], head)
    recovered.save(tmp_path)
    loaded = PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(loaded.base_model.model.lm_head.modules_to_save["default"].weight, head)
